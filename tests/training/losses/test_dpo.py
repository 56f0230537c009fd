"""Preference losses of pairs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mas_hpc.training.losses.dpo import REFERENCE_FREE, Completions, preference_loss

KINDS = ["sigmoid", "hinge", "ipo_sum", "ipo_mean", "robust", "simpo", "orpo", "sft"]
METRICS = {
    "rewards/chosen": 0.1, "rewards/rejected": -0.1, "rewards/accuracies": 1.0, "rewards/margins": 0.2,
    "logps/chosen": -10.0, "logps/rejected": -14.0,
}  # fmt: skip


def _side(policy: Tensor, reference: Tensor, length: Tensor) -> Completions:
    return Completions(policy_P=policy, reference_P=reference, length_P=length)


def _golden(
    losses: list[tuple[str, float]], *, reference: tuple[float, float] = (-11.0, -13.0), beta: float = 0.1,
    label_smoothing: float = 0.0, gamma: float = 0.0,
) -> tuple[float, dict[str, Tensor]]:  # fmt: skip
    chosen, rejected = (
        _side(*(torch.tensor([x], dtype=torch.float64) for x in row))
        for row in ((-10.0, reference[0], 5.0), (-14.0, reference[1], 7.0))
    )
    value, metrics = preference_loss(
        chosen, rejected, losses=losses, beta=beta, label_smoothing=label_smoothing, gamma=gamma, num_pairs=1
    )
    return value.item(), metrics


def _batch() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Policy of chosen and rejected (they need gradients), reference of both, length of both, of 9 pairs."""
    generator = torch.Generator().manual_seed(7)
    length = [torch.randint(2, 9, (9,), generator=generator).double() for _ in range(2)]
    policy = [-torch.rand(9, generator=generator, dtype=torch.float64) * n for n in length]
    reference = [-torch.rand(9, generator=generator, dtype=torch.float64) * n for n in length]
    return policy[0].requires_grad_(), policy[1].requires_grad_(), *reference, *length


def _loss(policy: tuple[Tensor, Tensor], rest: tuple[Tensor, ...], losses: list[tuple[str, float]], num_pairs: int) -> Tensor:
    chosen, rejected = _side(policy[0], rest[0], rest[2]), _side(policy[1], rest[1], rest[3])
    return preference_loss(chosen, rejected, losses=losses, beta=0.4, label_smoothing=0.1, gamma=0.3, num_pairs=num_pairs)[0]


def _plain(kind: str, pc: float, pr: float, rc: float, rr: float, nc: float, nr: float) -> float:
    def cost(x: float) -> float:
        return math.log(1 + math.exp(-x))

    beta, e, x = 0.4, 0.1, 0.4 * ((pc - rc) - (pr - rr))
    s = beta * (pc / nc - pr / nr) - 0.3
    odds = [math.exp(p / n) / (1 - math.exp(p / n)) for p, n in ((pc, nc), (pr, nr))]
    return {
        "sigmoid": (1 - e) * cost(x) + e * cost(-x),
        "hinge": max(0.0, 1 - x),
        "ipo_sum": (x / beta - 1 / (2 * beta)) ** 2,
        "ipo_mean": ((pc - rc) / nc - (pr - rr) / nr - 1 / (2 * beta)) ** 2,
        "robust": ((1 - e) * cost(x) - e * cost(-x)) / (1 - 2 * e),
        "simpo": (1 - e) * cost(s) + e * cost(-s),
        "orpo": cost(math.log(odds[0] / odds[1])),
        "sft": -pc / nc,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "smoothing", "loss"),
    [("sigmoid", 0.0, 0.598139), ("sigmoid", 0.1, 0.618139), ("robust", 0.1, 0.573139), ("hinge", 0.0, 0.8)],
)
def test_g34_kinds_with_a_reference(kind: str, smoothing: float, loss: float) -> None:
    value, metrics = _golden([(kind, 1.0)], label_smoothing=smoothing)
    assert value == pytest.approx(loss, abs=5e-7)
    assert {name: metric.item() for name, metric in metrics.items()} == pytest.approx(METRICS)


def test_g34_reference_free() -> None:
    assert _golden([("sigmoid", 1.0)], reference=(0.0, 0.0))[0] == pytest.approx(0.513015, abs=5e-7)


def test_g34_simpo() -> None:
    assert _golden([("simpo", 1.0)], beta=2.0, gamma=1.0)[0] == pytest.approx(1.313262, abs=5e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["sigmoid", "robust"])
def test_g34_the_reference_itself_costs_log_two(kind: str, smoothing: float) -> None:
    value, metrics = _golden([(kind, 1.0)], reference=(-10.0, -14.0), label_smoothing=smoothing)
    assert value == pytest.approx(math.log(2)) and metrics["rewards/accuracies"].item() == 0.0


def test_g35_ipo_of_sums_and_of_means_are_two_losses() -> None:
    assert _golden([("ipo_sum", 1.0)])[0] == pytest.approx(9.0)
    assert _golden([("ipo_mean", 1.0)])[0] == pytest.approx(21.688980, abs=5e-7)


def test_orpo_is_the_nll_of_the_chosen_and_a_weighted_odds_ratio() -> None:
    # mean log-prob -2 of both: equal odds, log 2
    assert _golden([("sft", 1.0), ("orpo", 0.1)])[0] == pytest.approx(2.0 + 0.1 * math.log(2))


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "simpo", "orpo"])
def test_identical_branches_give_log_two_and_no_gradient(kind: str) -> None:
    policy = torch.tensor([-4.0, -9.0], dtype=torch.float64, requires_grad=True)
    side = _side(policy, torch.tensor([-3.0, -8.5], dtype=torch.float64), torch.tensor([4.0, 6.0]))
    value, _ = preference_loss(side, side, losses=[(kind, 1.0)], beta=0.1, label_smoothing=0.1, gamma=0.0, num_pairs=2)
    value.backward()
    assert value.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(policy.grad, torch.zeros_like(policy), atol=1e-15, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_random_pairs_agree_with_plain_formulas_and_finite_differences(kind: str) -> None:
    chosen, rejected, *rest = _batch()
    expected = sum(_plain(kind, *row) for row in zip(*(x.tolist() for x in (chosen, rejected, *rest)), strict=True))
    assert _loss((chosen, rejected), rest, [(kind, 1.0)], 11).item() == pytest.approx(expected / 11, rel=1e-12)
    assert torch.autograd.gradcheck(lambda c, r: _loss((c, r), rest, [(kind, 1.0)], 11), (chosen, rejected))


@pytest.mark.parametrize("kind", sorted(REFERENCE_FREE))
def test_reference_free_kinds_do_not_read_the_reference(kind: str) -> None:
    chosen, rejected, *rest = _batch()
    none = [torch.full_like(x, math.nan) for x in rest[:2]] + rest[2:]
    value = _loss((chosen, rejected), none, [(kind, 1.0)], 9)
    value.backward()
    assert value.isfinite() and chosen.grad.isfinite().all()


def test_a_weighted_list_is_the_weighted_sum() -> None:
    chosen, rejected, *rest = _batch()
    mixed = _loss((chosen, rejected), rest, [("sigmoid", 0.7), ("ipo_mean", 0.2), ("sft", 1.5)], 9)
    apart = [_loss((chosen, rejected), rest, [(kind, 1.0)], 9) for kind in ("sigmoid", "ipo_mean", "sft")]
    torch.testing.assert_close(mixed, 0.7 * apart[0] + 0.2 * apart[1] + 1.5 * apart[2])


@pytest.mark.parametrize("kind", KINDS)
def test_g5_preference_losses_add_up_over_micro_batches(kind: str, check_additive) -> None:
    chosen, rejected, *rest = _batch()
    leaves = [chosen] if kind == "sft" else [chosen, rejected]

    def share(rows: Tensor) -> Tensor:
        return _loss((chosen[rows], rejected[rows]), [x[rows] for x in rest], [(kind, 1.0)], 9)

    check_additive(share, leaves, torch.arange(9))


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logprobs_stay_finite(kind: str) -> None:
    chosen = torch.tensor([-1e4, 0.0, -1e-9, -1e4, 0.0], requires_grad=True)
    rejected = torch.tensor([0.0, -1e4, -1e-8, -1e4, 0.0], requires_grad=True)
    rest = [torch.tensor([0.0, -1e4, 0.0, 0.0, 0.0]), torch.tensor([-1e4, 0.0, 0.0, 0.0, 0.0])] + [torch.ones(5)] * 2
    value = _loss((chosen, rejected), rest, [(kind, 1.0)], 5)
    value.backward()
    gradients = [leaf.grad for leaf in (chosen, rejected) if leaf.grad is not None]
    assert value.dtype == torch.float32 and value.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
