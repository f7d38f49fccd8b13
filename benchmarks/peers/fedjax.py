"""FedJAX: federated averaging with its jit backend, the quickest on a CPU."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

jax.tree_map = jax.tree_util.tree_map  # FedJAX 0.0.17 calls it; JAX has taken the alias away

import fedjax  # noqa: E402
import haiku as hk  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from fedjax.algorithms import fed_avg  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from benchmarks.peers.common import Request, Result, answer, now_s, read_request  # noqa: E402

Batch = Mapping[str, jnp.ndarray]


def main() -> None:
    """Runs the workload."""
    request = read_request()
    parts = load_file(request.data)
    flat = request.workload.partition == "w2"
    model = make_model(logistic if flat else cnn, 784 if flat else (28, 28, 1))
    images = parts["images"] if flat else parts["images"].reshape(-1, 28, 28, 1)
    tested = parts["test_images"] if flat else parts["test_images"].reshape(-1, 28, 28, 1)
    begins = parts["offsets"]
    data = fedjax.InMemoryFederatedData(
        {
            f"{client:04d}": {
                "x": images[begins[client] : begins[client + 1]],
                "y": parts["labels"][begins[client] : begins[client + 1]],
            }
            for client in range(len(begins) - 1)
        }
    )
    ends_s, params = run(model, data, request)
    outputs = [
        np.asarray(model.apply_for_eval(params, {"x": tested[i : i + 1000]})).argmax(1)
        for i in range(0, len(tested), 1000)
    ]
    right = np.concatenate(outputs) == parts["test_labels"]
    answer(Result(ends_s=ends_s, accuracy=float(right.mean())))


def run(
    model: fedjax.Model, data: fedjax.FederatedData, request: Request
) -> tuple[list[float], fedjax.Params]:
    """Federated averaging."""
    workload = request.workload
    algorithm = fed_avg.federated_averaging(
        grad_fn=fedjax.model_grad(model),
        client_optimizer=fedjax.optimizers.sgd(workload.learning_rate),
        server_optimizer=fedjax.optimizers.sgd(1.0),
        client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(
            batch_size=workload.batch_size, num_epochs=workload.epochs, seed=request.seed
        ),
    )
    sampler = fedjax.client_samplers.UniformGetClientSampler(data, workload.cohort, request.seed)
    state = algorithm.init(model.init(jax.random.PRNGKey(request.seed)))
    ends_s = []
    for _ in range(request.rounds):
        state, _ = algorithm.apply(state, sampler.sample())
        jax.block_until_ready(state.params)
        ends_s.append(now_s())
    return ends_s, state.params


def make_model(network: type, shape: int | tuple[int, ...]) -> fedjax.Model:
    """A haiku network as FedJAX takes it."""
    example = {"x": np.zeros((1, *np.atleast_1d(shape)), np.float32), "y": np.zeros(1, np.int64)}
    transformed = hk.transform(lambda batch: network(batch["x"]))
    return fedjax.create_model_from_haiku(
        transformed,
        example,
        train_loss=lambda batch, outputs: fedjax.metrics.unreduced_cross_entropy_loss(
            batch["y"], outputs
        ),
        eval_metrics={},
    )


def uniform(fan_in: int) -> hk.initializers.Initializer:
    """Torch's usual initial weights and biases."""
    return hk.initializers.RandomUniform(-(fan_in**-0.5), fan_in**-0.5)


def dense(width: int, fan_in: int) -> hk.Linear:
    """A dense layer."""
    return hk.Linear(width, w_init=uniform(fan_in), b_init=uniform(fan_in))


def conv(channels: int, fan_in: int) -> hk.Conv2D:
    """A 3x3 convolution without padding."""
    return hk.Conv2D(channels, 3, padding="VALID", w_init=uniform(fan_in), b_init=uniform(fan_in))


def logistic(x: jnp.ndarray) -> jnp.ndarray:
    """Logistic regression."""
    return dense(10, 784)(x)


def cnn(x: jnp.ndarray) -> jnp.ndarray:
    """`benchmarks.tasks.models.cnn`, channels last."""
    for layer in (conv(32, 9), conv(64, 288)):
        x = hk.max_pool(jax.nn.relu(layer(x)), window_shape=2, strides=2, padding="VALID")
    x = jax.nn.relu(dense(64, 1600)(hk.Flatten()(x)))
    return dense(10, 64)(x)


if __name__ == "__main__":
    main()
