"""Ranks that each have a part of every layer play what one process with the whole model plays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from mas_hpc.config_file import load_config
from mas_hpc.data import trace_store
from mas_hpc.distributed.tensor_layers import TensorGroup
from mas_hpc.distributed.world import World
from mas_hpc.errors import ConfigError
from mas_hpc.loading import sharing
from mas_hpc.models.load import _tiny_tokenizer
from mas_hpc.types import Trace
from tests.distributed.launch import MPIEXEC, run_ranks
from tests.phases.tensor_ranks import JOBS, ROOT, play

SCRIPT = str(Path(__file__).with_name("tensor_ranks.py"))
NEAR = 1e-5
"""In nats: sums are made of two halves."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped heads, and a vocabulary that two ranks cannot share equally; predictions are not all alike."""
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    tokenizer = _tiny_tokenizer()
    torch.manual_seed(3)
    made = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer) + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.1,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for job in JOBS:
        play(World(), job, str(model), folder)
    return folder


def ranks(name: str, size: int, model: Path, folder: Path, *jobs: str) -> None:
    done = run_ranks(name, size, SCRIPT, str(model), str(folder), *jobs, timeout_s=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def traces(folder: Path, label: str) -> tuple[list[Trace], list[float]]:
    """In the order of the tasks, without times and log-probs; and the log-probs."""
    parts = trace_store.parts(folder / "traces", label)
    found = sorted((trace for part in parts for trace in trace_store.read(part)), key=lambda trace: trace.task.id)
    timeless = [
        replace(trace, turns=tuple(replace(turn, wall_s=0.0, behavior_logprobs=()) for turn in trace.turns)) for trace in found
    ]
    return timeless, [logprob for trace in found for turn in trace.turns for logprob in turn.behavior_logprobs]


def assert_same_traces(one: Path, two: Path, label: str) -> None:
    expected, found = traces(one, label), traces(two, label)
    assert found[0] == expected[0] != []
    assert found[1] == pytest.approx(expected[1], abs=NEAR)


def credited(folder: Path) -> tuple[list[dict[str, object]], dict[str, int]]:
    """What every message of the rollout earned, and what the replays have cost."""
    lines = (folder / "credit" / "shapley-masked" / "traces.jsonl").read_text().splitlines()
    summary = json.loads((folder / "credit" / "shapley-masked" / "summary.json").read_text())
    return sorted((json.loads(line) for line in lines), key=lambda entry: entry["task"]), summary["requests"]


def held(folder: Path, rank: int) -> dict[str, float]:
    return json.loads((folder / f"held_{rank}.json").read_text())


@pytest.mark.slow
def test_two_ranks_write_what_one_writes_with_half_of_the_weights_and_of_the_keys(
    model: Path, alone: Path, tmp_path: Path
) -> None:  # fmt: skip
    ranks("mpiexec" if MPIEXEC.exists() else "torchrun", 2, model, tmp_path, *JOBS)
    for job in ("rollout", "crowded", "models"):
        assert_same_traces(alone / job, tmp_path / job, "rollout")
        whole = held(alone / job, 0)
        for rank in range(2):
            part = held(tmp_path / job, rank)
            assert 0.5 * whole["bytes"] <= part["bytes"] < 0.55 * whole["bytes"], (job, rank)
    assert held(alone / "crowded", 0)["evicted"] > 0 < held(tmp_path / "crowded", 0)["evicted"]
    for rank in range(2):
        assert held(tmp_path / "rollout", rank)["peak_kv"] == held(alone / "rollout", 0)["peak_kv"] / 2
        for name in ("peak_kv", "evicted"):  # both have done the same
            assert held(tmp_path / "crowded", rank)[name] == held(tmp_path / "crowded", 0)[name]
    for name in ("accuracy", "name", "tokens_per_question", "repeated"):
        rows = [json.loads((folder / "evaluate" / "results.json").read_text())["rows"] for folder in (alone, tmp_path)]
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]], name
    assert len(rows[0]) > 2  # the team, and its controls
    assert_same_traces(alone / "credit", tmp_path / "credit", "train")
    assert credited(tmp_path / "rollout") == credited(alone / "rollout")


@pytest.mark.slow
def test_two_groups_of_ranks_share_out_the_episodes(model: Path, alone: Path, tmp_path: Path) -> None:
    ranks("torchrun", 4, model, tmp_path, "rollout")
    assert_same_traces(alone / "rollout", tmp_path / "rollout", "rollout")
    assert {file.name for file in (tmp_path / "rollout" / "traces").glob("rollout*")} == {
        "rollout.rank0.jsonl",
        "rollout.rank2.jsonl",
    }


def test_ranks_with_models_of_their_own_do_not_share_layers_besides() -> None:
    strategy = SimpleNamespace(tensor=TensorGroup(rank=0, size=2, group=None))  # type: ignore[arg-type]
    config = load_config(ROOT / "configs" / "mas.yaml", ["rollout.placement=sharded", "distributed.tensor_parallel=2"])
    with pytest.raises(ConfigError, match=r"placement=sharded: with distributed\.tensor_parallel=2 .* set it to auto or"):
        sharing(config, strategy)  # type: ignore[arg-type]
    vllm = load_config(ROOT / "configs" / "mas.yaml", ["rollout.engine=vllm", "distributed.tensor_parallel=2"])
    assert sharing(vllm, strategy) is None  # type: ignore[arg-type]  # each rank has a whole copy
