"""Teams from YAML alone: roles, policies, models, topologies, and how many speak at most."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mas_hpc.agents.role import ROLES
from mas_hpc.agents.template import ChatTemplate, CompactTemplate
from mas_hpc.config import ModelConfig, RunConfig
from mas_hpc.config_file import load_config
from mas_hpc.distributed.world import World
from mas_hpc.errors import CheckpointError, ConfigError
from mas_hpc.models.load import load_model
from mas_hpc.orchestration.episode import Team
from mas_hpc.orchestration.topology import Debate, MixtureOfAgents, Pipeline, Single
from mas_hpc.rollout.engine import Request, SamplingParams
from mas_hpc.rollout.native.engine import NativeEngine
from mas_hpc.run import Run, build, with_adapters
from mas_hpc.teams import build_team, build_topology
from mas_hpc.types import Turn

TWO = "agents: [{name: ada, role: debater}, {name: ben, role: debater}]"
TRY_AND_JUDGE = "agents: [{name: solver}, {name: judge, role: verifier}]"
LOOP = "agents: [{name: planner, role: plan}, {name: solver}, {name: check, role: critic}]"
PLAN = "roles: [{name: plan, produces: text, prompt: Plan.}]"
SMALL = "model: {hidden_size: 32}\ndata: {kind: ring, num_train: 4, num_test: 2}\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_model(ModelConfig(hidden_size=32), seed=0)[1]


def configured(tmp_path: Path, text: str) -> RunConfig:
    file = tmp_path / "team.yaml"
    file.write_text(text)
    return load_config(file, [f"runs_dir={tmp_path}"])


def team_of(tmp_path: Path, tokenizer, section: str, rest: str = "") -> Team:
    config = configured(tmp_path, f"team: {{{section}}}\n{rest}")
    return build_team(config.team, config, tokenizer)


@pytest.mark.parametrize(
    ("section", "topology"),
    [
        ("topology: single", Single(agent="solver")),
        ("topology: self_consistency, rounds: 5", Single(agent="solver", samples=5)),
        ("topology: pipeline", Pipeline(agents=("solver", "critic", "reviser", "verifier"), num_looped=2)),
        ("rounds: 3, stop_when_accepted: true",
         Pipeline(agents=("solver", "critic", "reviser", "verifier"), num_looped=2, max_rounds=3, stop_when_accepted=True)),
        (f"rounds: 2, loop_from: solver, {LOOP}, {PLAN}",
         Pipeline(agents=("planner", "solver", "check"), num_looped=2, max_rounds=2)),
        (f"topology: best_of_n, rounds: 4, {TRY_AND_JUDGE}", Pipeline(agents=("solver", "judge"), num_looped=2, max_rounds=4)),
        (f"topology: debate, rounds: 2, {TWO}", Debate(debaters=("ada", "ben"), rounds=2)),
        ("topology: debate, agents: [{name: ada}, {name: ben}, {name: judge, role: judge}]",
         Debate(debaters=("ada", "ben"), judge="judge", rounds=1)),
        ("topology: mixture, rounds: 3, agents: [{name: ada, role: proposer}, {name: cleo, role: aggregator}]",
         MixtureOfAgents(proposers=("ada",), aggregator="cleo", layers=3)),
    ],
)  # fmt: skip
def test_every_topology_has_its_yaml_and_its_most_speakers_are_those_that_speak(tmp_path: Path, section, topology) -> None:
    settings = configured(tmp_path, f"team: {{{section}}}").team
    assert build_topology(settings) == topology
    path: list[Turn] = []
    while speakers := topology.next_speakers(path):
        path += [_rejecting(name, path) for name in speakers]
    assert len(path) == settings.max_speakers
    assert {turn.agent for turn in path} == {agent.name for agent in settings.speaking}


def _rejecting(name: str, path: Sequence[Turn]) -> Turn:
    return Turn(
        id=f"{len(path)}", parent=None, task_id="q", agent=name, policy="p", index=0, prompt_ids=(), prompt_spans=(),
        completion_ids=(), behavior_logprobs=(), text="", finish="stop", verdict=False,
    )  # fmt: skip


def test_a_role_of_ones_own_speaks_with_its_own_prompt_and_is_read_as_it_says(tmp_path: Path, tokenizer) -> None:
    team = team_of(tmp_path, tokenizer, f"{LOOP}, {PLAN}")
    planner = team.agents["planner"]
    assert (planner.role.produces, planner.instruction, planner.role.letter, planner.sees) == (
        "text", "Plan.", "?", "transcript",
    )  # fmt: skip
    assert team.agents["solver"].role == ROLES["solver"]
    assert team.answer([]) is None


def test_a_built_in_role_can_be_replaced_and_an_agent_can_have_a_prompt_of_its_own(tmp_path: Path, tokenizer) -> None:
    own = "roles: [{name: solver, produces: answer, prompt: Guess.}]"
    team = team_of(tmp_path, tokenizer, f"{own}, agents: [{{name: a}}, {{name: b, prompt: Think.}}, {{name: c, role: critic}}]")
    assert [agent.instruction for agent in team.agents.values()] == ["Guess.", "Think.", ROLES["critic"].prompt]


def test_a_replaced_proposer_still_reads_references(tmp_path: Path, tokenizer) -> None:
    own = "roles: [{name: proposer, produces: answer, prompt: Propose.}]"
    agents = "agents: [{name: a, role: proposer}, {name: b, role: aggregator}]"
    team = team_of(tmp_path, tokenizer, f"topology: mixture, {own}, {agents}")
    assert [agent.sees for agent in team.agents.values()] == ["references", "references"]
    assert team.agents["a"].instruction == "Propose."


def test_what_agents_see_follows_from_the_topology_unless_it_is_said(tmp_path: Path, tokenizer) -> None:
    def sees(section: str) -> list[str]:
        return [agent.sees for agent in team_of(tmp_path, tokenizer, section).agents.values()]

    assert sees("topology: pipeline") == ["transcript"] * 4
    assert sees(f"topology: best_of_n, {TRY_AND_JUDGE}") == ["question", "latest"]
    said = "agents: [{name: solver, sees: transcript}, {name: judge, role: verifier, sees: answers}]"
    assert sees(f"topology: best_of_n, {said}") == ["transcript", "answers"]
    assert sees("topology: single, agents: [{name: a, role: proposer, sees: question}]") == ["question"]


def test_agents_have_their_own_limits_or_the_common_one(tmp_path: Path, tokenizer) -> None:
    section = "agents: [{name: a, max_new_tokens: 7}, {name: b}]"
    team = team_of(tmp_path, tokenizer, section, "rollout: {max_new_tokens: 90}")
    assert [agent.max_new_tokens for agent in team.agents.values()] == [7, 90]


def test_only_agents_that_speak_are_in_the_team(tmp_path: Path, tokenizer) -> None:
    for section in ("topology: single", "topology: self_consistency, rounds: 2"):
        assert list(team_of(tmp_path, tokenizer, section).agents) == ["solver"]


@pytest.mark.parametrize(
    ("rest", "policies"),
    [
        ("", ["shared", "shared", "shared"]),
        ("adapters: {policies: per_agent}", ["ada", "pair", "pair"]),
    ],
)
def test_policies_are_shared_or_per_agent_or_as_they_are_named(tmp_path: Path, tokenizer, rest: str, policies) -> None:
    pair = ", policy: pair" if rest else ""
    section = f"topology: debate, agents: [{{name: ada}}, {{name: ben{pair}}}, {{name: cleo{pair}}}]"
    assert [agent.policy for agent in team_of(tmp_path, tokenizer, section, rest).agents.values()] == policies


def test_the_dialect_follows_from_the_tokenizer(tmp_path: Path, tokenizer) -> None:
    tokens = {token: place for place, token in enumerate(["<|end|>", *(chr(code) for code in range(32, 127)), "\n"])}
    backend = Tokenizer(WordLevel(tokens, unk_token=" "))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", behavior="isolated"), decoders.Fuse()
    backend.add_special_tokens(["<|end|>"])
    chat = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>{% endfor %}assistant:"
    talking = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=chat)
    assert isinstance(team_of(tmp_path, tokenizer, "topology: single").template, CompactTemplate)
    assert isinstance(team_of(tmp_path, talking, "topology: single").template, ChatTemplate)


# ---- models of their own


MIXED = "team: {topology: debate, agents: [{name: ada}, {name: ben, policy: other}], models: {other: %s}}\n" + SMALL


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider model of the tiny model's vocabulary."""
    folder = tmp_path_factory.mktemp("models") / "other"
    model, tokenizer = load_model(ModelConfig(hidden_size=64), seed=5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def built(config: RunConfig) -> Run:
    return build(config, World(), Console(quiet=True))


def asked(policy: str) -> list[Request]:
    sampling = SamplingParams(max_new_tokens=9)
    return [
        Request(prompt_ids=(1, 5, 6), prompt_spans=(("", 3),), policy=policy, seed=seed, sampling=sampling)
        for seed in range(4)
    ]  # fmt: skip


def test_a_policy_with_a_model_of_its_own_is_served_by_it(tmp_path: Path, other: Path) -> None:
    run = built(configured(tmp_path, MIXED % other))
    theirs = NativeEngine(load_model(ModelConfig(path=str(other)), seed=0)[0], run.tokenizer)
    ours = NativeEngine(run.model, run.tokenizer)
    mixed = run.engine.generate([request for pair in zip(asked("shared"), asked("other"), strict=True) for request in pair])
    assert [one.token_ids for one in mixed[::2]] == [one.token_ids for one in ours.generate(asked("shared"))]
    assert [one.token_ids for one in mixed[1::2]] == [one.token_ids for one in theirs.generate(asked("other"))]
    assert mixed[0].token_ids != mixed[1].token_ids
    assert not any(parameter.requires_grad for parameter in run.other_models["other"].parameters())


def test_adapters_are_for_policies_without_a_model_of_their_own_and_shared_ones_are_one(tmp_path: Path, other: Path) -> None:
    agents = "{name: ada, policy: pair}, {name: ben, policy: other}, {name: cleo, policy: pair}, {name: dan}"
    text = f"team: {{topology: debate, agents: [{agents}], models: {{other: {other}}}}}\nadapters: {{policies: per_agent}}\n"
    run = with_adapters(built(configured(tmp_path, text + SMALL)))
    assert run.bank is not None and run.bank.policies == ("pair", "dan")
    counts = Counter(len(one.token_ids) for name in ("pair", "dan", "other") for one in run.engine.generate(asked(name)))
    assert counts == {9: 12}


def test_a_model_of_another_vocabulary_is_refused(tmp_path: Path, other: Path) -> None:
    folder = tmp_path / "foreign"
    model = LlamaForCausalLM.from_pretrained(other)
    _, tokenizer = load_model(ModelConfig(hidden_size=64), seed=5)
    tokenizer.add_tokens(["x"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError) as error:
        built(configured(tmp_path, MIXED % folder))
    message = str(error.value)
    assert message.startswith(f"team.models.other='{folder}': its vocabulary is not that of model.path='tiny'")
    assert "choose models of one family" in message and not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_loaded_is_named_by_its_own_key(tmp_path: Path, other: Path) -> None:
    empty, torn = tmp_path / "empty", shutil.copytree(other, tmp_path / "torn")
    empty.mkdir()
    (torn / "model.safetensors").write_bytes(b"not weights")
    for folder, kind, problem in (
        (empty, ConfigError, "the folder holds no model"),
        (torn, CheckpointError, "damaged weights"),
    ):
        with pytest.raises(kind) as error:
            built(configured(tmp_path, MIXED % folder))
        assert str(error.value).startswith(f"team.models.other='{folder}': {problem}")


def test_the_resolved_team_reads_back_as_the_same_team(tmp_path: Path, tokenizer) -> None:
    config = configured(tmp_path, f"team: {{rounds: 2, loop_from: solver, {LOOP}, {PLAN}}}")
    again = configured(tmp_path, json.dumps(config.model_dump(mode="json")))  # JSON is YAML
    assert again.team == config.team
