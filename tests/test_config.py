"""The configuration: typed values, clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from mas_hpc.config import ATGRPOConfig, Gsm8kConfig, RingConfig
from mas_hpc.config_file import load_config
from mas_hpc.errors import ConfigError

ROOT = Path(__file__).parents[1]


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file


def message(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text), overrides)
    return str(error.value)


def test_scientific_notation_is_a_float(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "method: {kind: at_grpo, learning_rate: 1e-5}"))
    assert config.method.learning_rate == 1e-5


def test_on_is_not_a_boolean(tmp_path: Path) -> None:
    assert message(tmp_path, "evaluation: {controls: on}") == "evaluation.controls='on': Input should be a valid boolean"


def test_an_unknown_key_names_the_nearest_valid_one(tmp_path: Path) -> None:
    assert (
        message(tmp_path, "method: {kind: at_grpo, group_sise: 4}")
        == "method.group_sise: unknown key; did you mean group_size?"
    )
    assert "expected one of ['alpha'" in message(tmp_path, "adapters: {zzzz: 4}")


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    text = message(
        tmp_path, "method: {kind: at_grpo, group_size: 1}\nmodel: {pth: x}\nteam: {agents: [{name: a, rol: critic}]}"
    )
    assert [line.split(":")[0] for line in text.splitlines()] == [
        "model.pth",
        "team.agents.0.rol",
        "method.group_size=1",
    ]


def test_a_group_of_one_is_refused(tmp_path: Path) -> None:
    assert "greater than or equal to 2" in message(tmp_path, "method: {kind: at_grpo, group_size: 1}")


def test_overrides_reach_leaves_and_keep_their_type(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, "data: {kind: gsm8k}"), ["data.path=a/b.jsonl", "evaluation.temperatures=[0.5]", "seed=3"]
    )
    assert isinstance(config.data, Gsm8kConfig)
    assert (config.data.path, config.evaluation.temperatures, config.seed) == ("a/b.jsonl", (0.5,), 3)


def test_bad_overrides_are_named(tmp_path: Path) -> None:
    assert "section.key=value" in message(tmp_path, "{}", "seed")
    assert "name is a value, not a section" in message(tmp_path, "name: x", "name.y=1")
    assert "not valid YAML" in message(tmp_path, "a: [1")


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "{}")
    with pytest.raises(ConfigError, match=r"perhaps \['config.yaml'\]"):
        load_config(tmp_path / "confg.yaml")


def test_g10_training_needs_the_distribution_that_is_sampled_from(tmp_path: Path) -> None:
    assert "training needs top_p=1" in load_config(write(tmp_path, "rollout: {top_p: 0.9}")).untrainable
    assert "temperature=0" in load_config(write(tmp_path, "rollout: {temperature: 0.0}")).untrainable
    assert load_config(write(tmp_path, "rollout: {top_p: 0.9}\nmethod: {kind: sft}")).untrainable == ""


def test_sections_are_checked_against_each_other(tmp_path: Path) -> None:
    assert "no agent ['critc']" in message(tmp_path, "method: {kind: at_grpo, agent_weights: {critc: 0.5}}")
    assert "must be odd" in message(tmp_path, "data: {kind: ring, num_digits: 4}")
    assert "unique names" in message(tmp_path, "team: {agents: [{name: a}, {name: a}]}")


def test_the_empty_config_is_the_embedded_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, ""))
    assert isinstance(config.data, RingConfig) and isinstance(config.method, ATGRPOConfig)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_shipped_configs_are_valid(file: Path) -> None:
    assert load_config(file).name == file.stem, "the run folder is named like the file"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("adapters: {path: runs/a/adapters}", "no adapter is loaded"),
        ("adapters: {policies: per_agent, scope: speaker}\nmethod: {kind: rm}", "adapters.scope=speaker"),
        ("warm_start: {eval_every: 5}", "warm_start.eval_every=5"),
        ("method: {kind: sft, train_on: completion}", "method.train_on=completion"),
        ("team: {rounds: 2, topology: single}", "team.rounds=2"),
        ("team: {rounds: 2, agents: [{name: a, role: solver}, {name: b, role: critic}]}", "team.rounds=2"),
    ],
)
def test_knobs_that_would_do_nothing_are_refused(tmp_path: Path, text: str, problem: str) -> None:
    assert problem in message(tmp_path, text)


def test_a_path_alone_means_the_rows_that_the_method_learns_from(tmp_path: Path) -> None:
    ring = "data: {kind: ring, num_digits: 7, num_train: 50}\nwarm_start: {steps: 5}\nmethod: {kind: %s}"
    for method, kind in (("rm", "preferences"), ("dpo", "preferences"), ("prm", "steps"), ("ppo", "gsm8k"), ("sft", "gsm8k")):
        config = load_config(write(tmp_path, ring % method), ["data.path=rows"])
        assert (config.data.kind, config.data.num_train, config.warm_start) == (kind, 50, None)
    limited = load_config(write(tmp_path, ring % "prm"), ["data.path=rows", "data.max_length=9", "data.separator=;"])
    assert (limited.data.max_length, limited.data.separator) == (9, ";")
    assert "data.separater: unknown key" in message(tmp_path, ring % "prm", "data.path=rows", "data.separater=;")
    kept = load_config(write(tmp_path, ring % "dpo"), ["data.path=rows", "warm_start.steps=3"])
    assert kept.warm_start is not None and kept.warm_start.steps == 3


def test_another_kind_starts_its_section_anew(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "data: {kind: ring, num_digits: 5}"), ["data.kind=addition", "data.num_digits=3"])
    assert (config.data.kind, config.data.num_digits) == ("addition", 3)


def test_a_kind_clears_its_section_before_the_other_overrides_whatever_their_order(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "data: {kind: ring, num_digits: 5}"), ["data.num_train=9", "data.kind=addition"])
    assert (config.data.kind, config.data.num_train) == ("addition", 9)


@pytest.mark.parametrize(
    ("section", "problem", "remedy"),
    [
        ("agents: []", "team.agents: names []", "at least one agent"),
        ("agents: [{name: a}, {name: a}]", "team.agents: names ['a', 'a']", "unique names"),
        ("agents: [{name: ''}]", "team.agents: names ['']", "unique names"),
        ("agents: [{name: base}]", "team.agents: 'base'", "choose another name"),
        ("agents: [{name: a, policy: base}]", "team.agents: 'base'", "choose another name"),
        ("models: {base: m}", "team.agents: 'base'", "choose another name"),
        ("roles: [{name: r, produces: answer, prompt: p}, {name: r, produces: text, prompt: q}]",
         "team.roles: names ['r', 'r']", "unique names"),
        ("roles: [{name: r, produces: words, prompt: p}]", "team.roles.0.produces='words'", "'answer', 'verdict' or 'text'"),
        ("roles: [{name: r, produces: text}]", "team.roles.0.prompt: required", "add team.roles.0.prompt=..."),
        ("agents: [{name: a, role: critik}]", "team.agents: a has role 'critik'", "did you mean critic?"),
        ("agents: [{name: a, role: zzzz}]", "team.agents: a has role 'zzzz'", "expected one of ['aggregator', 'critic', "),
        ("agents: [{name: a, role: zzzz}]", "team.agents: a has role 'zzzz'", "or add it to team.roles"),
        ("models: {judge: m}", "team.models: no agent has policy ['judge']", "set policy of an agent, or leave them out"),
        ("agents: [{name: a, role: critic}]", "team.topology=pipeline: roles ['critic']", "whose role gives an answer"),
        ("topology: single, agents: [{name: a, role: critic}, {name: b}]", "team.topology=single: roles ['critic', 'solver']",
         "whose role gives an answer"),
        ("topology: best_of_n", "team.topology=best_of_n: roles ['solver', 'critic', 'reviser', 'verifier']",
         "expected two agents, one that answers and one that judges"),
        ("topology: best_of_n, agents: [{name: a, role: critic}, {name: b}]", "team.topology=best_of_n: roles ['critic'",
         "one that answers and one that judges"),
        ("topology: debate, agents: [{name: j, role: judge}]", "team.topology=debate: roles ['judge']",
         "expected an agent whose role gives an answer beside the last one"),
        ("topology: debate, agents: [{name: c, role: critic}, {name: j, role: judge}]",
         "team.topology=debate: roles ['critic', 'judge']", "expected an agent whose role gives an answer beside the last one"),
        ("topology: mixture, agents: [{name: a, role: aggregator}]", "team.topology=mixture: roles ['aggregator']",
         "expected an agent whose role gives an answer beside the last one"),
        ("agents: [{name: ../../evil}]", "team.agents: '../../evil'", "expected letters, digits, _, - and ."),
        ("agents: [{name: a, policy: '[b]'}]", "team.agents: '[b]'", "expected letters, digits, _, - and ."),
        ("loop_from: nobody", "team.loop_from='nobody'", "expected the name of an agent of a pipeline"),
        ("topology: debate, loop_from: solver", "team.loop_from='solver'", "expected the name of an agent of a pipeline"),
        ("rounds: 2, loop_from: solver, agents: [{name: critic, role: critic}, {name: solver}]",
         "team.loop_from='solver': the last agent sends back by verdict, but its role 'solver' gives none",
         "end with a role that does, or leave loop_from out"),
        ("loop_from: reviser", "team.loop_from='reviser'", "with rounds=1 nobody goes again; set rounds to 2 or more"),
        ("rounds: 1, loop_from: verifier", "team.loop_from='verifier'", "set rounds to 2 or more"),
        ("rounds: 2, topology: single", "team.rounds=2", "only a pipeline that ends in a reviser and a verifier"),
        ("rounds: 2, agents: [{name: a}, {name: c, role: critic}]", "team.rounds=2", "the last roles are ['solver', 'critic']"),
        ("stop_when_accepted: true, topology: debate", "team.stop_when_accepted=true", "not debate; set it to false"),
        ("agents: [{name: a, policy: own}]", "team.agents: policies ['own']", "set adapters.policies=per_agent, or name them"),
        ("topology: debat", "team.topology='debat'", "'debate'"),
        ("rounds: 0", "team.rounds=0", "greater than"),
    ],
)  # fmt: skip
def test_a_team_that_cannot_play_names_the_key_the_value_and_the_remedy(
    tmp_path: Path, section: str, problem: str, remedy: str
) -> None:
    found = message(tmp_path, f"team: {{{section}}}")
    assert found.startswith(problem) and remedy in found and "\n" not in found


@pytest.mark.parametrize(
    "section",
    [
        "agents: [{name: a, policy: own}], models: {own: path/to/it}",
        "rounds: 3, topology: self_consistency",
        "topology: debate, rounds: 2, agents: [{name: a}, {name: b}, {name: j, role: judge}]",
        "roles: [{name: plan, produces: text, prompt: Plan.}], agents: [{name: p, role: plan}, {name: s}]",
        "rounds: 2, loop_from: s, agents: [{name: s}, {name: c, role: critic}]",
        "rounds: 1",
        "topology: single, stop_when_accepted: true",
    ],
)
def test_a_team_that_can_play_is_taken(tmp_path: Path, section: str) -> None:
    assert load_config(write(tmp_path, f"team: {{{section}}}")).team.agents
