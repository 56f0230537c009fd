"""The plan of a job: what is decided, what is kept, and the words that start its ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from mas_hpc.config_file import load_config
from mas_hpc.errors import ConfigError, LaunchError
from mas_hpc.launch.command import example_words
from mas_hpc.launch.plan import JobPlan, mpiexec_words
from mas_hpc.launch.request import Request, choose_queue, free_folder, parse_walltime, plan_job
from mas_hpc.launch.site import Profile, load_site
from tests.launch.golden_jobs import ROOT, Case, plan_of, request

COLOCATED = Case(nodes=2048, ppn=12, tp=1, disaggregated=False)
APART = Case(nodes=16, ppn=12, tp=1, disaggregated=True)


def local(**changes: object) -> JobPlan:
    config = ROOT / "configs/mas.yaml"
    asked = Request(
        config_file=config, config=load_config(config), site=load_site("laptop"), job="rollout", python=Path("/v/bin/python"),
        cwd=Path("/home/me"), ranks_per_node=2,
    )  # fmt: skip
    return plan_job(replace(asked, **changes))  # type: ignore[arg-type]


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = plan_of(COLOCATED).model_copy(update={"run_dir": str(tmp_path / "team")})
    file = plan.write()
    assert file == tmp_path / "team.job/job.json"
    assert JobPlan.read(file) == plan
    with pytest.raises(ConfigError, match=r"team.job: a job of this name is there"):
        plan.write()
    (tmp_path / "team").mkdir()
    assert plan.write() == file  # the run goes on
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"job.json: not the job.json of mas-hpc launch"):
        JobPlan.read(file)


def test_spares_are_asked_for_and_have_no_ranks() -> None:
    plan = plan_of(COLOCATED)
    assert (plan.nodes, plan.spares, plan.num_active, plan.num_ranks) == (2064, 16, 2048, 24576)


@pytest.mark.parametrize(("text", "minutes"), [("6:00:00", 360), ("0:05:00", 5), ("168:00:00", 10080), ("0:59:01", 60)])
def test_walltimes(text: str, minutes: int) -> None:
    assert parse_walltime(text) == minutes


@pytest.mark.parametrize("text", ["6:00", "6", "6h", "1:60:00", "-1:00:00", "1:00:00; reboot", "1:00:00\n"])
def test_a_walltime_that_pbs_would_read_otherwise_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected H:MM:SS"):
        parse_walltime(text)


@pytest.mark.parametrize(
    ("nodes", "minutes", "chain", "queue"),
    [
        (1, 30, 0, "debug"),
        (1, 30, 1, "capacity"),  # debug takes one job of a user
        (1, 120, 0, "capacity"),
        (2, 60, 0, "debug"),
        (16, 60, 0, "debug-scaling"),
        (16, 61, 0, "capacity"),
        (17, 60, 0, "debug-scaling"),
        (17, 61, 0, ""),
        (255, 61, 0, ""),
        (256, 61, 0, "prod"),
        (1024, 720, 0, "prod"),
        (1024, 721, 0, ""),
        (1025, 721, 0, "prod"),
        (10624, 1440, 0, "prod"),
        (10625, 60, 0, ""),
        (1, 4, 0, ""),
    ],
)
def test_the_queue_is_the_first_that_takes_the_job(nodes: int, minutes: int, chain: int, queue: str) -> None:
    assert choose_queue(load_site("aurora"), nodes, minutes, chain) == queue


def test_a_job_has_a_run_folder_of_its_own(tmp_path: Path) -> None:
    assert free_folder(tmp_path / "mas") == tmp_path / "mas"
    (tmp_path / "mas").mkdir()
    (tmp_path / "mas-2.job").mkdir()  # waits in the queue: its run has no folder yet
    assert free_folder(tmp_path / "mas") == tmp_path / "mas-3"


def test_pals_is_told_the_world_size_and_one_binding() -> None:
    plan = plan_of(APART)
    words = example_words(plan)
    assert words[:7] == ("mpiexec", "-n", "144", "--ppn", "12", "--hostfile", "/flare/Team/work/runs/team.job/hosts_0.txt")
    assert words[words.index("--cpu-bind") + 1].count(":") == 12
    assert "PALS_WORLD_SIZE=192" in words
    assert "MAS_HPC_STORE=HOST0.hsn.cm.aurora.alcf.anl.gov:29500" in words
    groups = [word for word in words if word == ":"], words[words.index(":") + 1 : words.index(":") + 3]
    assert groups == ([":"], ("-n", "48"))


def test_pals_starts_no_groups_with_bindings_of_their_own() -> None:
    plan = plan_of(APART)
    first, second = plan.groups
    other = plan.model_copy(update={"groups": (first, second.model_copy(update={"cores": second.cores[::-1]}))})
    with pytest.raises(LaunchError, match="one --ppn and one --cpu-bind for all groups"):
        example_words(other)


def test_a_role_sets_and_unsets_its_environment_before_the_program() -> None:
    plan = plan_of(APART)
    profile = Profile(set={"A": "1 2"}, unset=("B",))
    groups = tuple(group.model_copy(update={"environment": profile}) for group in plan.groups)
    words = example_words(plan.model_copy(update={"groups": groups}))
    start = words.index("env")
    assert words[start : start + 5] == ("env", "-u", "B", "A=1 2", plan.python)


def test_the_words_of_an_attempt_name_its_hosts_and_go_on_when_told_to() -> None:
    plan = plan_of(Case(nodes=1, ppn=12, tp=1, disaggregated=False))
    words = mpiexec_words(plan, ["x4"], "x4.hsn", 4242, 3, resume=True)
    assert {"MAS_HPC_STORE=x4.hsn:4242", "MASTER_ADDR=x4.hsn", "MAS_HPC_ATTEMPT=3"} <= set(words)
    assert words[words.index("--hostfile") + 1].endswith("hosts_3.txt")
    assert words[-2:] == ("--resume", "/flare/Team/work/runs/team")
    with pytest.raises(LaunchError, match="2 hosts for 1 nodes"):
        mpiexec_words(plan, ["x4", "x5"], "x4.hsn", 4242, 0)


def test_ranks_use_what_is_staged() -> None:
    asked = request(COLOCATED)
    model = asked.config.model.model_copy(update={"path": "models/big"})
    config = asked.config.model_copy(update={"model": model})
    plan = plan_job(replace(asked, config=config, stage=(Path("env.tar.gz"), Path("models/big"))))
    assert plan.rank_python == "/tmp/mas_hpc/env/bin/python"
    assert plan.python == "/flare/Team/work/env/bin/python"  # the supervisor runs before anything is staged
    assert plan.overrides[-1] == "model.path=/tmp/mas_hpc/big"
    assert plan.rank_python in example_words(plan)


def test_slurm_masks_are_those_of_the_lists() -> None:
    asked = replace(request(COLOCATED), site=load_site("slurm"), nodes=2, spares=0, ranks_per_node=4, stage=())
    words = example_words(plan_job(asked))
    assert words[:5] == ("srun", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--nodelist=HOST0,HOST1")
    assert f"--cpu-bind=mask_cpu:{0xFFFF:#x},{0xFFFF << 16:#x},{0xFFFF << 32:#x},{0xFFFF << 48:#x}" in words
    with pytest.raises(LaunchError, match="2 groups of ranks, which srun does not start"):
        example_words(plan_job(replace(asked, engine_nodes=1)))


def test_a_laptop_needs_no_store_and_one_host() -> None:
    run = ("-m", "mas_hpc", "rollout", str(ROOT / "configs/mas.yaml"), "name=mas", "runs_dir=/home/me/runs")
    python = "/v/bin/python"
    torchrun = ("env", "OMP_NUM_THREADS=1", python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert example_words(local()) == (*torchrun, *run)
    mpiexec = local(site=load_site("laptop").started_by("mpiexec"))
    assert example_words(mpiexec) == ("env", "OMP_NUM_THREADS=1", "mpiexec", "-n", "2", python, *run)
    with pytest.raises(LaunchError, match="torchrun starts ranks on one host, not on 2"):
        mpiexec_words(local(nodes=2), ["a", "b"], "", 0, 0)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"project": "p; touch x"}, "project"),
        ({"project": "-lselect=9"}, "project"),
        ({"queue": "prod\n#PBS -v X"}, "queue"),
        ({"queue": "$(id)"}, "queue"),
        ({"filesystems": "home:fl are"}, "filesystems"),
        ({"overrides": ("method.steps=1\nreboot",)}, "overrides"),
        ({"overrides": ("--resume",)}, "overrides"),
    ],
)
def test_what_stands_in_a_schedulers_line_is_one_word_or_refused(changes: dict[str, object], key: str) -> None:
    expected = r"section\.key=value in one line" if key == "overrides" else "one word, of letters"
    with pytest.raises(ConfigError, match=rf"^{key}=.*: expected {expected}"):
        plan_job(replace(request(COLOCATED), **changes))  # type: ignore[arg-type]


def test_what_is_resumed_is_a_run(tmp_path: Path) -> None:
    asked = replace(request(COLOCATED), resume=tmp_path)
    with pytest.raises(ConfigError, match=rf"^--resume {tmp_path}: no config.yaml there; expected the folder of a run"):
        plan_job(asked)
    (tmp_path / "config.yaml").touch()
    assert plan_job(asked).run_dir == str(tmp_path)


@pytest.mark.parametrize("name", ["a b", "$(touch x)", "-q", "a\n#PBS -q prod", "a;b", "`id`"])
def test_a_name_that_a_shell_or_pbs_would_read_is_refused(name: str) -> None:
    asked = request(COLOCATED)
    with pytest.raises(ConfigError, match=r"^name"):
        plan_job(replace(asked, config=asked.config.model_copy(update={"name": name})))


def test_a_plan_is_frozen_and_takes_no_unknown_key() -> None:
    plan = plan_of(COLOCATED)
    with pytest.raises(ValidationError):
        plan.name = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        JobPlan.model_validate({**plan.model_dump(), "shell": "rm"})
