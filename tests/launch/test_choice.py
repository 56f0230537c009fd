"""Which job a configuration is for: what it would be run as if its author were asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from mas_hpc.config import RunConfig
from mas_hpc.config_file import load_config
from mas_hpc.launch.choice import choose_job, unfit
from mas_hpc.launch.plan import Job

CONFIGS = Path(__file__).parents[2] / "configs"
PLAYED = ("debate", "mas", "moa")
"""Those whose first lines say rollout and evaluate."""
DOCUMENTS = ("data.kind=documents", "data.path=x.jsonl")


def config(name: str, *words: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", list(words))


@pytest.mark.parametrize("name", sorted(file.stem for file in CONFIGS.glob("*.yaml")))
def test_shipped_configurations_are_trained_unless_they_are_there_to_be_played(name: str) -> None:
    found = choose_job(config(name))
    assert found.job == ("rollout" if name in PLAYED else "train")
    assert not unfit(found.job, config(name))


@pytest.mark.parametrize(
    ("name", "words", "job", "why"),
    [
        ("at_grpo", (), "train", "method.kind=at_grpo with data.num_train=6000"),
        ("at_grpo", ("data.num_train=0",), "rollout", "data.num_train=0 leaves nothing to train on"),
        ("at_grpo", ("rollout.top_p=0.9",), "rollout", "training cannot sample as rollout.temperature, top_p and top_k say"),
        ("sft", DOCUMENTS, "train", "data.kind=documents has rows to learn from, and no questions"),
    ],
)
def test_the_reason_names_the_keys_that_decide(name: str, words: tuple[str, ...], job: Job, why: str) -> None:
    found = choose_job(config(name, *words))
    assert (found.job, found.why) == (job, why)


def test_without_a_method_there_is_nothing_to_train(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: run\n")
    assert choose_job(load_config(file, [])).job == "rollout"
    assert choose_job(load_config(file, ["method.kind=grpo"])).job == "train"


@pytest.mark.parametrize(
    ("job", "name", "words", "says"),
    [
        ("train", "mas", (), "data.num_train=0: nothing to train on; set data.num_train, or --job rollout"),
        ("pipeline", "at_grpo", ("rollout.top_k=5",), "training needs top_p=1, top_k=0"),
        ("rollout", "sft", DOCUMENTS, "use mas-hpc train"),
        ("pipeline", "rm", (), "a reward model plays no episodes to evaluate; --job train"),
        ("evaluate", "mas", (), ""),
        ("pipeline", "quickstart", (), ""),
        ("rollout", "at_grpo", ("rollout.top_k=5",), ""),
    ],
)
def test_a_job_that_cannot_be_done_is_told_with_its_remedy(job: Job, name: str, words: tuple[str, ...], says: str) -> None:
    found = unfit(job, config(name, *words))
    assert says in found and bool(says) == bool(found)
