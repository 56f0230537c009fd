"""The engine for accelerators: vLLM in this process, with paged keys and values, prefix caching and an adapter per request.

vLLM serves a copy of the model that was saved to a folder, and changes only by `load`. Its step is this engine's step.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mas_hpc.checksum import Checksum
from mas_hpc.config import RunConfig
from mas_hpc.errors import CheckpointError, ConfigError
from mas_hpc.models.adapters import CONFIG_FILE, WEIGHTS_FILE
from mas_hpc.rollout.engine import BASE_POLICY, Completion, Request, RolloutEngine, RolloutStats, Weights
from mas_hpc.rollout.refusals import unknown_policy, unservable
from mas_hpc.rollout.saved_model import Shapes, check_dtype, check_shape, shapes_in

STEPS_PER_POLL = 16
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM has kernels for; an adapter is padded to the next."""
CPU_BLOCK = 32
"""Tokens of a block of keys and values on a CPU: its kernels want a multiple of 32; prefixes are shared by whole blocks."""
COLDEST = 0.01
"""vLLM raises lower temperatures to this one, so their log-probs would not be those that were asked for."""
LOGPROBS = "processed_logprobs"
"""Of the distribution that is sampled from. vLLM's default, raw_logprobs, is that before temperature and truncation."""


def vllm_engine(
    config: RunConfig, model_folder: Path, tokenizer: PreTrainedTokenizerBase, policies: Mapping[str, Path]
) -> VLLMEngine:
    """Start vLLM on a saved model; `policies` maps each to its PEFT adapter's folder, and is empty without adapters.

    Both are what `save_for_serving` wrote and may be removed afterwards.
    Raises ConfigError without vLLM, and for what it cannot serve: speaker scope, float64, ranks beyond 512, temperatures
    between 0 and COLDEST, and whatever vLLM itself refuses, such as the head size of the default tiny model on a CPU.
    """
    check(config)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine=vllm: vLLM is not installed; run: pip install 'mas-hpc[vllm]' "
            "(on a machine without accelerator: make test-vllm shows how), or set rollout.engine=native"
        )
    with _random_state_kept():
        engine = _start(config, model_folder, policies)
    shapes: Shapes = {}
    for file in sorted(model_folder.glob("*.safetensors")):
        shapes |= shapes_in(file)
    return VLLMEngine(engine, tokenizer, policies=policies, parameters=shapes)


def check(config: RunConfig) -> None:
    """Raise ConfigError for what vLLM cannot serve, as far as the configuration tells; needs no vLLM."""
    if config.adapters.policies == "per_agent" and config.adapters.scope == "speaker":
        raise ConfigError(
            "adapters.scope=speaker: vLLM adapts all tokens of a sequence alike; set adapters.scope=sequence, or "
            "rollout.engine=native"
        )
    if config.model.dtype == "float64":
        raise ConfigError("model.dtype=float64: vLLM serves float32 and bfloat16; choose one, or set rollout.engine=native")
    if config.adapters.policies == "per_agent" and config.adapters.rank > LORA_RANKS[-1]:
        raise ConfigError(f"adapters.rank={config.adapters.rank}: vLLM has kernels up to rank {LORA_RANKS[-1]}; lower it")
    temperatures = {"rollout.temperature": config.rollout.temperature}
    temperatures |= {f"evaluation.temperatures[{i}]": value for i, value in enumerate(config.evaluation.temperatures)}
    for key, temperature in temperatures.items():
        if _too_cold(temperature):
            raise ConfigError(f"{key}={temperature:g}: {_COLD}")


def _start(config: RunConfig, model_folder: Path, policies: Mapping[str, Path]) -> Any:
    """vLLM's LLMEngine in this process, whatever its environment variables say."""
    from vllm import EngineArgs, LLMEngine
    from vllm.platforms import current_platform
    from vllm.v1.executor import Executor

    logging.getLogger("vllm").setLevel(logging.ERROR)
    on_cpu = current_platform.is_cpu()
    extra: dict[str, Any] = {}
    if policies:
        rank = next(known for known in LORA_RANKS if known >= config.adapters.rank)
        # Its CPU kernels read slot -1, the last, for tokens of the base model: one more slot, which stays empty, is the last.
        extra |= {"enable_lora": True, "max_loras": len(policies) + on_cpu, "max_lora_rank": rank}
    if on_cpu:
        # Its CPU runner cannot wind back the generator of a seeded request whose prompt is prefilled in chunks, its
        # compilation takes minutes, and its blocks of 128 tokens would share little.
        extra |= {"enable_chunked_prefill": False, "enforce_eager": True, "block_size": CPU_BLOCK}
    try:
        settings = EngineArgs(
            model=str(model_folder), tokenizer=str(model_folder), dtype=config.model.dtype,
            trust_remote_code=config.model.trust_remote_code, seed=config.seed, generation_config="vllm",
            max_num_seqs=config.rollout.max_rows, kv_cache_memory_bytes=int(config.rollout.kv_gib * 2**30),
            enable_prefix_caching=True, logprobs_mode=LOGPROBS, disable_log_stats=True,
            use_tqdm_on_load=False, **extra,
        ).create_engine_config()  # fmt: skip
        settings.parallel_config.distributed_executor_backend = "uni"
        if on_cpu:
            _check_head_size(settings.model_config.get_head_size())
        engine = LLMEngine(settings, Executor.get_class(settings), log_stats=False, multiprocess_mode=False)
    except (ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(f"rollout.engine=vllm: vLLM cannot serve {model_folder} ({reason})") from error
    logging.getLogger("vllm").setLevel(logging.ERROR)  # again: with its engine vLLM has set up its own
    # At the engine's end it would destroy the default process group, which may be the trainer's; what it has frozen would
    # never be collected. Without either, the engine is freed like any object.
    engine.engine_core._finalizer.detach()
    gc.unfreeze()
    return engine


def _check_head_size(width: int) -> None:
    """Raise ValueError when vLLM's CPU kernels do not know the width; they would fail at the first request."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    known = CPUAttentionBackend.get_supported_head_sizes()
    if width not in known:
        raise ValueError(f"its attention heads are {width} wide, on a CPU expected one of {known}; see model.num_heads of tiny")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """A request that vLLM works on."""

    request: Request
    since: float


class VLLMEngine(RolloutEngine):
    """Serves completions of a model that vLLM holds; made by `vllm_engine`.

    `engine` is vLLM's LLMEngine, in this process. Adapters cover prompt and completion; without any, the model serves every
    policy. `parameters` are the names and shapes of the model's weights as they were saved. The keys and values of equal
    prefixes (of one adapter) are shared and kept for later requests until there is no room, in blocks of vLLM's size.
    """

    def __init__(
        self, engine: Any, tokenizer: PreTrainedTokenizerBase, *, policies: Mapping[str, Path],
        parameters: Shapes,
    ) -> None:  # fmt: skip
        assert engine.model_config.logprobs_mode == LOGPROBS, "the importance ratio would compare other distributions"
        self._engine, self._tokenizer = engine, tokenizer
        self._context_limit: int = engine.model_config.max_model_len
        self._dtype: torch.dtype = engine.model_config.dtype
        self._tied: bool = engine.model_config.hf_config.tie_word_embeddings
        self._parameters = dict(parameters)
        self._adapters = _Adapters(engine, policies)
        self._pending: dict[int, _Pending] = {}
        self._refused: list[tuple[int, Completion]] = []
        self._version = 0
        self._diverged = False
        self._stats = RolloutStats()
        core = engine.engine_core.engine_core
        self._kv_usage = core.scheduler.kv_cache_manager
        self._kv_bytes = sum(tensor.size for tensor in core.scheduler.kv_cache_config.kv_cache_tensors)

    @property
    def stats(self) -> RolloutStats:
        """Totals since the engine was made; vLLM does not tell what it evicts, and neither pads nor keeps finished rows."""
        return self._stats

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Queue requests; one that cannot be served ends with finish="error".

        Raises RolloutError, and queues none, when the engine has no adapter of a request's policy.
        """
        adapters = [self._adapters.of(request.policy) for request in requests]
        first = self._stats.requests
        for number, (request, adapter) in enumerate(zip(requests, adapters, strict=True), first):
            refusal = unservable(request, self._context_limit)
            if _too_cold(request.sampling.temperature):
                refusal = f"temperature={request.sampling.temperature:g}: {_COLD}"
            if refusal:
                self._refused.append((number, self._failure(refusal)))
                continue
            self._pending[number] = _Pending(request=request, since=time.perf_counter())
            (prompt,) = self._engine.renderer.render_cmpl([{"prompt_token_ids": list(request.prompt_ids)}])
            self._engine.add_request(str(number), prompt, _sampling(request), lora_request=adapter)
        self._count(requests=len(requests), prompt_tokens=sum(len(request.prompt_ids) for request in requests))
        return list(range(first, self._stats.requests))

    def poll(self) -> list[tuple[int, Completion]]:
        """Work for at most STEPS_PER_POLL steps, or until a request ends; return what has ended."""
        ended, self._refused = self._refused, []
        wall_s, cpu_s, steps = time.perf_counter(), time.process_time(), 0
        with _random_state_kept():
            while self._pending and not ended and steps < STEPS_PER_POLL:
                outputs = self._engine.step()
                self._note_kv()
                ended += [self._complete(output) for output in outputs if output.finished]
                steps += 1
        self._count(steps=steps, wall_s=time.perf_counter() - wall_s, cpu_s=time.process_time() - cpu_s)
        return ended

    def cancel(self) -> None:
        """Forget what is outstanding."""
        self._engine.abort_request([str(number) for number in self._pending])
        self._pending.clear()
        self._refused.clear()

    def load(self, *, version: int, weights: Weights | None = None) -> str:
        """Serve `weights` as `version`; without any, what it serves already: a copy that shares nothing with the trainer.

        Of BASE_POLICY all parameters of the model have to come, of another policy all tensors of its adapter. A tensor is
        copied before the next one is asked for. Returns the checksum of what came.
        Raises CheckpointError when names, shapes or dtypes are not those of the model; the engine cannot be used then.
        """
        assert not self._pending and not self._refused, "load while requests are outstanding"
        total = Checksum()
        adapters: dict[str, dict[str, Tensor]] = {}
        base = self._sort_out(weights or (), adapters, total)
        first = next(base, None)
        if first is not None:
            # Reloaded layer by layer: each is packed for its kernels again as soon as all its parts are there.
            rest = chain([first], base)
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": rest})
            assert next(base, None) is None, "vLLM has not read all weights"
        for policy, tensors in adapters.items():
            self._adapters.replace(policy, tensors)
        if not self._engine.reset_prefix_cache():
            raise CheckpointError("vLLM still reads keys and values of the old weights; load when no request is outstanding")
        if self._diverged:
            self._engine.collective_rpc(_wipe_kv)
        self._version, self._diverged = version, False
        return str(total)

    def _sort_out(
        self, weights: Weights, adapters: dict[str, dict[str, Tensor]], total: Checksum
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield copies of the base model's tensors, put those of adapters aside; complain of names that are missing."""
        missing = set(self._parameters)
        for policy, name, tensor in weights:
            held = tensor.detach().clone()
            total.add(policy, name, held)
            if policy != BASE_POLICY:
                adapters.setdefault(policy, {})[name] = held
                continue
            if not (self._tied and name == "lm_head.weight"):
                check_shape(f"the base model: {name}", tuple(held.shape), self._parameters.get(name))
                check_dtype(name, held, self._dtype)
            missing.discard(name)
            yield name, held
        if 0 < len(missing) < len(self._parameters):
            raise CheckpointError(
                f"weights of the base model: {len(missing)} are missing, such as {sorted(missing)[:3]}; vLLM keeps several in "
                "one tensor, so send all parameters of the model"
            )

    def _complete(self, output: Any) -> tuple[int, Completion]:
        number = int(output.request_id)
        pending = self._pending.pop(number)
        (answer,) = output.outputs
        token_ids, logprobs = tuple(answer.token_ids), tuple(answer.logprobs.logprobs)
        finite = next((i for i, logprob in enumerate(logprobs) if not math.isfinite(logprob)), len(logprobs))
        assert len(token_ids) == len(logprobs), "a token has no log-prob"
        self._count_tokens(len(pending.request.prompt_ids), output.num_cached_tokens, len(token_ids))
        completion = Completion(
            token_ids=token_ids[:finite], logprobs=logprobs[:finite], finish=answer.finish_reason,
            text=self._tokenizer.batch_decode([list(token_ids[:finite])], skip_special_tokens=True)[0],
            policy_version=self._version, wall_s=time.perf_counter() - pending.since,
        )  # fmt: skip
        if finite < len(logprobs):
            self._diverged = True
            reason = f"logits are not finite after {finite} tokens: model diverged"
            completion = replace(completion, finish="error", error=reason)
        return number, completion

    def _failure(self, reason: str) -> Completion:
        return Completion(
            token_ids=(), logprobs=(), text="", finish="error", error=reason, policy_version=self._version
        )  # fmt: skip

    def _count_tokens(self, prompt: int, cached: int | None, decoded: int) -> None:
        later = decoded - 1  # the first token is the prefill's
        self._count(
            prefilled_tokens=prompt - (cached or 0), decoded_tokens=decoded, row_steps=later,
            real_keys=later * prompt + later * (later + 1) // 2,
        )  # fmt: skip

    def _note_kv(self) -> None:
        held = round(self._kv_usage.usage * self._kv_bytes)
        self._stats = replace(self._stats, peak_kv_bytes=max(self._stats.peak_kv_bytes, held))

    def _count(self, **added: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + value for name, value in added.items()})


class _Adapters:
    """The adapters that vLLM serves: by policy, and under another number for every version."""

    def __init__(self, engine: Any, policies: Mapping[str, Path]) -> None:
        self._engine = engine
        self._numbers = count(1)
        self._shapes = {policy: shapes_in(folder / WEIGHTS_FILE) for policy, folder in policies.items()}
        self._scratch = tempfile.TemporaryDirectory(prefix="mas_hpc-vllm-")
        """vLLM reads an adapter again when it has dropped it, as it does when the base model changes."""
        self._served: dict[str, Any] = {}
        for policy, folder in policies.items():
            self._serve(policy, folder / CONFIG_FILE, load_file(folder / WEIGHTS_FILE))

    def of(self, policy: str) -> Any:
        """vLLM's LoRARequest of a policy; None is the base model. Raises RolloutError for a policy without adapter."""
        if not self._served or policy == BASE_POLICY:
            return None
        if policy not in self._served:
            raise unknown_policy(policy, self._served)
        return self._served[policy]

    def replace(self, policy: str, tensors: Mapping[str, Tensor]) -> None:
        """Serve these tensors as the policy's adapter. Raises CheckpointError when they are not all of it."""
        if policy not in self._served:
            raise CheckpointError(
                f"weights of policy {policy!r}: the engine has adapters of {sorted(self._served)}; give both sides the same "
                "adapters.policies and team"
            )
        expected, found = self._shapes[policy], {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in sorted(expected.keys() | found.keys()):
            check_shape(f"policy {policy!r}: {name}", found.get(name), expected.get(name))
        served = self._served[policy]
        self._engine.remove_lora(served.lora_int_id)  # first, so that its slot is taken and the spare one stays empty
        self._serve(policy, Path(served.lora_path) / CONFIG_FILE, tensors)
        shutil.rmtree(served.lora_path)

    def _serve(self, policy: str, config: Path, tensors: Mapping[str, Tensor]) -> None:
        """Register under a new number and name: prefixes are shared by name, adapters are kept by number."""
        from vllm.lora.request import LoRARequest

        number = next(self._numbers)
        folder = Path(self._scratch.name) / str(number)
        folder.mkdir()
        shutil.copyfile(config, folder / CONFIG_FILE)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
        self._served[policy] = LoRARequest(f"{policy}-{number}", number, str(folder))
        self._engine.add_lora(self._served[policy])


_COLD = f"vLLM samples no colder than {COLDEST:g} and would raise it; set 0 for greedy, or at least {COLDEST:g}"


def _too_cold(temperature: float) -> bool:
    return 0 < temperature < COLDEST


def _wipe_kv(worker: Any) -> None:
    """What is not finite must go: kernels multiply the unused rest of a block by 0, which does not hide nan."""
    for cache in worker.model_runner.kv_caches:
        cache.zero_()


def _sampling(request: Request) -> Any:
    """vLLM's SamplingParams: one final answer, only our stops, the log-prob of each sampled token and no others."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    ours = request.sampling
    return SamplingParams(
        max_tokens=ours.max_new_tokens, temperature=ours.temperature, top_p=ours.top_p, top_k=ours.top_k,
        seed=request.seed & 0xFFFFFFFF, stop_token_ids=list(ours.stop_ids), stop=list(ours.stop_strings), ignore_eos=True,
        detokenize=bool(ours.stop_strings), logprobs=0, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """vLLM seeds the generators of the process when it starts and draws from them as it samples; the trainer's go on."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
