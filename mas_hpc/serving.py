"""What serves a run: the trainer's own weights, or vLLM's copy of them, which is renewed, acknowledged and checked."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mas_hpc.distributed.notes import from_first, tell_first
from mas_hpc.distributed.world import World
from mas_hpc.engines import assemble_engine
from mas_hpc.errors import ConfigError
from mas_hpc.models.load import model_folder
from mas_hpc.models.weights import named_weights
from mas_hpc.rollout.canary import Canary
from mas_hpc.rollout.engine import Completion, Request, RolloutEngine
from mas_hpc.rollout.saved_model import save_for_serving
from mas_hpc.rollout.vllm import vllm_engine
from mas_hpc.run import Run
from mas_hpc.types import BASE_POLICY, Sample

START_S = 1800.0
"""vLLM may take minutes to start, and other ranks wait for the one that saves the model."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15}
"""Nats by which log-probs of the same weights may differ between vLLM's kernels and ours."""
CANARY_TOKENS = 8


def serve(run: Run, version: int = 0) -> Run:
    """The run with the engine that the configuration names, serving the weights as they are now as `version`. Collective.

    Called once, when the warm start is over and the adapters are there. Raises ConfigError for what vLLM cannot serve.
    """
    if run.config.rollout.engine == "native":
        return run
    folder = run.folder / "serving"
    saved: tuple[Path, dict[str, Path]] | None = None
    if run.model is not None:
        if run.world.is_first:
            save_for_serving(run.model, run.tokenizer, run.bank, folder)
        from_first(run.world, "serving/saved", "yes", patience_s=START_S)
        policies = run.bank.policies if run.bank else ()
        saved = folder / "model", {policy: folder / "adapters" / policy for policy in policies}

    copies: dict[str, RolloutEngine] = {}

    def make(policy: str) -> RolloutEngine:
        if policy:  # a model of its own, which is never trained
            own = model_folder(run.config.model.model_copy(update={"path": run.config.team.models[policy]}))
            if own is None:
                raise ConfigError(
                    f"team.models.{policy}=tiny: it is built in code, and vLLM reads files; set rollout.engine=native"
                )
            copies[policy] = vllm_engine(run.config, own, run.tokenizer, {})
        else:
            assert saved is not None
            copies[policy] = vllm_engine(run.config, saved[0], run.tokenizer, saved[1])
        return copies[policy]

    with run.console.status("starting vLLM ..."):
        engine = assemble_engine(run.config, list(run.other_models), run.shards, make)
    engine.load(version=version)
    run = replace(run, engine=engine, copy=copies.get(""))
    check(run, version=version)
    tell_first(run.world, "serving/started", "yes", patience_s=START_S)
    if run.world.is_first:
        shutil.rmtree(folder, ignore_errors=True)
    return run


def push(run: Run, version: int) -> None:
    """Serve the weights that were trained as `version` from now on.

    The native engine reads the trainer's; vLLM's copy is given what was trained, by name, and then has to answer a canary as
    the trainer would. Raises RolloutError when it does not.
    """
    if run.config.rollout.engine == "native":
        run.engine.load(version=version)
        return
    trained = run.bank.policies if run.bank else (BASE_POLICY,)
    run.engine.load(version=version, weights=named_weights(run.model, run.bank, trained))
    check(run, version=version)


def check(run: Run, *, version: int) -> None:
    """Ask the engine for a few greedy tokens of every policy that is trained and compare its log-probs with the trainer's."""
    if run.copy is None:
        return
    policies = run.bank.policies if run.bank else ("shared",)
    tolerance = TOLERANCE.get(run.config.model.dtype)
    if tolerance is None:
        raise ConfigError(f"model.dtype={run.config.model.dtype}: vLLM serves {sorted(TOLERANCE)}; choose one of these")
    prompt_ids = tuple(run.tokenizer.encode("What is 6 x 7?", add_special_tokens=False)) or (0,)
    canary = Canary(prompt_ids=prompt_ids, num_tokens=CANARY_TOKENS, tolerance=tolerance)
    name = f"rank {run.world.rank}"
    canary.check(run.copy, name=name, version=version, policies=policies, score=lambda *asked: _score(run, *asked))


def _score(run: Run, requests: Sequence[Request], completions: Sequence[Completion]) -> list[Sequence[float]]:
    """The trainer's log-probs of what the engine wrote."""
    samples = [
        Sample(
            id=str(number), tree=str(number), agent=request.policy, policy=request.policy, prompt_ids=request.prompt_ids,
            prompt_spans=request.prompt_spans, completion_ids=completion.token_ids,
        )
        for number, (request, completion) in enumerate(zip(requests, completions, strict=True))
    ]  # fmt: skip
    scored = run.network().annotate(samples, World(), column="canary", read="logprob")
    return [sample.columns["canary"] for sample in scored]
