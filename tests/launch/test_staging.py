"""Copies spread over nodes that have them; who fails costs itself alone, and an environment that cannot move fails early."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import mas_hpc
from mas_hpc.errors import LaunchError
from mas_hpc.launch import staging
from mas_hpc.launch.plan import JobPlan
from mas_hpc.launch.staging import FAN_OUT, Result, TimeLimit, spread, stage
from mas_hpc.launch.staging_script import SCRIPT
from tests.launch.stand_in_site import Machine, machine, plan_in

HOSTS = ("localhost", "nodeb", "nodec", "noded")


WEIGHTS = bytes(range(256)) * 100


def make_environment(folder: Path, *, torch: bool = False, says: str = "") -> Path:
    """An archive with bin/python and the package inside, as a relocatable environment has them; PyTorch is real or empty."""
    inside = folder / "inside"
    shutil.rmtree(inside, ignore_errors=True)
    (inside / "bin").mkdir(parents=True)
    (inside / "lib").mkdir()
    (inside / "lib" / "mas_hpc").symlink_to(Path(mas_hpc.__file__).parent)
    if not torch:
        (inside / "lib" / "torch.py").write_text(says)
    script = inside / "bin" / "python"
    script.write_text(f'#!/bin/bash\nexport PYTHONPATH="$(dirname "$0")/../lib"\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    archive = folder / "env.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(inside, arcname=".")
    return archive


@pytest.fixture
def here(tmp_path: Path) -> Machine:
    return machine(tmp_path)


def plan_of(here: Machine, *, environment: bool = True, **changes: Any) -> JobPlan:
    """An environment and a model, in folders whose names a shell would take apart; three of four nodes are needed."""
    model = here.folder / "a model; touch hurt"
    model.mkdir()
    (model / "weights").write_bytes(WEIGHTS)
    scratch = here.folder / "scratch" / "mas_hpc"
    staged = [{"source": str(model), "target": f"{scratch}/a model; touch hurt"}]
    if environment:
        staged = [{"source": str(make_environment(here.folder)), "target": f"{scratch}/env"}, *staged]
    group = {"role": "trainer", "nodes": 3, "ranks_per_node": 1, "cores": ("4",)}
    return plan_in(here.folder, **{"nodes": 4, "spares": 1, "stage": staged, "groups": (group,), **changes})


def copies(here: Machine, name: str) -> list[Path]:
    """Of all hosts."""
    return [here.folder / scratch / "mas_hpc" / name for scratch in ("scratch", *(f"scratch@{host}" for host in HOSTS[1:]))]


def left_overs(here: Machine) -> list[Path]:
    return list(here.folder.rglob("*.part.*"))


def with_mount(plan: JobPlan, folder: Path) -> JobPlan:
    scheduler = plan.site.scheduler.model_copy(update={"mounts": {str(folder): "flare"}})
    return plan.model_copy(update={"site": plan.site.model_copy(update={"scheduler": scheduler})})


def test_every_node_has_a_copy_that_starts_there(here: Machine) -> None:
    assert stage(plan_of(here), HOSTS, "localhost", here.environment) == {}
    assert all((folder / "bin/python").is_file() for folder in copies(here, "env"))
    assert all((folder / "weights").read_bytes() == WEIGHTS for folder in copies(here, "a model; touch hurt"))
    assert not list(here.folder.rglob("hurt")), "a name was taken for words of a shell"
    assert not left_overs(here)


def test_a_copy_of_an_earlier_job_is_used_where_it_is_the_same_and_otherwise_goes_with_its_archive(here: Machine) -> None:
    plan = plan_of(here)
    stage(plan, HOSTS, "localhost", here.environment)
    before = [(folder / "bin/python").stat().st_ino for folder in copies(here, "env")]
    copies(here, "a model; touch hurt")[2].joinpath("weights").write_bytes(b"of another")
    stage(plan, HOSTS, "localhost", here.environment)
    assert [(folder / "bin/python").stat().st_ino for folder in copies(here, "env")] == before
    assert all((folder / "weights").read_bytes() == WEIGHTS for folder in copies(here, "a model; touch hurt"))
    source = make_environment(here.folder, says="# another")
    stage(plan, HOSTS, "localhost", here.environment)
    assert all((folder / "lib/torch.py").read_text() == "# another" for folder in copies(here, "env"))
    archives = [file for scratch in here.folder.glob("scratch*") for file in scratch.rglob("archive*")]
    assert [file.read_bytes() for file in archives] == [source.read_bytes()] * 4
    assert not left_overs(here)


def test_two_jobs_on_the_same_nodes_see_whole_copies_only(here: Machine) -> None:
    plan = plan_of(here)
    inside = here.folder / "inside"
    for number in range(300):
        (inside / f"lib/file{number:03}").write_bytes(bytes(1000))
    with tarfile.open(here.folder / "env.tar.gz", "w:gz") as tar:
        tar.add(inside, arcname=".")
    seen = 0
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(stage, plan, HOSTS, "localhost", here.environment) for _ in range(2)]
        while not all(job.done() for job in jobs):
            for folder in copies(here, "env"):
                if folder.exists():
                    assert len(list((folder / "lib").iterdir())) == 302 and (folder / ".staged/archive").is_file()
                    seen += 1
    assert [job.result() for job in jobs] == [{}, {}] and seen
    assert not left_overs(here)


def test_what_fails_its_check_is_never_seen_and_what_was_there_stays(here: Machine) -> None:
    plan = plan_of(here)
    stage(plan, HOSTS, "localhost", here.environment)
    make_environment(here.folder, says="raise ImportError('libsycl.so.8: cannot open shared object file')")
    with pytest.raises(LaunchError, match=r"env\.tar\.gz fails on the first node, localhost: ImportError: libsycl\.so\.8"):
        stage(plan, HOSTS, "localhost", here.environment)
    assert all((folder / "lib/torch.py").read_text() == "" for folder in copies(here, "env"))
    assert not left_overs(here)


def test_a_copy_with_other_bytes_is_refused_with_its_file_and_both_sums(here: Machine) -> None:
    here.plant("corrupts", "nodec")
    lost = stage(plan_of(here, environment=False), HOSTS, "localhost", here.environment)
    expected, found = (hashlib.sha256(data).hexdigest() for data in (WEIGHTS, WEIGHTS.replace(b"\1", b"\2")))
    assert lost.keys() == {"nodec"}
    assert f"/weights: sha256 expected {expected}, found {found}; leave the node out, or stage again" in lost["nodec"]
    assert not copies(here, "a model; touch hurt")[2].exists() and not left_overs(here)


def test_spares_replace_nodes_without_a_copy_and_too_many_of_these_are_an_error(here: Machine) -> None:
    """One of four is more than one in fifty, and what spares are for."""
    here.plant("no_ssh", "nodec")
    plan = plan_of(here, environment=False)
    lost = stage(plan, HOSTS, "localhost", here.environment)
    assert lost == {"nodec": "ssh: connect to host nodec port 22: Connection timed out"}
    here.plant("no_ssh", "nodec", "nodeb")
    with pytest.raises(LaunchError, match=r"staged on 2 of 4 nodes; the job needs 3, .*stage_threshold=0\.98"):
        stage(plan, HOSTS, "localhost", here.environment)


def test_the_first_node_need_not_be_the_one_of_the_job(here: Machine) -> None:
    assert stage(plan_of(here), HOSTS[1:], "localhost", here.environment) == {}
    assert not copies(here, "env")[0].exists()
    assert all((folder / "bin/python").is_file() for folder in copies(here, "env")[1:])


def test_a_node_that_hangs_costs_a_time_that_is_by_size_and_leaves_nothing_behind(
    here: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(staging, "LEAST_S", 1.5)
    monkeypatch.setattr(staging, "END_S", 0.5)
    here.plant("stuck_ssh", "nodec")
    start_s = time.monotonic()
    lost = stage(plan_of(here, environment=False), HOSTS, "localhost", here.environment)
    assert lost == {"nodec": "not done within 2 s (2 s and 0.0 GB at 50 MB/s)"}
    assert time.monotonic() - start_s < 15.0
    child = Path("/proc", (here.home / "stuck_child").read_text().strip(), "stat")
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_time_limit_grows_with_the_size() -> None:
    assert str(TimeLimit(size_bytes=140 * 10**9)) == "2980 s (180 s and 140.0 GB at 50 MB/s)"


# ---- environments that do not stand alone


def test_an_environment_that_is_read_from_elsewhere_is_refused_on_the_first_node(here: Machine) -> None:
    plan = with_mount(plan_of(here), Path(sys.executable).parents[2])
    with pytest.raises(LaunchError, match=r"fails on the first node, localhost: .* is on the shared file system"):
        stage(plan, HOSTS, "localhost", here.environment)


def test_one_that_is_read_from_where_it_was_made_is_refused(here: Machine) -> None:
    plan = plan_of(here)
    script = here.folder / "inside/bin/pip"
    script.write_text(f"#!{sys.prefix}/bin/python3\nimport pip\n")
    with tarfile.open(here.folder / "env.tar.gz", "w:gz") as tar:
        tar.add(here.folder / "inside", arcname=".")
    with pytest.raises(LaunchError, match=rf"is on {sys.prefix}, where it was made"):
        stage(plan, HOSTS, "localhost", here.environment)


def test_folders_are_compared_by_their_parts_and_without_links(here: Machine) -> None:
    plan = plan_of(here)
    assert stage(with_mount(plan, Path(f"{sys.prefix}-of-another")), HOSTS[:1], "localhost", here.environment) == {}
    assert stage(with_mount(plan, Path(sys.prefix[:-1])), HOSTS[:1], "localhost", here.environment) == {}
    link = here.folder / "link"
    link.symlink_to(sys.prefix)
    with pytest.raises(LaunchError, match=rf"is on the shared file system {link}"):
        stage(with_mount(plan, link), HOSTS[:1], "localhost", here.environment)


def test_an_archive_without_an_interpreter_at_its_top_is_told_how_it_is_made(here: Machine) -> None:
    plan = plan_of(here)
    with tarfile.open(here.folder / "env.tar.gz", "w:gz") as tar:
        tar.add(here.folder / "inside", arcname="env")
    with pytest.raises(LaunchError, match=r"no bin/python in it; make the archive with tar -C ENVIRONMENT"):
        stage(plan, HOSTS, "localhost", here.environment)


def test_shellcheck_has_nothing_to_say_of_the_script(tmp_path: Path) -> None:
    file = tmp_path / "staging.sh"
    file.write_text(f"#!/bin/bash\n{SCRIPT}", encoding="utf-8")
    shellcheck = Path(sys.executable).with_name("shellcheck")
    assert subprocess.run([shellcheck, file], capture_output=True, text=True, check=False).stdout == ""


# ---- the tree


def spread_over(
    count: int, bad: frozenset[str] = frozenset(), late: bool = False
) -> tuple[dict[str, str], Counter[str], int, Counter[str]]:
    """What failed, how many each source served, the most that one served at a time, and the tries of each host.

    Of hosts 0..count-1 behind a root.
    """
    served, active, tries, most = Counter[str](), Counter[str](), Counter[str](), 0

    async def send(source: str, target: str) -> Result:
        nonlocal most
        tries[target] += 1
        active[source] += 1
        most = max(most, active[source])
        await asyncio.sleep(0)
        active[source] -= 1
        if source in bad or target in bad:
            return Result(why="broken", is_late=late)
        served[source] += 1
        return Result()

    return asyncio.run(spread("root", [str(number) for number in range(count)], send)), served, most, tries


def test_everyone_is_served_once_and_nobody_serves_more_than_eight_at_a_time() -> None:
    failed, served, most, _ = spread_over(500)
    assert failed == {}
    assert sum(served.values()) == 500 and most == FAN_OUT
    assert served["root"] < 250, "those that have it serve too"


def test_bad_hosts_cost_themselves_alone() -> None:
    failed, served, _, tries = spread_over(300, frozenset({"3", "77", "299"}))
    assert failed == {"3": "broken", "77": "broken", "299": "broken"}
    assert sum(served.values()) == 297
    assert tries["77"] == 3
    assert spread_over(300, frozenset({"77"}), late=True)[3]["77"] == 2, "a node that hangs is waited for twice"


def test_a_source_that_fails_is_asked_less_and_the_root_as_before() -> None:
    """The root fails first to ten hosts: it serves the others all the same; another source loses one of its eight places."""
    served = Counter[str]()

    async def send(source: str, target: str) -> Result:
        await asyncio.sleep(0)
        served[source] += 1
        return Result(why="broken") if target.startswith("bad") or source == "0" else Result()

    bad = [f"bad{number}" for number in range(10)]
    failed = asyncio.run(spread("root", [*bad, *(str(number) for number in range(100))], send))
    assert set(bad) <= failed.keys()
    assert served["0"] <= FAN_OUT
