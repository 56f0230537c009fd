"""A finished run whose team is played by a script, so that its faults are known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mas_hpc.data.tasks import load_tasks
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.rollout.engine import Completion, Request
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.rollouts import how_to_play, play_all
from mas_hpc.run import Run
from mas_hpc.types import Trace
from tests.phases.conftest import opened

FAILED = Completion(token_ids=(), logprobs=(), text="", finish="error", error="prompt is longer than the context")


class Scripted:
    """Speaks for the team: an agent is right, wrong by one digit, or repeats the answer that it has read last."""

    def __init__(self, run: Run, says: Mapping[str, Callable[[Request], str]]) -> None:
        train, test = load_tasks(run.config.data)
        self._answers = {task.compact: task.answer for task in (*train, *test)}
        self._decode = run.tokenizer.decode
        self._agents = {agent.role.letter: name for name, agent in run.team.agents.items()}
        self._says = says

    def __call__(self, request: Request) -> str:
        prompt = self._decode(request.prompt_ids)
        agent = self._agents[prompt[-1]]
        if agent in ("critic", "verifier"):
            return "===+"
        sums = prompt.rpartition("Q")[2][:3]
        right = self._answers[sums]
        read = prompt.removesuffix(f"Q{sums}R").rpartition("S")[2][:3] if agent == "reviser" and "S" in prompt else right
        wrong = f"{(int(right[0]) + 1) % 4}{right[1:]}"
        return {"right": right, "wrong": wrong, "repeats": read}[self._says[agent](request)]


def always(**says: str) -> Mapping[str, Callable[[Request], str]]:
    return {agent: (lambda request, word=word: word) for agent, word in says.items()}


def often(request: Request) -> str:
    """Right in one of two."""
    return ("right", "wrong")[hashlib.blake2b(f"{request.seed}".encode(), digest_size=1).digest()[0] % 2]


def spoken_for(run: Run, says: Mapping[str, Callable[[Request], str]], *, fails: Callable[[Request], bool] | None = None):
    """The run with a script instead of its model, and the engine that counts."""
    script = Scripted(run, says)
    engine = ScriptedEngine(lambda request: FAILED if fails and fails(request) else script(request), run.tokenizer)
    return replace(run, engine=engine), engine


def record(folder: Path, says: Mapping[str, Callable[[Request], str]], label: str = "rollout") -> list[Trace]:
    """Traces of a scripted team in place of the model's."""
    run, _ = spoken_for(opened(folder), says)
    (folder / "traces" / f"{label}.jsonl").unlink(missing_ok=True)
    _, tasks = load_tasks(run.config.data)
    return play_all(run, tasks, how_to_play(run, Sampling(temperature=1.0), 0), label=label)


HONEST = always(solver="right", reviser="repeats")
CORRUPTED = always(solver="wrong", reviser="repeats")
VARYING = {"solver": often, "reviser": lambda request: "right" if request.seed % 3 else "repeats"}


def lines_of(folder: Path, run: str, name: str) -> list[Any]:
    """Rows that a credit run of that name has written; none where it wrote no file."""
    file = folder / "credit" / run / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
