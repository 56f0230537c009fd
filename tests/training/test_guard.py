"""A step that is not finite is skipped whole; several in a row go back to a checkpoint once, and then end the run."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from mas_hpc.config_methods import ATGRPOConfig
from mas_hpc.distributed.ddp import DataParallel
from mas_hpc.distributed.world import World
from mas_hpc.errors import RunError
from mas_hpc.models.adapters import AdapterBank
from mas_hpc.training.guard import Guard
from mas_hpc.training.learner import Learner
from mas_hpc.training.methods import policy_objective
from mas_hpc.training.network import Network
from mas_hpc.training.online import mean
from mas_hpc.training.share import Totals

METHOD = ATGRPOConfig(steps=10, learning_rate=1e-2, warmup_steps=0, max_skipped=2)
POLICY = policy_objective(METHOD, kl_coefficient=0.0, max_length=10)


def batches(make_samples):
    """A batch that can be learnt from, and the same with one advantage that is not a number."""
    good = [replace(sample, columns={}) for sample in make_samples()]
    return good, [replace(good[0], advantage=math.nan), *good[1:]]


def states(learner: Learner) -> list[torch.Tensor]:
    """Everything that a step changes."""
    optimizer = learner._trained.optimizer
    moments = [value for parameter in learner.trained for value in optimizer.state[parameter].values()]
    return [*(parameter.detach() for parameter in learner.trained), *moments]


def update(learner: Learner, batch) -> dict[str, float]:
    return learner.update(batch, POLICY, Totals.of(batch))


def test_a_step_that_is_not_finite_leaves_weights_optimizer_and_schedule_alone(make_model, make_samples) -> None:
    good, bad = batches(make_samples)
    disturbed, straight = (Learner(Network(model=make_model()), DataParallel(World()), METHOD) for _ in range(2))
    update(disturbed, good), update(straight, good)
    before = copy.deepcopy(states(disturbed))
    metrics = update(disturbed, bad)
    assert metrics["skipped_steps"] == 1.0 and math.isnan(metrics["grad_norm"]) and "learning_rate" not in metrics
    assert all(torch.equal(old, new) for old, new in zip(before, states(disturbed), strict=True))
    after, expected = update(disturbed, good), update(straight, good)
    assert after == expected and "skipped_steps" not in after
    assert all(torch.equal(x, y) for x, y in zip(states(disturbed), states(straight), strict=True))


def test_one_policy_without_a_finite_gradient_skips_the_step_of_all(make_model, make_samples) -> None:
    base = make_model()
    bank = AdapterBank.install(base, ["a", "b"], rank=2, alpha=4.0, target_modules=("q_proj",), seed=0)
    learner = Learner(Network(model=base, bank=bank), DataParallel(World()), METHOD)
    good, bad = batches(make_samples)
    update(learner, good)
    before = copy.deepcopy(states(learner))
    metrics = update(learner, bad)
    assert math.isnan(metrics["grad_norm"]) and math.isnan(metrics["grad_norm/a"]) and metrics["skipped_steps"] == 1.0
    assert all(torch.equal(old, new) for old, new in zip(before, states(learner), strict=True))


def test_without_a_checkpoint_too_many_in_a_row_are_an_error_that_names_the_learning_rate(make_model, make_samples) -> None:
    good, bad = batches(make_samples)
    learner = Learner(Network(model=make_model()), DataParallel(World()), METHOD)
    for batch in (bad, good, bad):
        update(learner, batch)  # never two in a row
    told = r"step 4: gradient norms \{'shared': nan\}, loss nan: .* 2 steps in a row.*no checkpoint.*learning rate \(0.01\)"
    with pytest.raises(RunError, match=told):
        update(learner, bad)


def test_the_last_checkpoint_is_gone_back_to_once(make_model, make_samples) -> None:
    _, bad = batches(make_samples)
    learner = Learner(Network(model=make_model()), DataParallel(World()), METHOD)
    checkpoints = iter([4, 6, 6])
    learner.guard.restore = lambda: next(checkpoints)
    found = [update(learner, bad) for _ in range(4)]
    assert [metrics.get("restored", 0.0) for metrics in found] == [0.0, 1.0, 0.0, 1.0], "another checkpoint, another chance"
    update(learner, bad)
    with pytest.raises(RunError, match="checkpoint of step 6 once before; lower the learning rate"):
        update(learner, bad)


def test_a_limit_of_one_ends_the_run_at_the_first() -> None:
    with pytest.raises(RunError, match="diverged 1 steps in a row"):
        Guard(1, 0.1).skipped("step 1: loss nan")


def test_skipped_updates_of_a_batch_are_counted_not_averaged() -> None:
    learned = [{"loss": 1.0}, {"loss": 3.0, "skipped_steps": 1.0}, {"loss": 2.0, "skipped_steps": 1.0, "restored": 1.0}]
    assert mean(learned) == {"loss": 2.0, "skipped_steps": 2.0, "restored": 1.0}
