"""Models of the zoo that treat each example alone, and those that couple examples in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

CLASSES, TOKENS, STEPS, WIDTH = 5, 11, 6, 8
FEATURES = torch.zeros(WIDTH)
IMAGE = torch.zeros(2, 8, 8)
SIGNAL = torch.zeros(2, 16)
VOLUME = torch.zeros(2, 5, 5, 5)
WINDOW = torch.zeros(STEPS, WIDTH)
SENTENCE = torch.zeros(STEPS, dtype=torch.long)


class Model(nn.Module):
    """Layers by name, and a forward pass over them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def made(
    forward: Callable[[Any, Tensor], Tensor], **layers: Callable[[], nn.Module]
) -> Callable[[], nn.Module]:
    return lambda: Model(forward, **{name: build() for name, build in layers.items()})


def dense(inputs: int = WIDTH, outs: int = CLASSES) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(inputs, outs)


def embedding() -> nn.Module:
    return nn.Embedding(TOKENS, WIDTH)


def mlp(outs: int = CLASSES) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, outs))


def cnn(*between: nn.Module) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), *between, nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, CLASSES)),
    )


def many_filters() -> nn.Module:
    """Few places, many weights: norms come from products of rows with each other."""
    return nn.Sequential(
        nn.Conv2d(2, 24, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(96, CLASSES)
    )


def sequence(layer: nn.Module) -> nn.Module:
    """A recurrent layer over a window, and what its last step says."""
    return Model(lambda m, x: m.head(m.layer(x)[0][:, -1]), layer=layer, head=dense()())


def attention(layer: nn.Module, *, turned: bool = False) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if turned else x
        x = m.layer(x, x, x, need_weights=False)[0]
        x = x.transpose(0, 1) if turned else x
        return m.head(x.mean(1))  # type: ignore[no-any-return]

    return Model(forward, layer=layer, head=dense()())


def language_model(
    forward: Callable[[Any, Tensor], Tensor], **layers: Callable[[], nn.Module]
) -> Callable[[], nn.Module]:
    return made(forward, table=embedding, head=dense(WIDTH, TOKENS), **layers)


def positions(m: Any, x: Tensor) -> Tensor:
    places = m.places(torch.arange(x.shape[1], device=x.device))
    return m.head(torch.relu(m.table(x) + places))


def causal(m: Any, x: Tensor) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    return m.head(m.block(m.table(x), src_mask=mask, is_causal=True))  # type: ignore[no-any-return]


def tied(m: Any, x: Tensor) -> Tensor:
    return functional.linear(torch.tanh(m.mix(m.table(x))), m.table.weight)


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.1, batch_first=True)


class Adapter(nn.Module):
    """A frozen dense layer, with an adapter of low rank merged into its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, CLASSES).requires_grad_(False)
        self.down = nn.Parameter(0.3 * torch.randn(2, WIDTH))
        self.up = nn.Parameter(0.3 * torch.randn(CLASSES, 2))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.base.weight + self.up @ self.down, self.base.bias)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.inner(x)))  # type: ignore[no-any-return]


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)  # type: ignore[index]
    return model


def branches(m: Any, x: Tensor) -> Tensor:
    return m.first(x) if bool((x.sum(dim=1) > 0).all()) else m.second(x)  # type: ignore[no-any-return]


def rows_as_batch(m: Any, x: Tensor) -> Tensor:
    count, steps, width = x.shape
    hidden = torch.relu(m.first(x.reshape(count * steps, width)))
    return m.second(hidden).view(count, steps, -1).mean(1)  # type: ignore[no-any-return]


def frames(m: Any, x: Tensor) -> Tensor:
    count, channels = x.shape[:2]
    hidden = m.layer(x.flatten(0, 1).unsqueeze(1)).relu().mean((2, 3))
    return m.head(hidden.view(count, channels * 4))  # type: ignore[no-any-return]


def _checkpointed(reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(m.norm(checkpoint(m.inner, x, use_reentrant=reentrant)))  # type: ignore[no-any-return]

    return forward


def recomputed(reentrant: bool) -> Callable[[], nn.Module]:
    return made(
        _checkpointed(reentrant),
        stem=dense(WIDTH, 16),
        inner=nn.Tanh,
        norm=lambda: nn.LayerNorm(16),
        head=dense(16),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(2, 4, 3, dilation=2), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten()),
        nn.Linear(24, CLASSES),
    )


def conv3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(81, CLASSES))


def transposed() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 4, stride=4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, stride=2)),
        *(nn.Flatten(), nn.Linear(32, CLASSES)),
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, groups=2, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(16, CLASSES)),
    )


def weight_normed() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(WIDTH, 16)), nn.Tanh(), nn.Linear(16, CLASSES)
    )


def spectral() -> nn.Module:
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(WIDTH, 16)), nn.Tanh(), nn.Linear(16, CLASSES)
    )


batch_mean = made(
    lambda m, x: m.second((h := m.first(x)) - h.mean(0, keepdim=True)),
    first=dense(WIDTH, 16),
    second=dense(16),
)
batch_norm = made(
    lambda m, x: m.second(functional.batch_norm(m.first(x), None, None, training=True)),
    first=dense(WIDTH, 16),
    second=dense(16),
)
by_frames = made(frames, layer=lambda: nn.Conv2d(1, 4, 3), head=dense(8))
by_rows = made(rows_as_batch, first=dense(WIDTH, 16), second=dense(16))


def large_table(forward: Callable[[Any, Tensor], Tensor], **more: Any) -> Callable[[], nn.Module]:
    return made(forward, table=lambda: nn.Embedding(3000, WIDTH, **more), head=dense())


def reads_once(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.table(x)).mean(1))  # type: ignore[no-any-return]


def reads_twice(m: Any, x: Tensor) -> Tensor:
    return m.head((m.table(x) * m.table(x.flip(1))).mean(1) - m.table(x[:, 0]))  # type: ignore[no-any-return]


LARGE_TABLES = {
    "read once": large_table(reads_once),
    "read twice": large_table(reads_twice),
    "padded": large_table(reads_once, padding_idx=0),
}
