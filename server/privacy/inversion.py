"""Gradient inversion: reconstructs a training example from a client's update.

A small dense model trains one step on one picture, with the functions that devices use. The
attacker is a malicious server. It chose initial weights under which the gradient mostly depends on
the picture, knows the label, and reconstructs the picture in closed form, then by gradient
matching. Without privacy it succeeds; with privacy it gets a guess at best. Start with
`invert_digits`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedcore.config.run import ClientConfig
from fedcore.privacy.accounting import Charge
from fedcore.privacy.planning import PrivatePlan
from fedcore.seeds import Randomness, global_streams, torch_rng
from fedcore.task.answers import new_model
from fedcore.task.definition import Task
from fedcore.task.model import FullModel
from fedcore.training.local import train
from server.privacy.canaries import artificial_task, private_training

_HIDDEN = 32
_CLASSES = 10
_MATCHING_STEPS = 120
_FOUND = 1e-8  # share of the update's square; ends the search
_LOUDER = 30.0  # last layer's weight scale: moves gradient norm to the first layer
_SETTINGS = ClientConfig(learning_rate=1.0, batch_size=1, epochs=1, device="cpu")


@dataclass(frozen=True)
class Picture:
    """One picture and its reconstructions; pixels from 0 to 1, shape ``(H, W)``."""

    original: Tensor
    without: Tensor
    """Reconstruction from an update without privacy."""
    private: Tensor
    """Reconstruction from an update with the stated noise."""
    blind: Tensor
    """The mean of all other pictures: a guess without any update."""

    def psnr_db(self) -> dict[str, float]:
        """Returns each guess's PSNR against the original, in decibels; higher is closer."""
        guesses = {"without": self.without, "private": self.private, "blind": self.blind}
        return {name: psnr_db(guess, self.original) for name, guess in guesses.items()}


def psnr_db(guess: Tensor, original: Tensor) -> float:
    """Computes the peak signal-to-noise ratio for pixels from 0 to 1, capped at 99 dB."""
    error = (guess.double() - original.double()).square().mean().item()
    return min(99.0, -10 * math.log10(error)) if error > 0 else 99.0


def invert_digits(
    noise_multiplier: float, clip_norm: float, randomness: Randomness, *, pictures: int, seed: int
) -> Iterator[Picture]:
    """Attacks updates from handwritten digits, with and without privacy; yields each result.

    Args:
        noise_multiplier: Noise multiplier of the private updates.
        clip_norm: Clip norm of the private updates.
        randomness: Source of the noise.
        pictures: Number of digits, each from a different class.
        seed: Determines the digits and the models' weights.

    Raises:
        ModuleNotFoundError: scikit-learn, which contains the digits, is not installed.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32) / 16
    targets = torch.tensor(bunch.target)
    plan = PrivatePlan(Charge(1, noise_multiplier, 1.0, 1), clip_norm)
    rng = torch_rng(seed, "inversion")
    for label in torch.randperm(_CLASSES, generator=rng)[:pictures].tolist():
        rows = (targets == label).nonzero().flatten()
        row = int(rows[torch.randint(len(rows), (1,), generator=rng)])
        others = torch.cat([images[:row], images[row + 1 :]])
        yield _attack(images[row], label, others.mean(0), plan, randomness, seed)


def _attack(
    image: Tensor, label: int, blind: Tensor, plan: PrivatePlan, randomness: Randomness, seed: int
) -> Picture:
    task = _task(image.numel())
    with global_streams(seed, "inversion model", label):
        start = FullModel(nn.Identity(), new_model(task))
    examples: Any = TensorDataset(image.reshape(1, -1), torch.tensor([label]))
    plain, private = copy.deepcopy(start), copy.deepcopy(start)
    order = torch_rng(seed, "order")
    train(plain, examples, task.loss_of, _SETTINGS, epochs=1, batch_size=1, rng=order)
    private_training(plan, randomness)(task, private, examples, _SETTINGS)

    def reconstruct(trained: nn.Module, clip_norm: float) -> Tensor:
        update = [
            (before - after).detach() / _SETTINGS.learning_rate
            for before, after in zip(start.parameters(), trained.parameters(), strict=True)
        ]
        closed = in_closed_form(update[0], update[1])
        matched = by_matching(start, update, label, clip_norm=clip_norm, guesses=(closed, blind))
        # The attacker can't tell which guess is better; assume that it picks the closer one.
        both = [guess.reshape(image.shape) for guess in (closed, matched)]
        return max(both, key=lambda guess: psnr_db(guess, image))

    return Picture(
        original=image,
        without=reconstruct(plain, math.inf),
        private=reconstruct(private, plan.clip_norm),
        blind=blind,
    )


def _task(pixels: int) -> Task:
    def model() -> nn.Module:
        last = nn.Linear(_HIDDEN, _CLASSES)
        with torch.no_grad():
            last.weight.mul_(_LOUDER)
        return nn.Sequential(nn.Linear(pixels, _HIDDEN), nn.Sigmoid(), last)

    return artificial_task(
        "inversion",
        kind="classification",
        model=model,
        loss=nn.functional.cross_entropy,
        example_input=torch.zeros(pixels),
    )


def in_closed_form(weight: Tensor, bias: Tensor) -> Tensor:
    """Reconstructs the input from the gradient of a first dense layer.

    The gradient of one example is the outer product of the layer's error and the input, with a 1
    appended for the bias: a rank-one matrix. The closest rank-one matrix to the observed gradient
    gives the most likely input under Gaussian noise; without noise it is exact.

    Args:
        weight: Gradient of the layer's weight, shape ``(H, P)``.
        bias: Gradient of its bias, shape ``(H,)``.

    Returns:
        Pixels within 0 and 1, shape ``(P,)``.

    Source:
        Phong et al. 2018, 10.1109/TIFS.2017.2787987, section 3, adapted to noise.
    """
    seen = torch.cat([weight, bias[:, None]], dim=1).double()
    direction = torch.linalg.svd(seen, full_matrices=False).Vh[0]
    pixels: Tensor = (direction[:-1] / direction[-1]).nan_to_num(0.0).clamp(0, 1)
    return pixels.float()


def by_matching(
    model: nn.Module,
    update: list[Tensor],
    label: int,
    *,
    clip_norm: float,
    guesses: Sequence[Tensor],
) -> Tensor:
    """Reconstructs the input whose clipped gradient is closest to the observed update.

    Under Gaussian noise this is the most likely input with pixels from 0 to 1. The attacker knows
    the label.

    Source:
        Zhu, Liu, Han 2019, arXiv:1906.08935, Algorithm 1, starting from given guesses instead of
        noise.
    """
    least, best = math.inf, guesses[0]
    for guess in guesses:
        distance, found = _match(model, update, label, clip_norm, guess.flatten())
        if distance < least:
            least, best = distance, found
        if least <= _FOUND * sum(part.square().sum().item() for part in update):
            break
    return best


def _match(
    model: nn.Module, update: list[Tensor], label: int, clip_norm: float, guess: Tensor
) -> tuple[float, Tensor]:
    """Optimises one guess; returns its distance from the update and the resulting input."""
    model = copy.deepcopy(model).double()
    weights, target = list(model.parameters()), torch.tensor([label])
    # The sigmoid keeps pixels between 0 and 1.
    free = torch.logit(guess.double().clamp(0.02, 0.98)).reshape(1, -1).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [free], max_iter=_MATCHING_STEPS, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def distance() -> Tensor:
        value = nn.functional.cross_entropy(model(torch.sigmoid(free)), target)
        gradient = torch.autograd.grad(value, weights, create_graph=True)
        norm = torch.stack([part.square().sum() for part in gradient]).sum().sqrt()
        # Not for an infinite norm: the derivative, 0 times infinity, would be NaN.
        scale = torch.clamp(clip_norm / norm, max=1.0) if math.isfinite(clip_norm) else 1.0
        gaps = [
            (part * scale - seen).square().sum()
            for part, seen in zip(gradient, update, strict=True)
        ]
        return torch.stack(gaps).sum()

    def evaluated() -> float:
        optimizer.zero_grad()
        total = distance()
        torch.autograd.backward(total)
        return total.item()

    optimizer.step(evaluated)  # type: ignore[no-untyped-call]
    return distance().item(), torch.sigmoid(free).detach().flatten().float()
