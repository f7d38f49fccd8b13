"""The files of a released model in the layouts of other servers: Triton, KServe, or plain.

Sources: Triton's model configuration and model repository
(https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html),
KServe's ``InferenceService`` v1beta1 with its Triton runtime (https://kserve.github.io/website).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Literal, get_args

from google.protobuf import text_encoding

from fedcore.artifacts.manifest import Manifest, manifest_bytes
from fedcore.errors import ConfigError
from server.release.signature import ModelSignature, ModelTensor

ExportLayout = Literal["triton", "kserve", "plain"]
LAYOUTS: tuple[ExportLayout, ...] = get_args(ExportLayout)
_URI = re.compile(r"[a-z][a-z0-9+.-]*://[!-~]+")


def check_layout(layout: str, storage_uri: str | None) -> None:
    """Checks that a layout exists and has what it needs.

    Raises:
        ConfigError: there is no such layout, or ``storage_uri`` is missing, not valid or not used.
    """
    if layout not in LAYOUTS:
        raise ConfigError(
            f"layout {layout!r}: expected one of {', '.join(LAYOUTS)}. Nothing was exported."
        )
    if (layout == "kserve") != (storage_uri is not None):
        raise ConfigError(
            "storage URI: the layout kserve needs one, which says where the cluster finds the "
            "model, and other layouts have none. Nothing was exported; give --storage-uri, e.g. "
            "s3://bucket/digits, with --layout kserve alone."
        )
    if storage_uri is not None and not _URI.fullmatch(storage_uri):
        raise ConfigError(
            f"storage URI {storage_uri!r}: expected an address without spaces, such as "
            "s3://bucket/digits or pvc://claim/digits. Nothing was exported."
        )


def files_of_layout(
    layout: ExportLayout,
    manifest: Manifest,
    signature: ModelSignature,
    onnx: bytes,
    golden: bytes,
    storage_uri: str | None,
) -> dict[str, bytes]:
    """Returns the files of a model's folder in a layout, by path within it.

    The version of a release is its version in Triton, too.
    """
    if layout == "plain":
        return {
            "model.onnx": onnx,
            "golden.safetensors": golden,
            "manifest.json": manifest_bytes(manifest),
            **labels_file(manifest),
        }
    labels = labels_file(manifest) if manifest.presents in ("label", "labels") else {}
    triton = {
        "config.pbtxt": triton_config(manifest, signature, labelled=bool(labels)).encode(),
        f"{manifest.version}/model.onnx": onnx,
        f"{manifest.version}/manifest.json": manifest_bytes(manifest),
        **labels,
    }
    if layout == "triton":
        return triton
    assert storage_uri is not None, "check_layout refuses it"
    return {
        "inference_service.yaml": inference_service(manifest, storage_uri).encode(),
        **{f"storage/{manifest.model}/{name}": data for name, data in triton.items()},
    }


def labels_file(manifest: Manifest) -> Mapping[str, bytes]:
    """Returns the file with one label a line; none without labels, or if one has a line break."""
    if not manifest.labels or any(re.search(r"[\r\n]", label) for label in manifest.labels):
        return {}
    return {"labels.txt": "".join(f"{label}\n" for label in manifest.labels).encode()}


def triton_config(manifest: Manifest, signature: ModelSignature, *, labelled: bool) -> str:
    """Returns a model's ``config.pbtxt``.

    One instance on the CPU, on which the golden outputs were reproduced. Requests wait for no
    others, but those that wait run together, unless answers would then depend on the batch.
    """
    batching = "dynamic_batching { }\n" if signature.max_batch_size > 1 else ""
    labels = '    label_filename: "labels.txt"\n' if labelled else ""
    return (
        f"# {manifest.model} version {manifest.version}, sha256 {manifest.onnx.sha256}\n"
        f'name: "{manifest.model}"\n'
        'platform: "onnxruntime_onnx"\n'
        'backend: "onnxruntime"\n'
        'default_model_filename: "model.onnx"\n'
        f"max_batch_size: {signature.max_batch_size}\n"
        f"input [\n  {{\n{_tensor(signature.input)}  }}\n]\n"
        f"output [\n  {{\n{_tensor(signature.output)}{labels}  }}\n]\n"
        "instance_group [\n  {\n    count: 1\n    kind: KIND_CPU\n  }\n]\n"
        f"{batching}"
    )


def _tensor(tensor: ModelTensor) -> str:
    shape = tensor.shape or (1,)  # Triton has no empty shape beside the batch
    reshape = "" if tensor.shape else "    reshape { shape: [ ] }\n"
    return (
        f'    name: "{text_encoding.CEscape(tensor.name, as_utf8=False)}"\n'
        f"    data_type: TYPE_{tensor.datatype}\n"
        f"    dims: [ {', '.join(map(str, shape))} ]\n"
        f"{reshape}"
    )


def inference_service(manifest: Manifest, storage_uri: str) -> str:
    """Returns an ``InferenceService`` that KServe runs with its Triton runtime.

    JSON strings are YAML strings.
    """
    return (
        "apiVersion: serving.kserve.io/v1beta1\n"
        "kind: InferenceService\n"
        "metadata:\n"
        f"  name: {json.dumps(kubernetes_name(manifest.model))}\n"
        "  annotations:\n"
        f"    fedcore-model-version: {json.dumps(str(manifest.version))}\n"
        f"    fedcore-model-sha256: {json.dumps(manifest.onnx.sha256)}\n"
        "spec:\n"
        "  predictor:\n"
        "    model:\n"
        "      modelFormat:\n"
        "        name: triton\n"
        '        version: "2"\n'
        "      protocolVersion: v2\n"
        f"      storageUri: {json.dumps(storage_uri)}\n"
    )


def kubernetes_name(model: str) -> str:
    """Returns a model's name as Kubernetes takes it: 1 to 63 of a-z, 0-9 and '-', a letter first.

    >>> kubernetes_name("wind_farm-2"), kubernetes_name("2nd_")
    ('wind-farm-2', 'model-2nd')
    """
    name = model.replace("_", "-").strip("-")
    if not name[:1].isalpha():
        name = f"model-{name}"
    return name[:63].rstrip("-")
