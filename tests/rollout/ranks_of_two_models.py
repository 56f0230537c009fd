"""Run by test_sharded_ranks on each rank: load the models that it owns, play jobs that need both, write all results."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mas_hpc.distributed.tickets import open_tickets
from mas_hpc.distributed.transport import open_transport
from mas_hpc.distributed.world import World, connected
from mas_hpc.models.attention import prepare
from mas_hpc.orchestration.events import drive
from mas_hpc.rollout.engine import Completion, Request, RolloutEngine, SamplingParams
from mas_hpc.rollout.native.engine import NativeEngine
from mas_hpc.rollout.placement import ServedModel, place
from mas_hpc.rollout.router import RoutedEngine
from mas_hpc.rollout.sharded import ShardedEngine

MODELS = tuple(ServedModel(name=name, policies=(name,), num_parameters=1, turns=1) for name in ("alpha", "beta"))
JOBS = 12
TIMEOUT_S = 60.0


def episode(job: int) -> Generator[list[Request], list[Completion], list[Completion]]:
    """Four siblings of one policy, then one answer of the other policy to each of them; lengths differ."""
    first, second = ("alpha", "beta") if job % 2 else ("beta", "alpha")
    opening = (1 + job, 2, 3)
    tried = yield [request(opening, (("", 3),), first, seed=10 * job + i, length=3 + 7 * (i % 3)) for i in range(4)]
    prompts = [(*opening, *completion.token_ids, 5) for completion in tried]
    answered = yield [
        request(prompt, (("", 3), (first, len(prompt) - 4), ("", 1)), second, seed=10 * job + 4 + i, length=6)
        for i, prompt in enumerate(prompts)
    ]
    return [*tried, *answered]


def request(prompt: tuple[int, ...], spans: tuple[tuple[str, int], ...], policy: str, *, seed: int, length: int) -> Request:
    sampling = SamplingParams(max_new_tokens=length, stop_ids=(0,))
    return Request(prompt_ids=prompt, prompt_spans=spans, policy=policy, seed=seed, sampling=sampling)


def to_json(completions: list[Completion]) -> bytes:
    return json.dumps([asdict(completion) | {"wall_s": 0.0} for completion in completions]).encode()


def local_engine(folder: Path, policies: tuple[str, ...]) -> RolloutEngine:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    own: dict[str, RolloutEngine] = {}
    for policy in policies:
        model = AutoModelForCausalLM.from_pretrained(folder / policy, dtype=torch.float64)
        own[policy] = NativeEngine(prepare(model.eval()), tokenizer, max_rows=8)
    return RoutedEngine(None, own)


def play(engine: RolloutEngine, world: World, label: str) -> list[bytes]:
    tickets = open_tickets(world, label, JOBS, stall_s=TIMEOUT_S)
    drive(engine, tickets, episode, lambda job, found: tickets.finish(job, to_json(found)), max_live=4)
    return tickets.results()


def main(folder: Path) -> None:
    with connected(World.from_env()) as world:
        placement = place(MODELS, ranks=world.size, mode="sharded", hosts=world.hosts)
        policies = placement.policies_of(world.rank)
        transport = open_transport(world, timeout_s=TIMEOUT_S)
        engine = ShardedEngine(local_engine(folder, policies), placement, transport, stall_s=TIMEOUT_S)
        play(engine, world, "first")
        engine.load(version=1)  # ranks are not in step here
        results = play(engine, world, "second")
        transport.close()
        written = {"policies": policies, "results": [json.loads(result) for result in results]}
        (folder / f"{world.launcher}{world.rank}.json").write_text(json.dumps(written))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
