"""Two real ranks take the same steps as one process under every strategy: losses, gradient norms and final weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.distributed.launch import environment, launcher
from tests.distributed.strategy_ranks import CASES, OTHERS

SCRIPT = Path(__file__).with_name("strategy_ranks.py")
RELATIVE = 1e-5
"""Of a metric to its value, of a tensor to its norm, and of a weight to the largest of its tensor: both runs are in float32."""
OF_FEW = 1e-4
"""AdamW divides a gradient by its own size: where it is rounding, in one weight of a hundred, so is the step. Seen on AMD: 3e-5
under ddp, 1.5e-5 of ranks that share layers."""
OF_ADAPTERS = 5e-3
"""As OF_FEW, in one of ten of B: it starts at zero, so its largest is no larger than a few steps."""
OF_BFLOAT16 = 3e-2
TIMEOUT_S = 900
ROUGH = [case for case in CASES if "bfloat16" in case]
CUT = [case for case in CASES if "qwen3" in case or "biased" in case or "noise" in case]
"""What ranks that share layers do in their own way, or what others draw anew on every rank."""
EXACT = [case for case in CASES if case not in (*ROUGH, *CUT, "first", "sft_adafactor")]
TORCH = ("ddp", "fsdp2", "hsdp_2x1")
"""As many ranks a copy as there are (1 x 2) is what fsdp2 does by itself."""
DEEPSPEED = ("zero1", "zero2", "zero3")
FEW = ("sft_passes", "at_grpo_adapters")
FEW_OFFLINE = ("sft_passes", "rm_adapters")
OFFLOADED = ("fsdp2_offload", "zero2_offload", "zero3_offload")


def run(command: Sequence[str], folder: Path, model: Path, strategies: Sequence[str], cases: Sequence[str]) -> None:
    words = [*command, str(SCRIPT), str(folder), str(model), ",".join(strategies), ",".join(cases)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, env=environment())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that every case starts from; beside it OTHERS."""
    folder = tmp_path_factory.mktemp("first")
    model = folder / "ddp" / "first" / "model"
    run([sys.executable], folder, model, ("ddp",), ("first",))
    tied = AutoModelForCausalLM.from_pretrained(model)
    untied = LlamaForCausalLM(type(tied.config).from_dict(tied.config.to_dict() | {"tie_word_embeddings": False}))
    untied.load_state_dict(tied.state_dict())
    with torch.no_grad():
        untied.lm_head.weight.mul_(1.1)
    others = {"untied": untied, **made(tied.config)}
    assert others.keys() == set(OTHERS)
    for name, other in others.items():
        other.save_pretrained(model.with_name(name))
        AutoTokenizer.from_pretrained(model).save_pretrained(model.with_name(name))
    return model


def made(config: LlamaConfig) -> dict[str, PreTrainedModel]:
    """Of the size of a model, and untrained; their biases are not zero."""
    size = {
        name: getattr(config, name)
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings", "eos_token_id")
    }
    torch.manual_seed(2)
    qwen3 = Qwen3ForCausalLM(
        Qwen3Config(
            **size,
            vocab_size=config.vocab_size + 1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=True,
        )
    )
    biases = {"attention_bias": True, "mlp_bias": True, "num_attention_heads": 4, "pad_token_id": 1, "bos_token_id": None}
    biased = LlamaForCausalLM(LlamaConfig(**size, vocab_size=config.vocab_size, **biases))
    for name, parameter in biased.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return {"qwen3": qwen3, "biased": biased}


@pytest.fixture(scope="module")
def alone(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by one process."""
    folder = tmp_path_factory.mktemp("one")
    run([sys.executable], folder, first, ("ddp",), (*EXACT, *CUT, *ROUGH))
    return folder / "ddp"


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    named = ("loss", "grad_norm", "tokens", "entropy", "kl", "rewards/margins", "value/error")
    found = [{name: line[name] for name in named if name in line} for line in lines]
    return [line for line in found if line]


def weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.relative_to(folder)}:{name}": tensor for f in files for name, tensor in load_file(f).items()}


def assert_same_metrics(one: Path, two: Path, *, relative: float) -> None:
    first, second = metrics(one), metrics(two)
    assert len(first) == len(second) >= 3
    for before, after in zip(first, second, strict=True):
        assert after == pytest.approx(before, rel=relative, abs=1e-6 if relative == RELATIVE else 0.01), two


def assert_same(one: Path, two: Path) -> None:
    assert_same_metrics(one, two, relative=RELATIVE)
    expected, found = weights(one), weights(two)
    assert expected.keys() == found.keys() and expected
    for name, tensor in expected.items():
        apart = (tensor - found[name]).abs() / tensor.abs().max()
        most, share = (OF_ADAPTERS, 0.1) if "lora_" in name else (OF_FEW, 0.01)
        assert "lora_" in name or (tensor - found[name]).norm() <= RELATIVE * tensor.norm(), (two, name)
        assert apart.max() <= most, (two, name)
        assert (apart > RELATIVE).sum() <= share * apart.numel(), (two, name)


@pytest.mark.slow
def test_the_cases_train_what_they_are_meant_to(first: Path, alone: Path) -> None:
    """Weights move by more than is allowed between runs, and passes are as many as their names say."""
    start = weights(first)
    for case in ("sft", "dpo", "at_grpo"):
        moved = weights(alone / case / "model")
        assert all((moved[name] - tensor).abs().max() > 10 * RELATIVE * tensor.abs().max() for name, tensor in start.items())


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one_with_torch(first: Path, alone: Path, tmp_path: Path) -> None:
    run(launcher("torchrun", 2), tmp_path, first, TORCH, EXACT)
    for strategy in TORCH:
        for case in EXACT:
            assert_same(alone / case, tmp_path / strategy / case)


@pytest.mark.slow
def test_ranks_that_read_their_parts_of_the_files_train_what_those_with_whole_weights_train(
    first: Path, alone: Path, tmp_path: Path
) -> None:  # fmt: skip
    """Bit for bit: the model, the head and the adapters that are saved, and every metric."""
    cases = ("sft_one_rank", "sft_passes", "sft_adapters", "rm", "rm_adapters", "dpo", "sft_untied")
    kinds = {"": cases, "_bfloat16": ("sft_passes", "dpo"), "_offload": FEW_OFFLINE}
    for kind, of_kind in kinds.items():
        run(launcher("torchrun", 2), tmp_path, first, (f"fsdp2{kind}", f"fsdp2_parts{kind}"), of_kind)
        for case in of_kind:
            whole, parts = tmp_path / f"fsdp2{kind}" / case, tmp_path / f"fsdp2_parts{kind}" / case
            assert metrics(whole) == metrics(parts) != []
            expected, found = weights(whole), weights(parts)
            assert expected.keys() == found.keys() and expected
            assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == [], case
    for case in cases:
        assert_same(alone / case, tmp_path / "fsdp2_parts" / case)


@pytest.mark.slow
def test_two_ranks_that_share_every_layer_take_the_steps_of_one(first: Path, alone: Path, tmp_path: Path) -> None:
    parts = (*FEW_OFFLINE, "sft_adapters", "dpo", "sft_untied", *CUT)
    held = {
        ("tensor",): (*EXACT, *CUT),
        ("tensor_fsdp2",): (*FEW, "rm", "dpo_passes", "ppo", "at_grpo_passes", *CUT),
        ("tensor_parts",): parts,
        ("tensor_fsdp2_offload",): FEW,
    }
    for strategies, cases in held.items():
        run(launcher("torchrun", 2), tmp_path, first, strategies, cases)
        for strategy in strategies:
            for case in cases:
                assert_same(alone / case, tmp_path / strategy / case)


@pytest.mark.slow
def test_four_ranks_in_pairs_that_share_layers_take_the_steps_of_one(first: Path, alone: Path, tmp_path: Path) -> None:
    held = {
        ("tensor", "tensor_fsdp2", "tensor_hsdp_2x1"): (*FEW, "sft_one_rank", "dpo_qwen3"),
        ("tensor_parts", "tensor_fsdp2_parts"): FEW_OFFLINE,
    }
    for strategies, cases in held.items():
        run(launcher("torchrun", 4), tmp_path, first, strategies, cases)
        for strategy in strategies:
            for case in cases:
                assert_same(alone / case, tmp_path / strategy / case)


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one_with_deepspeed(first: Path, alone: Path, tmp_path: Path) -> None:
    cases = [case for case in EXACT if case != "rm_untied"]  # whose LM head no loss reaches: ZeRO lets it decay
    run(launcher("torchrun", 2), tmp_path, first, DEEPSPEED, cases)
    for strategy in DEEPSPEED:
        for case in cases:
            assert_same(alone / case, tmp_path / strategy / case)


@pytest.mark.slow
def test_what_is_kept_in_the_memory_of_the_host_takes_the_same_steps(first: Path, alone: Path, tmp_path: Path) -> None:
    run(launcher("torchrun", 2), tmp_path, first, OFFLOADED, FEW)
    for strategy in OFFLOADED:
        for case in FEW:
            assert_same(alone / case, tmp_path / strategy / case)


@pytest.mark.slow
def test_deepspeed_finds_its_rank_under_mpiexec(first: Path, alone: Path, tmp_path: Path) -> None:
    run(launcher("mpiexec", 2), tmp_path, first, ("zero2",), ("sft_passes",))
    assert_same(alone / "sft_passes", tmp_path / "zero2" / "sft_passes")


@pytest.mark.slow
def test_bfloat16_passes_and_weights_stay_near(first: Path, alone: Path, tmp_path: Path) -> None:
    passes = ("sft_passes", "sft_adapters", "rm")
    computing = ("fsdp2_bfloat16", "tensor_fsdp2_bfloat16")
    run(launcher("torchrun", 2), tmp_path, first, computing, passes)
    for strategy in computing:
        for case in passes:
            assert_same_metrics(alone / case, tmp_path / strategy / case, relative=OF_BFLOAT16)
            saved = weights(tmp_path / strategy / case)
            assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    held = {("fsdp2", "tensor"): ROUGH, ("zero2", "zero3"): ["sft_bfloat16"]}
    for strategies, cases in held.items():
        run(launcher("torchrun", 2), tmp_path, first, strategies, cases)
        for strategy in strategies:
            assert_same_metrics(alone / cases[0], tmp_path / strategy / cases[0], relative=OF_BFLOAT16)
