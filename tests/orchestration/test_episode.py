"""Episodes: who speaks, from which state, with which prompt; K siblings, one committed."""

from __future__ import annotations

from collections import Counter

import pytest

from mas_hpc.errors import RolloutError
from mas_hpc.evaluation.rewards import VerifiableJudge
from mas_hpc.orchestration.collect import collect
from mas_hpc.orchestration.episode import Play, Team
from mas_hpc.orchestration.replay import replay
from mas_hpc.orchestration.sampling import Sampling
from mas_hpc.orchestration.topology import Pipeline, Single
from mas_hpc.rollout.engine import Completion, Request
from mas_hpc.rollout.scripted import ScriptedEngine
from mas_hpc.types import Task, Trace, Turn

RIGHT, WRONG = "012", "111"


def lookup(request: Request) -> str:
    """Answers are right for even seeds; critics always reject, verifiers accept."""
    return {"solver": (RIGHT, WRONG)[request.seed % 2], "critic": "!!!-", "reviser": RIGHT, "verifier": "===+"}[request.policy]


def run(team: Team, task: Task, tokenizer, sampling: Sampling, behaviour=lookup, **options) -> tuple[Trace, ScriptedEngine]:
    engine = ScriptedEngine(behaviour, tokenizer)
    how = Play(team=team, sampling=sampling, judge=VerifiableJudge(break_penalty=0.5), seed=0)
    [trace] = collect(engine, [task], how, max_live=4, on_trace=options.get("on_trace", lambda trace: None))
    return trace, engine


def test_a_pipeline_speaks_in_order_and_each_prompt_continues_the_one_before(team: Team, task: Task, tokenizer) -> None:
    trace, _ = run(team, task, tokenizer, Sampling(temperature=1.0))
    assert [turn.agent for turn in trace.path] == ["solver", "critic", "reviser", "verifier"]
    for earlier, later in zip(trace.path, trace.path[1:], strict=False):
        assert later.parent == earlier.id
        state = earlier.prompt_ids + earlier.completion_ids
        assert later.prompt_ids[: len(state)] == state
        assert sum(length for _, length in later.prompt_spans) == len(later.prompt_ids)
    assert tokenizer.decode(trace.path[-1].prompt_ids) == f"Q132S{trace.path[0].text}{trace.path[0].text[0]}C!!!-Q132R0120V"
    assert (trace.answer, trace.reward) == (RIGHT, 1.0)


def test_the_verifier_sends_the_answer_back_at_most_max_rounds_times(team: Team, task: Task, tokenizer) -> None:
    script = {"solver": WRONG, "critic": "!!!-", "reviser": WRONG, "verifier": "!!!-"}
    trace, _ = run(team, task, tokenizer, Sampling(temperature=1.0), lambda request: script[request.policy])
    assert [turn.agent for turn in trace.path] == ["solver", "critic", *["reviser", "verifier"] * 2]
    assert trace.reward == 0.0


def test_siblings_share_a_state_and_one_is_committed(team: Team, task: Task, tokenizer) -> None:
    trace, engine = run(team, task, tokenizer, Sampling(temperature=1.0, group_size=4))
    assert len(engine.requests) == len(trace.turns) == 16
    for index in range(4):
        siblings = [turn for turn in trace.turns if turn.index == index]
        assert len({turn.prompt_ids for turn in siblings}) == 1 and len({turn.seed for turn in siblings}) == 4
        assert sum(turn.committed for turn in siblings) == 1
    assert len(trace.path) == 4


def test_a_random_sibling_is_committed_uniformly_and_best_takes_the_first_best(team: Team, task: Task, tokenizer) -> None:
    team = Team(agents=team.agents, topology=Single(agent="solver"), template=team.template)
    tasks = [Task(id=f"q{i}", question="modulo 4", answer=task.answer, compact=task.compact, grader="ring") for i in range(400)]
    engine = ScriptedEngine(lookup, tokenizer)

    def committed(commit: str) -> Counter[int]:
        how = Play(team=team, sampling=Sampling(temperature=1.0, group_size=4, commit=commit), judge=VerifiableJudge(), seed=0)
        traces = collect(engine, tasks, how, max_live=400, on_trace=lambda trace: None)
        for trace in traces if commit == "best" else []:
            assert trace.path[0].reward == max(turn.reward for turn in trace.turns)
        return Counter(trace.path[0].sibling for trace in traces)

    assert all(60 < count < 140 for count in committed("sampled").values())  # 100 each, 4.6 standard deviations
    assert committed("best")[3] < 60  # only when the first three are wrong: 1/16 or all four are: 1/16


def test_local_rewards_follow_the_truth(team: Team, task: Task, tokenizer) -> None:
    script = {"solver": RIGHT, "critic": "===+", "reviser": WRONG, "verifier": "===+"}
    trace, _ = run(team, task, tokenizer, Sampling(temperature=1.0), lambda request: script[request.policy])
    rewards = {turn.agent: (turn.truth, turn.local_reward) for turn in trace.path}
    assert rewards == {"solver": (True, 1.0), "critic": (True, 1.0), "reviser": (False, -0.5), "verifier": (False, 0.0)}


def test_an_unreadable_verdict_is_never_right(team: Team, task: Task, tokenizer) -> None:
    script = {"solver": WRONG, "critic": "!!!!", "reviser": RIGHT, "verifier": "===+"}
    trace, _ = run(team, task, tokenizer, Sampling(temperature=1.0), lambda request: script[request.policy])
    assert (trace.path[1].verdict, trace.path[1].local_reward) == (None, 0.0)


def test_team_rollouts_value_each_sibling_by_its_own_continuations(team: Team, task: Task, tokenizer) -> None:
    # The reviser copies the solver: a sibling's team reward is then its own correctness.
    def copying(request: Request) -> str:
        prompt = tokenizer.decode(request.prompt_ids)
        return prompt[5:8] if request.policy == "reviser" else lookup(request)

    sampling = Sampling(temperature=1.0, group_size=4, team_rollouts=2, alpha=0.5)
    trace, _ = run(team, task, tokenizer, sampling, copying)
    solvers = [turn for turn in trace.turns if turn.agent == "solver"]
    assert {turn.team_reward for turn in solvers} == {0.0, 1.0}
    for turn in solvers:
        assert turn.team_reward == float(turn.text == RIGHT)
        assert turn.reward == turn.local_reward + 0.5 * turn.team_reward
    continuations = [turn for turn in trace.turns if turn.counterfactual and turn.index == 1]
    assert Counter(turn.parent for turn in continuations) == {turn.id: 2 for turn in solvers}
    assert not any(turn.committed for turn in trace.turns if turn.counterfactual)


def test_without_team_rollouts_all_turns_share_the_outcome(team: Team, task: Task, tokenizer) -> None:
    trace, _ = run(team, task, tokenizer, Sampling(temperature=1.0, group_size=2, alpha=0.5))
    assert {turn.team_reward for turn in trace.turns} == {trace.reward}


def test_a_failed_turn_is_a_value_and_is_not_committed_while_another_lives(team: Team, task: Task, tokenizer) -> None:
    def failing(request: Request) -> Completion | str:
        broken = Completion(token_ids=(), logprobs=(), text="", finish="error", error="prompt is longer than the context")
        return broken if request.policy == "solver" and request.seed % 2 else lookup(request)

    trace, _ = run(team, task, tokenizer, Sampling(temperature=1.0, group_size=8), failing)
    failed = [turn for turn in trace.turns if turn.finish == "error"]
    assert failed and all(turn.reward is None and turn.error for turn in failed)
    assert trace.path[0].finish != "error"


def test_the_same_seed_gives_the_same_requests_whatever_is_played_beside(team: Team, task: Task, tokenizer) -> None:
    other = Task(id="other", question="modulo 4", answer="012", compact="132", grader="ring")
    how = Play(team=team, sampling=Sampling(temperature=1.0), judge=VerifiableJudge(), seed=5)
    alone = collect(ScriptedEngine(lookup, tokenizer), [task], how, max_live=1, on_trace=lambda trace: None)
    beside = collect(ScriptedEngine(lookup, tokenizer), [other, task], how, max_live=2, on_trace=lambda trace: None)
    assert alone[0] == beside[1]


def test_episodes_are_refilled_as_they_end(team: Team, task: Task, tokenizer) -> None:
    tasks = [Task(id=f"q{i}", question="modulo 4", answer="012", compact="132", grader="ring") for i in range(5)]
    ended: list[str] = []
    how = Play(team=team, sampling=Sampling(temperature=1.0), judge=VerifiableJudge(), seed=0)
    traces = collect(
        ScriptedEngine(lookup, tokenizer), tasks, how, max_live=2, on_trace=lambda trace: ended.append(trace.task.id)
    )
    assert [trace.task.id for trace in traces] == [task.id for task in tasks]
    assert ended == ["q0", "q1", "q2", "q3", "q4"]


def test_ctrl_c_hands_over_unfinished_traces(team: Team, task: Task, tokenizer) -> None:
    def interrupted(request: Request) -> str:
        if request.policy == "reviser":
            raise KeyboardInterrupt
        return lookup(request)

    kept: list[Trace] = []
    with pytest.raises(KeyboardInterrupt):
        run(team, task, tokenizer, Sampling(temperature=1.0), interrupted, on_trace=kept.append)
    assert [turn.agent for turn in kept[0].turns] == ["solver", "critic"]
    assert kept[0].reward is None and kept[0].label.endswith("unfinished")


def test_an_error_of_ours_hands_over_unfinished_traces_too(team: Team, task: Task, tokenizer) -> None:
    def broken(request: Request) -> str:
        if request.policy == "reviser":
            raise RolloutError("the engine is gone")
        return lookup(request)

    kept: list[Trace] = []
    with pytest.raises(RolloutError):
        run(team, task, tokenizer, Sampling(temperature=1.0), broken, on_trace=kept.append)
    assert [turn.agent for turn in kept[0].turns] == ["solver", "critic"]


def test_a_trace_replays_from_its_own_prompts_and_seeds(team: Team, task: Task, tokenizer) -> None:
    trace, engine = run(team, task, tokenizer, Sampling(temperature=1.0, group_size=3))
    again = replay(engine, task, trace.turns, team, Sampling(temperature=1.0))
    assert [completion.token_ids for completion in again] == [turn.completion_ids for turn in trace.turns]


def test_pipelines_without_a_loop_end_after_the_last_agent() -> None:
    spoken = [
        Turn(
            id=str(i),
            parent=None,
            task_id="q",
            agent="a",
            policy="p",
            index=i,
            prompt_ids=(),
            prompt_spans=(),
            completion_ids=(),
            behavior_logprobs=(),
            text="",
            finish="stop",
            verdict=False,
        )
        for i in range(2)
    ]
    assert Pipeline(agents=("a", "b")).next_speakers(spoken[:1]) == ("b",)
    assert Pipeline(agents=("a", "b")).next_speakers(spoken) == ()


def test_a_failed_verdict_keeps_the_class_of_what_it_was_asked_about(team: Team, task: Task, tokenizer) -> None:
    broken = Completion(token_ids=(), logprobs=(), text="", finish="error", error="prompt is longer than the context")
    script = {"solver": RIGHT, "critic": broken, "reviser": RIGHT, "verifier": "===+"}
    trace, _ = run(team, task, tokenizer, Sampling(temperature=1.0), lambda request: script[request.policy])
    assert (trace.path[1].truth, trace.path[1].verdict, trace.path[1].reward) == (True, None, None)
