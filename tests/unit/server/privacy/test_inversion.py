from __future__ import annotations

import torch
from torch import nn

from fedcore.seeds import Simulated
from server.privacy.inversion import by_matching, in_closed_form, invert_digits, psnr_db


def gradients(
    model: nn.Module, x: torch.Tensor, label: int, clip_norm: float = float("inf")
) -> list[torch.Tensor]:
    value = nn.functional.cross_entropy(model(x[None]), torch.tensor([label]))
    found = torch.autograd.grad(value, list(model.parameters()))
    norm = torch.stack([part.square().sum() for part in found]).sum().sqrt()
    return [part * min(1.0, clip_norm / float(norm)) for part in found]


def small() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3))
    return model, torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7, 0.2])


def test_psnr_is_known_for_known_errors() -> None:
    original = torch.zeros(4, 4)
    assert psnr_db(original + 0.1, original) == psnr_db(original - 0.1, original)
    assert abs(psnr_db(original + 0.1, original) - 20) < 1e-5
    assert psnr_db(original, original) == 99.0


def test_the_first_layers_gradient_gives_the_input() -> None:
    model, x = small()
    weight, bias, *_ = gradients(model, x, 1)
    assert psnr_db(in_closed_form(weight, bias), x) > 60
    assert in_closed_form(torch.zeros(8, 6), torch.zeros(8)).shape == x.shape


def test_matching_finds_the_input_of_a_clipped_gradient_from_a_blind_start() -> None:
    model, x = small()
    seen = gradients(model, x, 1, clip_norm=0.05)
    found = by_matching(model, seen, 1, clip_norm=0.05, guesses=[torch.full((6,), 0.5)])
    assert psnr_db(found, x) > 40


def test_without_privacy_the_digit_shows_and_with_it_nothing_does() -> None:
    (picture,) = invert_digits(1.0, 1.0, Simulated(1), pictures=1, seed=2)
    psnr = picture.psnr_db()
    assert psnr["without"] > 40
    assert psnr["private"] < min(9.0, psnr["blind"])
    assert picture.original.shape == picture.private.shape == (8, 8)


def test_the_attack_is_no_straw_man_with_little_noise_it_sees_the_digit() -> None:
    (picture,) = invert_digits(0.01, 1.0, Simulated(1), pictures=1, seed=2)
    assert picture.psnr_db()["private"] > picture.psnr_db()["blind"] + 8
