"""Scripts: the same as those that are kept, clean for shells, and safe whatever a user's words are."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from mas_hpc.launch import render as render_module
from mas_hpc.launch.checks import Here, check_job
from mas_hpc.launch.command import example_words
from mas_hpc.launch.finding import worst
from mas_hpc.launch.plan import JobPlan
from mas_hpc.launch.render import render, submit_words
from mas_hpc.launch.request import plan_job
from mas_hpc.launch.site import load_site
from tests.launch.golden_jobs import GOLDEN, KEPT, Case, config_of, plan_of, product, request, text_of

SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
HOSTILE = 'it\'s $(touch pwned) `touch pwned` "quoted" ; touch pwned # \\ & | > x *'
"""No new line: a path with one is refused."""


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
def test_the_job_is_as_it_is_kept(case: Case) -> None:
    """To change it on purpose: python -m tests.launch.golden_jobs, and look at the difference."""
    assert text_of(case) == (GOLDEN / f"{case.name}.txt").read_text(encoding="utf-8")


def test_nothing_else_is_kept() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == {case.name for case in KEPT}


@pytest.mark.parametrize("case", product(), ids=lambda case: case.name)
def test_every_size_is_legal_and_bash_reads_its_script(case: Case) -> None:
    plan = plan_of(case)
    findings = check_job(plan, config_of(case), Here(is_site=False))
    assert worst(findings) in ("ok", "warning"), [finding for finding in findings if finding.verdict == "error"]
    assert subprocess.run(["bash", "-n"], input=render(plan), text=True, check=False).returncode == 0
    assert JobPlan.model_validate_json(plan.model_dump_json()) == plan


def test_shellcheck_has_nothing_to_say(tmp_path: Path) -> None:
    slurm = replace(request(next(product())), site=load_site("slurm"), ranks_per_node=4, walltime="1:00:00")
    scripts = {case.name: render(plan_of(case)) for case in product()}
    assert _shellcheck(tmp_path, {**scripts, "slurm": render(plan_job(slurm))}) == ""
    # SC2016: "expressions don't expand in single quotes", which is what they are for.
    assert _shellcheck(tmp_path / "hostile", {"hostile": render(_hostile(tmp_path))}, "--exclude=SC2016") == ""


def _shellcheck(folder: Path, scripts: dict[str, str], *options: str) -> str:
    assert SHELLCHECK, "pip install -c constraints.txt -e '.[dev]'"
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / f"{name}.sh").write_text(text, encoding="utf-8")
    files = [str(folder / f"{name}.sh") for name in scripts]
    return subprocess.run([SHELLCHECK, *options, *files], capture_output=True, text=True, check=False).stdout


def _hostile(folder: Path) -> JobPlan:
    """A job whose paths, modules and settings are written by somebody who wants a shell."""
    site = load_site("aurora")
    common = site.common.model_copy(update={"set": {**site.common.set, "HF_HOME": HOSTILE}})
    asked = replace(
        request(Case(nodes=1, ppn=12, tp=1, disaggregated=False)),
        site=site.model_copy(update={"common": common, "modules": (HOSTILE,)}),
        cwd=folder / HOSTILE.replace("/", ""), python=folder / f"python {HOSTILE}",
        overrides=(f"data.path={HOSTILE}",),
    )  # fmt: skip
    return plan_job(asked)


def test_a_users_words_reach_the_program_as_they_are_and_no_shell(tmp_path: Path) -> None:
    """The script is run, with a python that writes down what it is given."""
    plan = _hostile(tmp_path)
    Path(plan.cwd).mkdir()
    told = tmp_path / "told.json"
    python = Path(plan.python)
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], os.getcwd(), os.environ['HF_HOME'], os.environ['LOADED']], open({str(told)!r}, 'w'))\n",
        encoding="utf-8",
    )
    python.chmod(0o755)
    stub = 'module() { export LOADED="$2"; }\n'  # a login shell's; load NAME
    done = subprocess.run(
        ["bash"], input=stub + render(plan), text=True, cwd=tmp_path, check=False, env={"PATH": os.environ["PATH"]}
    )
    assert done.returncode == 0
    job = f"{plan.cwd}/runs/team.job/job.json"
    assert json.loads(told.read_text(encoding="utf-8")) == [["-m", "mas_hpc.launch.job", job], plan.cwd, HOSTILE, HOSTILE]
    assert not list(tmp_path.rglob("pwned"))


def test_the_command_that_is_shown_is_the_one_that_is_run(tmp_path: Path) -> None:
    words = example_words(_hostile(tmp_path))
    assert tuple(shlex.split(shlex.join(words))) == words
    assert f"data.path={HOSTILE}" in words


def test_a_script_stops_where_a_module_is_missing(tmp_path: Path) -> None:
    plan = plan_of(Case(nodes=1, ppn=12, tp=1, disaggregated=False)).model_copy(update={"cwd": str(tmp_path)})
    done = subprocess.run(["bash"], input="module() { return 1; }\n" + render(plan), text=True, check=False)
    assert done.returncode == 1


def test_a_template_that_asks_for_what_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(KEPT[0])
    values = render_module._values(plan)
    monkeypatch.setattr(render_module, "_values", lambda plan: {name: v for name, v in values.items() if name != "queue"})
    with pytest.raises(UndefinedError, match="queue"):
        render(plan)


def test_jobs_that_follow_wait_for_the_end_of_the_one_before() -> None:
    aurora = plan_of(KEPT[0])
    assert submit_words(aurora, "/r/job.sh") == ("qsub", "/r/job.sh")
    assert submit_words(aurora, "/r/job.sh", after="7.aurora") == ("qsub", "-W", "depend=afterany:7.aurora", "/r/job.sh")
    slurm = aurora.model_copy(update={"site": load_site("slurm")})
    assert submit_words(slurm, "/r/job.sh", after="7") == ("sbatch", "--parsable", "--dependency=afterany:7", "/r/job.sh")
