"""G42: the engine's log-probs are the trainer's, for whole episodes of a team, shared or with an adapter per agent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mas_hpc.config_file import load_config
from mas_hpc.credit_assignment.assign import to_samples
from mas_hpc.credit_assignment.at_grpo import GroupSettings, at_grpo
from mas_hpc.data.token_tree import pack
from mas_hpc.distributed.world import World
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.phases.training import warm_up
from mas_hpc.rollouts import how_to_play, play_all
from mas_hpc.run import build
from mas_hpc.training.share import Totals
from mas_hpc.types import Trace

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def with_credit(trace: Trace) -> Trace:
    """Every turn becomes a sample, also those without an advantage."""
    return replace(trace, turns=tuple(replace(turn, credit=1.0) for turn in trace.turns))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("adapters", ["shared", "sequence", "speaker"])
def test_g42_engine_and_trainer_give_the_same_logprobs(tmp_path: Path, adapters: str, temperature: float) -> None:
    per_agent = ["adapters.policies=per_agent", f"adapters.scope={adapters}"] if adapters != "shared" else []
    overrides = ["warm_start.steps=0", "model.hidden_size=32", "data.num_train=8", "data.num_test=4", f"runs_dir={tmp_path}"]
    config = load_config(CONFIG, [*overrides, *per_agent, "team.stop_when_accepted=false", "model.dtype=float64"])
    run = warm_up(build(config, World(), Console(quiet=True)))
    if run.bank:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for policy in run.bank.policies:
                for parameter in run.bank.parameters_of(policy):
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    how = how_to_play(run, Sampling(temperature=temperature, group_size=3), seed=1)
    traces = play_all(run, run.train_tasks, how, label="parity", keep=False)
    rewarded = [turn.reward for trace in traces for turn in trace.turns]
    assert len(rewarded) == 8 * 4 * 3
    credited = at_grpo(traces, GroupSettings(group_size=3, advantage="group_mean", agent_weights={}))
    samples = to_samples([with_credit(trace) for trace in credited])
    assert Totals.of(samples) == Totals(
        num_tokens=sum(len(turn.completion_ids) for trace in traces for turn in trace.turns), num_samples=len(rewarded)
    )
    tree = pack(samples, adapters=run.bank.index if run.bank else {}, scope=config.adapters.scope)
    network = run.network(temperature=temperature)
    with torch.no_grad(), network.run(tree) as outputs:
        logprob_N = outputs.logprob_N
    torch.testing.assert_close(logprob_N, tree.behavior_logprob_N.to(logprob_N), rtol=0, atol=1e-5)
    if run.bank:
        with torch.no_grad(), network.run(tree, base=True) as outputs:
            apart = (outputs.logprob_N - logprob_N).abs().max()
        assert apart > 0.1, "the adapters must matter for this test to mean anything"
