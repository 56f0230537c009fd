"""Who made the first error of a failed trace, found by something else than the values of its prefixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import Role
from mas_hpc.agents.template import ChatTemplate
from mas_hpc.credit_assignment.error_localization import Fault, fault_by_arithmetic, fault_by_scores
from mas_hpc.credit_assignment.llm_judge import JUDGES, Judged, Judgement, Style
from mas_hpc.errors import ConfigError
from mas_hpc.orchestration.episode import Steps
from mas_hpc.orchestration.events import serve_all
from mas_hpc.orchestration.sampling import derive_seed
from mas_hpc.rollout.engine import Request, SamplingParams
from mas_hpc.run import Run
from mas_hpc.types import Task, Trace

Localizer = Literal["value", "checks", "prm", "all_at_once", "step_by_step", "binary"]
Scores = Sequence[Sequence[Mapping[int, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """What a localizer found in some traces.

    Example: Located(faults=[None, fault], unparseable=1)
    """

    faults: list[Fault | None]
    """One a trace."""
    unparseable: int = 0
    """Replies of a judge that could not be read; they count neither as a fault nor as none."""


def find_faults(run: Run, traces: Sequence[Trace], localizer: Localizer, scores: Scores) -> Located:
    """Look at the failed traces; `scores` are a process reward model's, for prm. Raises ConfigError for a judge without words.

    `value` finds nothing here: the values of prefixes are asked for with the credit.
    """
    if localizer in ("value", "checks", "prm"):
        return Located(faults=[None if trace.reward else _fault(trace, n, localizer, scores) for n, trace in enumerate(traces)])
    failed = [number for number, trace in enumerate(traces) if not trace.reward]
    judged = _judged(run, [traces[number] for number in failed], JUDGES[localizer])  # type: ignore[index]
    faults: list[Fault | None] = [None] * len(traces)
    for number, verdict in zip(failed, judged, strict=True):
        faults[number] = verdict.fault
    return Located(faults=faults, unparseable=sum(verdict.unparseable for verdict in judged))


def _fault(trace: Trace, number: int, localizer: Localizer, scores: Scores) -> Fault | None:
    if localizer == "checks":
        return fault_by_arithmetic(trace.path, trace.task.question)
    return fault_by_scores(trace.path, [list(steps.values()) for steps in scores[number]]) if localizer == "prm" else None


def _judged(run: Run, traces: Sequence[Trace], judge: Style) -> list[Judged]:
    """The verdicts of the team's first critic, or of its first agent, greedily; it is not shown the right answer."""
    if not isinstance(run.team.template, ChatTemplate):
        raise ConfigError("--localizer: the tiny model cannot judge in words; expected value, checks or prm")
    critics = [agent for agent in run.team.agents.values() if agent.role.produces == "verdict"]
    policy = (critics or list(run.team.agents.values()))[0].policy

    def ask(prompt: str) -> Request:
        role = Role(name="auditor", produces="text", letter="?", prompt="Reply in the lines that are asked for.")
        agent = Agent(
            name="auditor", role=role, policy=policy, sees="question", max_new_tokens=run.config.rollout.max_new_tokens
        )
        ids = run.team.template.opening(Task(id="", question=prompt, answer=""), agent)
        sampling = SamplingParams(
            max_new_tokens=agent.max_new_tokens, temperature=0.0, stop_ids=run.team.template.stop_ids
        )  # fmt: skip
        seed = derive_seed(run.config.seed, "auditor", prompt)
        return Request(prompt_ids=ids, prompt_spans=(("", len(ids)),), policy=policy, seed=seed, sampling=sampling)

    def steps(judgement: Judgement) -> Steps[Judged]:
        try:
            prompts = next(judgement)
            while True:
                replies = yield [ask(prompt) for prompt in prompts]
                prompts = judgement.send([reply.text for reply in replies])
        except StopIteration as end:
            return end.value

    return serve_all(run.engine, [steps(judge(trace.path, trace.task.question)) for trace in traces])
