"""Scripted teams with planted faults: behaviours, and what everybody is worth in closed form.

An agent's skill is a table of probabilities over what it reads, so an episode is a Markov chain over `State`. The scripts draw
from that chain and `chance_right` sums over it; nothing of the replays or estimators that are measured is used here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from random import Random
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mas_hpc.agents.agent import Agent
from mas_hpc.agents.role import ROLES
from mas_hpc.agents.template import ChatTemplate
from mas_hpc.orchestration.episode import Team
from mas_hpc.orchestration.topology import Pipeline
from mas_hpc.rollout.engine import BASE_POLICY, Request
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.types import Task, Turn

ValueFunction = Literal["removal", "replacement", "masked", "resample"]
INSTRUCTIONS = {"solver": "Solve", "critic": "Check", "reviser": "Revise", "verifier": "Verify"}
NUM_LOOPED, MAX_ROUNDS = 2, 2
"""After a rejection by the verifier, reviser and verifier speak once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that matters of a transcript.

    Example: State(answer=True, rejected=True) after a right answer that some verdict since then rejects
    """

    answer: bool | None = None
    """Whether the latest answer is right; None before the first."""
    rejected: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """Probability of a right answer by what is read.

    Example: Answering(fresh=0.6) solves 60% of what nobody has answered; everything else it keeps as it is
    """

    fresh: float
    accepted_right: float = 1.0
    accepted_wrong: float = 0.0
    rejected_right: float = 1.0
    rejected_wrong: float = 0.0

    def chance(self, state: State) -> float:
        """Of a right answer."""
        if state.answer is None:
            return self.fresh
        if state.rejected:
            return self.rejected_right if state.answer else self.rejected_wrong
        return self.accepted_right if state.answer else self.accepted_wrong

    def after(self, state: State, happens: bool) -> State:
        """The state that a right or wrong answer leads to."""
        return State(answer=happens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """Probability of a rejection by the truth of the latest answer; an absent answer counts as wrong.

    Example: Judging(rejects_right=0.0, rejects_wrong=1.0) is an oracle
    """

    rejects_right: float
    rejects_wrong: float

    def chance(self, state: State) -> float:
        """Of a rejection."""
        return self.rejects_right if state.answer else self.rejects_wrong

    def after(self, state: State, happens: bool) -> State:
        """The state that a rejection or an acceptance leads to; an earlier rejection stands."""
        return replace(state, rejected=state.rejected or happens)


Skill = Answering | Judging


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantedTeam:
    """Who can do what, and who is at fault.

    Example: HEALTHY.with_fault("lazy verifier", "verifier", Judging(rejects_right=0.0, rejects_wrong=0.0))
    """

    name: str
    skills: tuple[tuple[str, Skill], ...]
    """By agent, in the order in which they speak; reviser and verifier are the last two."""
    culprit: str | None = None

    @property
    def agents(self) -> tuple[str, ...]:
        """Names in the order in which they speak."""
        return tuple(name for name, _ in self.skills)

    def with_fault(self, name: str, culprit: str, skill: Skill) -> PlantedTeam:
        """This team with one agent's skill replaced, who is the culprit."""
        skills = tuple((agent, skill if agent == culprit else own) for agent, own in self.skills)
        return PlantedTeam(name=name, skills=skills, culprit=culprit)


HEALTHY = PlantedTeam(
    name="healthy",
    skills=(
        ("solver", Answering(fresh=0.4)),
        ("critic", Judging(rejects_right=0.05, rejects_wrong=0.85)),
        ("reviser", Answering(fresh=0.1, accepted_right=1.0, accepted_wrong=0.0, rejected_right=0.1, rejected_wrong=0.9)),
        ("verifier", Judging(rejects_right=0.05, rejects_wrong=0.4)),
    ),
)
BASE: Mapping[str, Skill] = {
    "solver": Answering(fresh=0.3),
    "critic": Judging(rejects_right=0.5, rejects_wrong=0.5),
    "reviser": Answering(fresh=0.3, accepted_right=0.8, accepted_wrong=0.1, rejected_right=0.4, rejected_wrong=0.3),
    "verifier": Judging(rejects_right=0.5, rejects_wrong=0.5),
}
"""Skills of the base policy by role, which stands in for absent agents under replacement."""
_ORACLE = Judging(rejects_right=0.0, rejects_wrong=1.0)
SABOTEUR = HEALTHY.with_fault("saboteur", "reviser", Answering(fresh=0.0, accepted_right=0.1, rejected_right=0.1))
LAZY = HEALTHY.with_fault("lazy verifier", "verifier", Judging(rejects_right=0.0, rejects_wrong=0.0))
MISLEADING = HEALTHY.with_fault("misleading critic", "critic", Judging(rejects_right=0.9, rejects_wrong=0.1))
ORACLE = replace(HEALTHY.with_fault("oracle critic", "critic", _ORACLE), culprit=None)
TWIN = PlantedTeam(name="redundant twin", skills=(ORACLE.skills[0], ("critic", _ORACLE), ("twin", _ORACLE), *ORACLE.skills[2:]))
TEAMS = (HEALTHY, SABOTEUR, LAZY, MISLEADING, ORACLE, TWIN)


# ---- closed form


@cache
def chance_right(skills: tuple[tuple[str, Skill], ...], state: State, place: int) -> float:
    """Probability that the team of `skills` ends with a right answer, from `state` after `place` messages."""
    names = [name for name, _ in skills]
    looped = skills[-NUM_LOOPED:] if names[-NUM_LOOPED:] == ["reviser", "verifier"] else ()
    ended = place == len(skills) and not (looped and state.rejected)
    if ended or place == len(skills) + NUM_LOOPED * (MAX_ROUNDS - 1):
        return float(state.answer is True)
    skill = (*skills, *looped)[place][1]
    chance = skill.chance(state)
    return sum(
        weight * chance_right(skills, skill.after(state, happens), place + 1)
        for weight, happens in ((chance, True), (1.0 - chance, False))
        if weight
    )


def prefix_chance(planted: PlantedTeam, path: Sequence[Turn], length: int) -> float:
    """Probability that the whole team succeeds from the first `length` messages of a path."""
    return chance_right(planted.skills, state_after(path[:length]), length)


def coalition_chance(planted: PlantedTeam, present: frozenset[str], value: ValueFunction, path: Sequence[Turn] = ()) -> float:
    """v(present) in closed form; masked and resample are of a recorded path, whose outcome is v(everybody)."""
    alone = tuple((name, skill) for name, skill in planted.skills if name in present)
    if value == "removal":
        return chance_right(alone, State(), 0)
    if value == "replacement":
        skills = tuple((name, skill if name in present else BASE[role_of(name)]) for name, skill in planted.skills)
        return chance_right(skills, State(), 0)
    kept = next((place for place, turn in enumerate(path) if turn.agent not in present), len(path))
    state = state_after(path[:kept])
    if kept == len(path):
        return float(state.answer is True)
    return chance_right(planted.skills if value == "resample" else alone, state, kept)


def shapley_by_orders(players: Sequence[str], worth: Callable[[frozenset[str]], float]) -> dict[str, float]:
    """Shapley values by their definition: the mean marginal contribution over all n! orders."""
    orders = list(permutations(players))
    totals = dict.fromkeys(players, 0.0)
    known = cache(worth)
    for order in orders:
        for place, player in enumerate(order):
            totals[player] += known(frozenset(order[: place + 1])) - known(frozenset(order[:place]))
    return {player: total / len(orders) for player, total in totals.items()}


def exact_credit(planted: PlantedTeam, value: ValueFunction, path: Sequence[Turn] = ()) -> dict[str, float]:
    """The Shapley values that an estimator should find."""
    return shapley_by_orders(planted.agents, lambda present: coalition_chance(planted, present, value, path))


def state_after(path: Sequence[Turn]) -> State:
    """The state that recorded turns lead to; their truth must have been judged."""
    state = State()
    for turn in path:
        if turn.verdict is None:
            state = State(answer=turn.truth)
        elif not turn.verdict:
            state = replace(state, rejected=True)
    return state


def role_of(name: str) -> str:
    """A twin is a second critic."""
    return "critic" if name == "twin" else name


# ---- scripts: text, team, engine


def tasks(count: int, *, start: int = 0) -> tuple[Task, ...]:
    """Sums that are asked in words."""
    numbers = [(11 + number % 80, 13 + (7 * number) % 70) for number in range(start, start + count)]
    return tuple(
        Task(id=f"sum/{start + place}", question=f"What is {a} and {b} together?", answer=str(a + b))
        for place, (a, b) in enumerate(numbers)
    )


def answer_text(left: int, right: int, *, is_right: bool, rng: Random) -> str:
    """One step and the answer. Half of the wrong steps are false equalities, half true ones about another sum."""
    if is_right:
        return f"{left} + {right} = {left + right}\n\\boxed{{{left + right}}}"
    slip = rng.randrange(1, 10)
    misread = rng.random() < 0.5
    return f"{left} + {right + slip * misread} = {left + right + slip}\n\\boxed{{{left + right + slip}}}"


def verdict_text(rejects: bool) -> str:
    """As the roles of verdicts are told to end."""
    return f"I have checked it. VERDICT: {'INCORRECT' if rejects else 'CORRECT'}"


_SAID = re.compile(r"\\boxed\{(\d+)\}|VERDICT: (IN)?CORRECT")
_QUESTION = re.compile(r"What is (\d+) and (\d+) together")


def read_prompt(text: str) -> tuple[State, int, int]:
    """The state that a prompt shows, and the two numbers of its question."""
    found = _QUESTION.search(text)
    assert found, text
    left, right = int(found[1]), int(found[2])
    state = State()
    for number, rejection in _SAID.findall(text):
        if number:
            state = State(answer=int(number) == left + right)
        elif rejection:
            state = replace(state, rejected=True)
    return state, left, right


def _words() -> Iterator[str]:
    """Every token that a script or a prompt can hold."""
    yield from map(str, range(400))
    yield from " \n.?:+={}\\"
    yield from ["What", "is", "and", "together", "boxed", "I", "have", "checked", "it", "VERDICT", "CORRECT", "INCORRECT"]
    yield from INSTRUCTIONS.values()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words and numbers are tokens; with a chat template."""
    special = ("<|user|>", "<|assistant|>", "<|end|>")
    vocabulary = {token: index for index, token in enumerate((*_words(), *special))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<none>"))  # absent, so it raises
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w]"), behavior="isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|end|>", additional_special_tokens=list(special[:2]),
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer.encode = cache(tokenizer.encode)  # a few hundred texts, encoded some 100,000 times
    return tokenizer


def build_team(planted: PlantedTeam, tokenizer: PreTrainedTokenizerFast) -> Team:
    """The planted agents as a pipeline whose verifier may send back once; each has its own policy."""
    agents = {
        name: Agent(
            name=name, role=ROLES[role_of(name)], policy=name, sees="transcript", max_new_tokens=40,
            prompt=INSTRUCTIONS[role_of(name)],
        )
        for name in planted.agents
    }  # fmt: skip
    topology = Pipeline(agents=planted.agents, num_looped=NUM_LOOPED, max_rounds=MAX_ROUNDS)
    return Team(agents=agents, topology=topology, template=ChatTemplate(tokenizer))


def build_engine(planted: PlantedTeam, tokenizer: PreTrainedTokenizerFast) -> ScriptedEngine:
    """An engine that draws every completion from the skills, by the seed of the request."""
    skills = dict(planted.skills)
    roles = {instruction: role for role, instruction in INSTRUCTIONS.items()}

    @cache
    def read(prompt_ids: tuple[int, ...]) -> tuple[State, int, int, str]:
        prompt = tokenizer.decode(prompt_ids)
        return *read_prompt(prompt), roles[prompt.rsplit("<|user|>")[-1].removesuffix("<|end|><|assistant|>").split()[-1]]

    def behave(request: Request) -> str:
        state, left, right, role = read(request.prompt_ids)
        skill = BASE[role] if request.policy == BASE_POLICY else skills[request.policy]
        rng = Random(request.seed)
        happens = rng.random() < skill.chance(state)
        if isinstance(skill, Judging):
            return verdict_text(rejects=happens)
        return answer_text(left, right, is_right=happens, rng=rng)

    return ScriptedEngine(behave, tokenizer)
