"""What vLLM's engine refuses, how it lives beside a trainer, and a model of the world."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mas_hpc.config import EvaluationConfig, ModelConfig, RolloutConfig, RunConfig
from mas_hpc.errors import ConfigError
from mas_hpc.models.load import load_model
from mas_hpc.models.smollm2 import cache_folder
from mas_hpc.rollout.engine import Request, SamplingParams
from mas_hpc.rollout.native.engine import NativeEngine
from mas_hpc.rollout.saved_model import save_for_serving
from mas_hpc.rollout.vllm import check, vllm_engine

from .conftest import small_model, vllm_config
from .test_vllm import asked, assert_logprobs_are

# ---- what cannot be served; none of this needs vLLM


def test_speaker_scope_is_refused():
    with pytest.raises(ConfigError, match=r"adapters.scope=speaker: .* set adapters.scope=sequence"):
        check(vllm_config(policies="per_agent", scope="speaker"))


def test_float64_is_refused():
    with pytest.raises(ConfigError, match=r"model.dtype=float64"):
        check(vllm_config().model_copy(update={"model": ModelConfig(dtype="float64")}))


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"rollout": RolloutConfig(temperature=0.001)}, "rollout.temperature=0.001"),
        ({"evaluation": EvaluationConfig(temperatures=(0.0, 0.002))}, r"evaluation.temperatures\[1\]=0.002"),
    ],
)
def test_temperatures_below_what_vllm_samples_are_refused(section, key):
    with pytest.raises(ConfigError, match=key):
        check(vllm_config().model_copy(update=section))


def test_a_machine_without_vllm_is_told_what_to_install(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"rollout.engine=vllm: .* pip install 'mas-hpc\[vllm\]'"):
        vllm_engine(vllm_config(), tmp_path, tokenizer, {})


def test_ranks_without_kernels_are_refused():
    with pytest.raises(ConfigError, match=r"adapters.rank=513: vLLM has kernels up to rank 512"):
        check(vllm_config(policies="per_agent", rank=513))


def test_a_folder_without_model_is_named(needs_vllm, tokenizer, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"vLLM cannot serve {tmp_path}"):
        vllm_engine(vllm_config(), tmp_path, tokenizer, {})


def test_the_default_tiny_model_is_told_that_its_heads_are_too_narrow(needs_vllm, tmp_path: Path):
    config = vllm_config()
    folder, _ = save_for_serving(*load_model(config.model, seed=0), None, tmp_path)
    with pytest.raises(ConfigError, match=r"attention heads are 16 wide, on a CPU expected one of \[32, "):
        vllm_engine(config, folder, load_model(config.model, seed=0)[1], {})


# ---- beside a trainer


def test_the_end_of_an_engine_takes_no_process_group_with_it(vllm_plain, tokenizer, tmp_path):
    folder, _ = save_for_serving(small_model(), tokenizer, None, tmp_path)
    engine = vllm_engine(vllm_config(), folder, tokenizer, {})
    core = weakref.ref(engine._engine.engine_core)
    del engine
    gc.collect()
    assert core() is None, "weights and keys and values are freed"
    assert torch.distributed.is_initialized()
    assert len(vllm_plain.generate(asked(count=2))) == 2


RANK = """
import sys
from pathlib import Path
import torch
from transformers import AutoTokenizer
from mas_hpc.distributed.world import World, connected
from mas_hpc.rollout.engine import Request, SamplingParams
from mas_hpc.config import RolloutConfig, RunConfig
from mas_hpc.rollout.vllm import vllm_engine

folder = Path(sys.argv[1])
config = RunConfig(rollout=RolloutConfig(engine="vllm", kv_gib=0.02, max_rows=8))
with connected(World.from_env()) as world:
    engine = vllm_engine(config, folder, AutoTokenizer.from_pretrained(folder), {})
    sampling = SamplingParams(max_new_tokens=4 + 8 * world.rank)
    asked = [Request(prompt_ids=(1, 2, 3), prompt_spans=(("", 3),), policy="", seed=i, sampling=sampling) for i in range(3)]
    done = [engine.generate(asked[: 1 + 2 * world.rank]) for _ in range(1 + world.rank)][0]
    total = torch.tensor(sum(len(completion.token_ids) for completion in done))
    torch.distributed.all_reduce(total)
    assert total.item() == 4 + 3 * 12, total
"""


@pytest.mark.slow
def test_ranks_of_torchrun_have_engines_of_their_own(needs_vllm, tokenizer, tmp_path):
    folder, _ = save_for_serving(small_model(), tokenizer, None, tmp_path)
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "rank.py"), str(folder)], cwd=Path(__file__).parents[2], capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr


# ---- a model of the world


@pytest.mark.slow
def test_smollm2_is_served_as_transformers_and_the_native_engine_run_it(needs_vllm):
    folder = cache_folder() / "model"
    if not folder.is_dir():
        pytest.skip(f"no SmolLM2 at {folder}")
    config = RunConfig(model=ModelConfig(path=str(folder)), rollout=RolloutConfig(engine="vllm", kv_gib=0.75))
    model, tokenizer = load_model(config.model, seed=0)
    texts = ["What is 12 + 30?", "Name the capital of France.", "Count from 1 to 20 and then say why one would."]
    prompts = [tuple(tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")) for text in texts]

    def asked_at(temperature: float) -> list[Request]:
        sampling = SamplingParams(
            max_new_tokens=24, temperature=temperature, top_p=0.9 if temperature else 1.0, stop_ids=(tokenizer.eos_token_id,)
        )
        spans = [(("", len(prompt)),) for prompt in prompts]
        return [
            Request(prompt_ids=prompt, prompt_spans=span, policy="shared", seed=seed, sampling=sampling)
            for seed, (prompt, span) in enumerate(zip(prompts, spans, strict=True))
        ]

    engine = vllm_engine(config, folder, tokenizer, {})
    for ours, theirs in zip(
        NativeEngine(model, tokenizer).generate(asked_at(0.0)), engine.generate(asked_at(0.0)), strict=True
    ):
        assert theirs.token_ids == ours.token_ids
        assert theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-4)
        assert (theirs.text, theirs.finish) == (ours.text, ours.finish)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert_logprobs_are(plain, asked_at(0.7), engine.generate(asked_at(0.7)))
