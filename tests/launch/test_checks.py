"""What is checked before nodes are spent: each fault is planted, and found with a remedy that helps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mas_hpc.config_file import load_config
from mas_hpc.launch.checks import Here, check_job
from mas_hpc.launch.finding import Finding, as_records, as_table, worst
from mas_hpc.launch.plan import JobPlan
from mas_hpc.launch.request import plan_job
from mas_hpc.launch.site import Profile, Site, load_site
from tests.launch.golden_jobs import ROOT, Case, config_of, request

BIG = Case(nodes=256, ppn=12, tp=1, disaggregated=False)
SMALL = Case(nodes=2, ppn=12, tp=1, disaggregated=False, walltime="0:30:00")
AT_HOME = Here(is_site=False)
ON_AURORA = Here(is_site=True)


@pytest.fixture(autouse=True)
def _known_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.launch.golden_jobs.SPARES", dict.fromkeys(range(11_000), 0))


def findings(case: Case, here: Here = AT_HOME, words: tuple[str, ...] = (), **changes: Any) -> dict[str, Finding]:
    """Of a job that differs from a sound one in these options, and in these words of the configuration."""
    asked = replace(request(case), **changes)
    config = config_of(case)
    if words:
        asked = replace(asked, overrides=words)
        ranks = case.nodes * case.ppn
        base = [f"method.tasks_per_step={ranks}", f"rollout.num_tasks={ranks}", "checkpoint.every=10", "name=team"]
        config = load_config(ROOT / "configs/at_grpo.yaml", [*base, *words])
        asked = replace(asked, config=config)
    return {finding.name: finding for finding in check_job(plan_job(asked), config, here)}


def changed(site: Site, **settings: str) -> Site:
    """Aurora, whose roles are all given these settings."""
    profiles = {role: Profile(set={**own.set, **settings}, unset=own.unset) for role, own in site.profiles.items()}
    return site.model_copy(update={"profiles": profiles})


def test_a_sound_job_has_no_errors_and_every_remedy_is_for_something() -> None:
    found = list(findings(BIG, spares=2).values())
    assert worst(found) == "ok"
    assert as_table(found, "checks").row_count == len(found) == len(as_records(found))


@pytest.mark.parametrize("nodes", [17, 100, 255])
def test_the_dead_zone_names_its_three_ways_out(nodes: int) -> None:
    finding = findings(replace(SMALL, nodes=nodes, walltime="6:00:00"))["queue"]
    assert finding.verdict == "error"
    assert finding.evidence == f"no queue of aurora takes {nodes} nodes for 6:00:00"
    assert finding.remedy == ("at most 16 nodes in capacity or at least 256 nodes in prod or at most 1:00:00 in debug-scaling")
    assert findings(replace(SMALL, nodes=nodes, walltime="1:00:00"))["queue"].evidence.startswith("debug-scaling takes")


def test_spares_count_where_a_queue_ends() -> None:
    case = replace(SMALL, nodes=16, walltime="6:00:00")
    assert findings(case)["queue"].evidence == "capacity takes 16 nodes for 6:00:00"
    finding = findings(case, spares=1)["queue"]
    assert finding.verdict == "error" and "17 nodes (1 spare)" in finding.evidence


@pytest.mark.parametrize(
    ("changes", "evidence", "remedy"),
    [
        ({"queue": "prod"}, "prod does not take 2 nodes", "at least 256 nodes in prod"),
        ({"queue": "small"}, "small: no queue of aurora", "--queue one of debug, debug-scaling, capacity, prod"),
        ({"walltime": "0:01:00"}, "no queue of aurora takes 2 nodes for 0:01:00", "walltime of at least 0:05:00"),
        ({"walltime": ""}, "no walltime", "--walltime H:MM:SS"),
        ({"nodes": 20_000, "walltime": "1:00:00"}, "takes 20000 nodes", "at most 10624 nodes in prod"),
    ],
)
def test_a_queue_that_does_not_take_the_job(changes: dict[str, Any], evidence: str, remedy: str) -> None:
    finding = findings(SMALL, **changes)["queue"]
    assert finding.verdict == "error"
    assert evidence in finding.evidence and remedy in finding.remedy


def test_a_job_without_a_project_is_refused() -> None:
    assert findings(SMALL, project="")["project"].verdict == "error"
    assert findings(SMALL)["project"].verdict == "ok"


def test_file_systems_are_known_and_all_that_are_used() -> None:
    unknown = findings(SMALL, filesystems="flare:eagle")["filesystems"]
    assert unknown.verdict == "error" and unknown.evidence == "unknown: eagle"
    python = Path("/home/me/env/bin/python")
    home = findings(SMALL, filesystems="flare", python=python)["filesystems"]
    assert home.verdict == "error" and home.remedy == "--filesystems flare:home"
    assert f"{python} is on home" in home.evidence
    assert findings(SMALL, python=python)["filesystems"].verdict == "ok"
    # No folder is taken for another whose name begins alike, or for what it is without its dots.
    none = findings(replace(SMALL, ppn=4), site=load_site("slurm"), filesystems="flare")["filesystems"]
    assert none.verdict == "error" and none.remedy == "leave --filesystems out"
    assert findings(SMALL, filesystems="flare", python=Path("/homes/x/python"))["filesystems"].verdict == "ok"
    assert findings(SMALL, filesystems="flare", python=Path("/flare/../home/x"))["filesystems"].verdict == "error"


def test_jobs_are_submitted_from_flare() -> None:
    assert findings(SMALL, AT_HOME, cwd=Path("/home/me"))["folder"].verdict == "skipped"
    finding = findings(SMALL, ON_AURORA, cwd=Path("/home/me"))["folder"]
    assert finding.verdict == "error" and finding.evidence == "/home/me and /home/me/runs/team: no place for jobs"
    assert findings(SMALL, ON_AURORA)["folder"].verdict == "ok"


@pytest.mark.parametrize(
    ("settings", "evidence"),
    [
        ({"ZE_AFFINITY_MASK": "0.1"}, "FLAT with ZE_AFFINITY_MASK=0.1, beside set_device"),
        ({"ZE_FLAT_DEVICE_HIERARCHY": "COMPOSITE"}, "ZE_FLAT_DEVICE_HIERARCHY=COMPOSITE shows 6 devices"),
    ],
)
def test_there_is_one_hierarchy_and_one_way_of_binding(settings: dict[str, str], evidence: str) -> None:
    finding = findings(SMALL, site=changed(load_site("aurora"), **settings))["hierarchy"]
    assert finding.verdict == "error" and evidence in finding.evidence


@pytest.mark.parametrize("option", ["--gpu-bind=list:0.0:0.1", "gpu_tile_compact.sh"])
def test_nobody_else_binds_tiles(option: str) -> None:
    site = load_site("aurora")
    launcher = site.launcher.model_copy(update={"options": (*site.launcher.options, option)})
    finding = findings(SMALL, site=site.model_copy(update={"launcher": launcher}))["hierarchy"]
    assert finding.verdict == "error" and option in finding.evidence and "out of site.yaml" in finding.remedy


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"FI_MR_CACHE_MONITOR": "disabled"}, "FI_MR_CACHE_MONITOR=userfaultfd"),
        ({"CCL_PROCESS_LAUNCHER": "hydra"}, "CCL_PROCESS_LAUNCHER=pmix"),
        ({"CCL_KVS_MODE": "pmi"}, "CCL_KVS_MODE=mpi"),
    ],
)
def test_settings_that_contradict_the_transport(settings: dict[str, str], remedy: str) -> None:
    finding = findings(SMALL, site=changed(load_site("aurora"), **settings))["transport"]
    assert (finding.verdict, finding.remedy) == ("error", remedy)


def test_roles_of_one_world_agree_on_how_they_communicate() -> None:
    """Trainers and the native engine do; vLLM, which takes the module's settings, is no part of their world."""
    apart = Case(nodes=256, ppn=12, tp=1, disaggregated=True)
    assert findings(apart)["transport"].verdict == "ok"
    finding = findings(apart, words=("rollout.engine=vllm",))["transport"]
    assert finding.verdict == "error"
    assert finding.evidence == "CCL_ATL_TRANSPORT differs in one world: trainer mpi, vllm unset"


def test_vllm_in_a_trainers_process_is_told() -> None:
    finding = findings(BIG, words=("rollout.engine=vllm",))["roles"]
    assert finding.verdict == "warning" and "CCL_PROCESS_LAUNCHER" in finding.evidence
    assert findings(BIG, words=("rollout.engine=vllm",), job="rollout")["roles"].verdict == "ok"


def test_the_proxy_is_not_asked_for_hosts_of_the_job() -> None:
    site = load_site("aurora")
    finding = findings(SMALL, site=site.model_copy(update={"no_proxy": (".alcf.anl.gov",)}))["proxy"]
    assert finding.verdict == "error"
    assert "asked for .hsn.cm.aurora.alcf.anl.gov, 127.0.0.1, localhost" in finding.evidence


def test_ranks_fit_the_configuration() -> None:
    finding = findings(SMALL, words=("method.tasks_per_step=16",))["ranks"]
    assert (finding.verdict, finding.remedy) == ("error", "method.tasks_per_step=24")
    finding = findings(SMALL, words=("distributed.strategy=fsdp2", "distributed.shard_size=7"))["ranks"]
    assert (finding.verdict, finding.remedy) == ("error", "distributed.shard_size=12")
    finding = findings(SMALL, words=("rollout.num_tasks=10",), job="rollout")["ranks"]
    assert finding.verdict == "warning" and "rollout.num_tasks=10 for 24 ranks" in finding.evidence
    finding = findings(replace(SMALL, ppn=6), words=("distributed.strategy=zero3",))["ranks"]
    assert finding.verdict == "warning" and "--ppn 12" in finding.remedy


def test_many_nodes_want_spares_and_an_environment_of_their_own() -> None:
    found = findings(BIG, stage=())
    assert found["spares"].verdict == found["staging"].verdict == "warning"
    assert "--stage env.tar.gz" in found["staging"].remedy
    found = findings(SMALL, stage=())
    assert found["spares"].verdict == found["staging"].verdict == "ok"


def test_what_is_to_be_staged_is_there() -> None:
    finding = findings(SMALL, Here(is_site=True, missing=("/flare/x.tar.gz",)))["staging"]
    assert finding.verdict == "error" and finding.evidence == "not there: /flare/x.tar.gz"
    finding = findings(SMALL, Here(is_site=False, missing=("/flare/x.tar.gz",)))["staging"]
    assert finding.verdict == "warning" and finding.evidence == "not seen, as this machine is not aurora: /flare/x.tar.gz"


def test_ranks_that_are_offline_find_their_model(tmp_path: Path) -> None:
    finding = findings(SMALL, words=("model.path=meta-llama/Llama-3.1-8B",))["model"]
    assert finding.verdict == "warning" and "/flare/datasets/model-weights" in finding.remedy
    assert findings(SMALL, words=(f"model.path={tmp_path}",))["model"].verdict == "ok"
    assert (findings(SMALL)["model"].verdict, findings(SMALL)["model"].evidence) == ("ok", "tiny")
    assert findings(SMALL, words=("model.path=smollm2",))["model"].verdict == "ok"
    assert findings(SMALL, words=("model.path=models/big",), stage=(Path("models/big"),))["model"].verdict == "ok"


def test_ranks_that_are_offline_find_their_questions(tmp_path: Path) -> None:
    finding = findings(SMALL, words=("data.kind=gsm8k", "data.path=openai/gsm8k"))["data"]
    assert finding.verdict == "warning" and "data.path=openai/gsm8k: not a file or folder here" in finding.evidence
    assert findings(SMALL, words=("data.kind=gsm8k", f"data.path={tmp_path}"))["data"].verdict == "ok"
    assert findings(SMALL)["data"].evidence == "made by a generator"


def test_the_watchdog_and_checkpoints_fit_the_walltime() -> None:
    finding = findings(SMALL)["hang"]  # 1500 s of 1800
    assert (finding.verdict, finding.remedy) == ("warning", "distributed.hang_s=450, if no save or load takes longer")
    found = findings(BIG, words=("checkpoint.every=0",))
    assert found["hang"].verdict == "ok"
    assert found["checkpoints"].verdict == "warning" and "15 to 60 minutes" in found["checkpoints"].remedy
    assert findings(SMALL, words=("checkpoint.every=0",))["checkpoints"].verdict == "ok"
    assert findings(BIG, words=("checkpoint.every=0",), job="rollout")["checkpoints"].verdict == "skipped"


def test_jobs_that_follow_have_a_place_and_a_checkpoint() -> None:
    assert findings(BIG, chain=3)["chain"].verdict == "ok"
    assert findings(BIG, chain=3, words=("checkpoint.every=0",))["chain"].verdict == "error"
    full = findings(replace(SMALL, nodes=16, walltime="6:00:00"), chain=5, queue="capacity")["chain"]
    assert (full.verdict, full.remedy) == ("error", "--chain 4")


def test_a_laptop_has_nothing_to_refuse() -> None:
    asked = replace(request(SMALL), site=load_site("laptop"), nodes=1, ranks_per_node=2, walltime="", queue="", project="")
    plan: JobPlan = plan_job(asked)
    found = check_job(plan, config_of(SMALL), AT_HOME)
    assert worst(found) == "ok", found
    assert {finding.name for finding in found if finding.verdict == "skipped"} >= {"queue", "binding", "proxy", "folder"}
