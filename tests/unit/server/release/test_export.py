"""Released models in the layouts of other servers, read as those servers read them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc import model_config_pb2

from fedcore.artifacts.golden import golden_bytes, parse_golden
from fedcore.errors import ConfigError, ReleaseError
from server.release.draft import CanaryAim, Draft
from server.release.export import ExportedModel, export_model
from server.release.layouts import kubernetes_name
from server.release.publish import initialise, publish
from tests.unit.edge_client.conftest import matmul_draft
from tests.unit.server.release.conftest import NOW, Publisher


@pytest.fixture
def releases(tmp_path: Path) -> Publisher:
    made = Publisher(tmp_path / "repository", tmp_path / "keys")
    initialise(made.repository, made.keys, now=NOW)
    return made


def put(releases: Publisher, draft: Draft) -> None:
    publish(draft, repository=releases.repository, keys=releases.keys, created=NOW)


def exported(releases: Publisher, layout: Any, out: Path, **more: Any) -> ExportedModel:
    return export_model(
        "digits", layout, repository=releases.repository, keys=releases.keys, out=out, **more
    )


def config_of(done: ExportedModel) -> Any:
    return text_format.Parse(
        (done.folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
    )


def one_operator(operator: str, dtype: int, shape: list[int], **more: Any) -> bytes:
    """A model that applies one operator to ``input``."""
    graph = helper.make_graph(
        [helper.make_node(operator, ["input"], ["output"], **more)],
        "one",
        [helper.make_tensor_value_info("input", dtype, ["batch", *shape])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
    )
    model = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)
    )
    return bytes(model.SerializeToString())


def test_triton_gets_a_model_repository(releases: Publisher, tmp_path: Path) -> None:
    put(releases, matmul_draft(1.0))
    put(releases, matmul_draft(2.0))
    done = exported(releases, "triton", tmp_path / "models")
    assert done.folder == tmp_path / "models" / "digits"
    assert done.files == ("2/manifest.json", "2/model.onnx", "config.pbtxt", "labels.txt")
    config = config_of(done)
    assert (config.name, config.platform, config.backend) == (
        "digits",
        "onnxruntime_onnx",
        "onnxruntime",
    )
    assert (config.default_model_filename, config.max_batch_size) == ("model.onnx", 3)
    assert [(each.name, each.data_type, list(each.dims)) for each in config.input] == [
        ("x", model_config_pb2.TYPE_FP32, [3])
    ]
    assert [(each.name, each.data_type, list(each.dims)) for each in config.output] == [
        ("y", model_config_pb2.TYPE_FP32, [2])
    ]
    assert config.output[0].label_filename == "labels.txt"
    assert (done.folder / "labels.txt").read_text().splitlines() == ["no", "yes"]
    assert config.HasField("dynamic_batching")
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    assert json.loads((done.folder / "2/manifest.json").read_bytes())["version"] == 2


@pytest.mark.parametrize("layout", ["triton", "plain"])
def test_the_exported_file_gives_the_golden_answers(
    releases: Publisher, tmp_path: Path, layout: str
) -> None:
    draft = matmul_draft(2.0)
    put(releases, draft)
    done = exported(releases, layout, tmp_path / "models")
    (path,) = done.folder.rglob("model.onnx")
    golden = parse_golden(draft.golden)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: golden.inputs})
    np.testing.assert_allclose(outputs, golden.outputs, atol=1e-3)


def test_plain_has_the_release_byte_for_byte(releases: Publisher, tmp_path: Path) -> None:
    put(releases, matmul_draft(1.0))
    done = exported(releases, "plain", tmp_path / "models")
    assert done.files == ("golden.safetensors", "labels.txt", "manifest.json", "model.onnx")
    for name in set(done.files) - {"labels.txt"}:
        (signed,) = releases.repository.rglob(f"*.{name}")
        assert (done.folder / name).read_bytes() == signed.read_bytes()
    assert not [path for path in done.folder.parent.iterdir() if path != done.folder]
    assert done.folder.stat().st_mode & 0o777 == 0o755


def test_kserve_gets_a_service_and_what_its_storage_holds(
    releases: Publisher, tmp_path: Path
) -> None:
    put(releases, matmul_draft(1.0))
    uri = "s3://bucket/digits-1"
    done = exported(releases, "kserve", tmp_path / "models", storage_uri=uri)
    service = yaml.safe_load((done.folder / "inference_service.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    assert service["metadata"]["name"] == "digits"
    assert service["metadata"]["annotations"]["fedcore-model-version"] == "1"
    assert service["spec"]["predictor"]["model"] == {
        "modelFormat": {"name": "triton", "version": "2"},
        "protocolVersion": "v2",
        "storageUri": uri,
    }
    assert "storage/digits/1/model.onnx" in done.files
    assert (done.folder / "storage/digits/config.pbtxt").is_file()


@pytest.mark.parametrize("name", ["a" * 64, "2nd_", "_", "wind_farm-2", "0" * 64])
def test_names_are_those_that_kubernetes_takes(name: str) -> None:
    import re

    found = kubernetes_name(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", found)
    assert len(found) <= 63


def test_answers_that_depend_on_the_batch_are_not_batched(
    releases: Publisher, tmp_path: Path
) -> None:
    dynamic = matmul_draft(1.0)
    put(
        releases,
        replace(dynamic, lineage=dynamic.lineage.model_copy(update={"candidate": "int8_dynamic"})),
    )
    config = config_of(exported(releases, "triton", tmp_path / "dynamic"))
    assert config.max_batch_size == 1
    assert not config.HasField("dynamic_batching")
    # The mean over the batch, of one input the input itself.
    inputs = np.eye(3, dtype=np.float32)
    put(
        releases,
        replace(
            dynamic,
            labels=(),
            onnx=one_operator("LpNormalization", TensorProto.FLOAT, [3], axis=0, p=1),
            golden=golden_bytes(inputs + 1, np.ones((3, 3), np.float32)),
        ),
    )
    assert exported(releases, "triton", tmp_path / "coupled").max_batch_size == 1


def test_other_types_and_scalars_are_described(releases: Publisher, tmp_path: Path) -> None:
    inputs = np.array([3, 4], dtype=np.int64)
    put(
        releases,
        replace(
            matmul_draft(1.0),
            kind="regression",
            labels=(),
            input_shape=(),
            input_dtype="int64",
            onnx=one_operator("Cast", TensorProto.INT64, [], to=TensorProto.FLOAT),
            golden=golden_bytes(inputs, inputs.astype(np.float32)),
        ),
    )
    config = config_of(exported(releases, "triton", tmp_path / "models"))
    for each, kind in (
        (config.input[0], model_config_pb2.TYPE_INT64),
        (config.output[0], model_config_pb2.TYPE_FP32),
    ):
        assert (each.data_type, list(each.dims)) == (kind, [1])
        assert each.HasField("reshape")
        assert list(each.reshape.shape) == []
    assert config.output[0].label_filename == ""


@pytest.mark.parametrize(
    ("kind", "labels"), [("next_token", ("a", "\n")), ("classification", ("a\r", "b"))]
)
def test_labels_that_fill_no_line_stay_in_the_manifest(
    releases: Publisher, tmp_path: Path, kind: str, labels: tuple[str, ...]
) -> None:
    put(releases, replace(matmul_draft(1.0), kind=kind, labels=labels))
    done = exported(releases, "plain", tmp_path / "plain")
    assert "labels.txt" not in done.files
    assert tuple(json.loads((done.folder / "manifest.json").read_bytes())["labels"]) == labels
    done = exported(releases, "triton", tmp_path / "triton")
    assert config_of(done).output[0].label_filename == ""


def test_the_version_is_the_stable_one_or_the_one_that_is_named(
    releases: Publisher, tmp_path: Path
) -> None:
    put(releases, matmul_draft(1.0))
    put(releases, replace(matmul_draft(2.0), canary=CanaryAim(10.0)))
    assert exported(releases, "plain", tmp_path / "a").manifest.version == 1
    assert exported(releases, "plain", tmp_path / "b", version=2).manifest.version == 2
    with pytest.raises(ReleaseError, match="no version 3 of it; published are: 1, 2"):
        exported(releases, "plain", tmp_path / "c", version=3)


def test_nothing_is_exported_that_is_not_published(releases: Publisher, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="no version of it; published are: none"):
        exported(releases, "plain", tmp_path / "models")
    with pytest.raises(ReleaseError, match="model name"):
        export_model(
            "../up", "plain", repository=releases.repository, keys=releases.keys, out=tmp_path
        )
    assert not (tmp_path / "models").exists()


def test_what_exists_is_never_replaced(releases: Publisher, tmp_path: Path) -> None:
    put(releases, matmul_draft(1.0))
    there = tmp_path / "models" / "digits"
    there.mkdir(parents=True)
    (there / "own").write_text("kept")
    with pytest.raises(ReleaseError, match="exists already"):
        exported(releases, "triton", tmp_path / "models")
    assert [path.name for path in there.parent.rglob("*")] == ["digits", "own"]


def test_a_failure_leaves_no_folder(
    releases: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(releases, matmul_draft(1.0))

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.release.export.write_atomic", full)
    with pytest.raises(Exception, match="no room"):
        exported(releases, "triton", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"golden": golden_bytes(np.eye(3, dtype=np.float32), np.ones((3, 2), np.float32))}, "dif"),
        ({"onnx": b"no model"}, "onnxruntime cannot run it"),
        ({"input_shape": (4,)}, r"inputs of shape \(3,\), its manifest says \(4,\)"),
    ],
)
def test_a_model_that_does_not_reproduce_its_golden_outputs_is_refused(
    releases: Publisher, tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    put(releases, replace(matmul_draft(1.0), **change))
    with pytest.raises(ReleaseError, match=match):
        exported(releases, "triton", tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_an_altered_file_is_refused(releases: Publisher, tmp_path: Path) -> None:
    put(releases, matmul_draft(1.0))
    (path,) = releases.repository.rglob("*.model.onnx")
    path.write_bytes(matmul_draft(2.0).onnx)
    with pytest.raises(ReleaseError, match="differs from what was published"):
        exported(releases, "plain", tmp_path / "models")


@pytest.mark.parametrize(
    ("layout", "uri", "match"),
    [
        ("tensorflow", None, "expected one of triton, kserve, plain"),
        ("kserve", None, "needs one"),
        ("triton", "s3://bucket/x", "other layouts have none"),
        ("kserve", "bucket", "expected an address"),
        ("kserve", 's3://bucket/x"\nevil: true', "expected an address"),
    ],
)
def test_layouts_and_addresses_are_checked_first(
    releases: Publisher, tmp_path: Path, layout: str, uri: str | None, match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        exported(releases, layout, tmp_path / "models", storage_uri=uri)
