"""Ranks that have parts of a model alone: how much memory it takes to read them, and going on from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mas_hpc.models.load import _tiny_tokenizer
from tests.distributed.launch import run_ranks
from tests.distributed.parts_ranks import NOISE
from tests.phases.resuming import assert_same_run, assert_same_weights, train

SCRIPT = str(Path(__file__).with_name("parts_ranks.py"))

TIMEOUT_S = 500
"""Of a few small runs, which take less than a minute on cores that nobody shares."""

pytestmark = pytest.mark.slow


def saved_model(folder: Path, *, hidden_size: int, num_layers: int) -> float:
    """Save a model of the tiny vocabulary and return its size in MiB."""
    tokenizer = _tiny_tokenizer()
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=num_layers,
        num_attention_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(shape)
    model.save_pretrained(folder, max_shard_size="40MB")
    tokenizer.save_pretrained(folder)
    return model.num_parameters() * 4 / 2**20


def test_no_rank_has_the_whole_model_in_memory(tmp_path: Path) -> None:
    """What was read, and the pages of the files that it was read from, against two copies: one that serves, one to be cut."""
    whole = saved_model(tmp_path / "model", hidden_size=512, num_layers=10)
    done = run_ranks("torchrun", 2, SCRIPT, "peaks", str(tmp_path / "model"), str(tmp_path), timeout_s=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        print(f"rank {rank}: model {whole:.0f} MiB, grown by {found}")
        assert found["parts"] < 0.9 * whole
        assert found["whole"] > 1.8 * whole


def test_a_run_of_parts_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    saved_model(tmp_path / "model", hidden_size=32, num_layers=2)
    done = run_ranks("torchrun", 2, SCRIPT, "resume", str(tmp_path / "model"), str(tmp_path), timeout_s=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(tmp_path / "whole" / "sft", tmp_path / "sft")
    assert_same_weights(tmp_path / "from_ddp", tmp_path / "sft", tolerance=1e-6)
    train(tmp_path / "alone", "sft", f"model.path={tmp_path / 'model'}")
    assert_same_weights(tmp_path / "alone" / "sft", tmp_path / "sft", tolerance=1e-5)


def test_ranks_that_share_layers_go_on_as_if_they_had_never_stopped(tmp_path: Path) -> None:
    model = f"model.path={tmp_path / 'model'}"
    saved_model(tmp_path / "model", hidden_size=32, num_layers=2)
    train(tmp_path, "sft", model, "name=from_one", stop=("train", 2))
    done = run_ranks("torchrun", 2, SCRIPT, "tensor", str(tmp_path / "model"), str(tmp_path), timeout_s=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(tmp_path / "whole" / "sft", tmp_path / "sft")
    assert_same_weights(tmp_path / "whole" / "at_grpo", tmp_path / "at_grpo", tolerance=1e-5)
    train(tmp_path, "sft", model, "name=to_one", resume=True)
    train(tmp_path / "alone", "sft", model)
    for name in ("sft", "from_one", "to_one", "to_ddp", "from_fsdp2"):
        assert_same_weights(tmp_path / "alone" / "sft", tmp_path / name, tolerance=1e-5)
    train(tmp_path, "sft", model, NOISE, "name=from_ddp_alone", resume=True)  # both draw the noise of one share anew
    assert_same_weights(tmp_path / "from_ddp_alone", tmp_path / "from_ddp", tolerance=1e-5)
