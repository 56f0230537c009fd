"""The rules of the design, executed: who may import whom, what stays light, how large things may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mas_hpc.config_file import knobs

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mas_hpc"
KERNELS = ROOT / "kernels" / "mas_hpc_kernels"
LEAVES = {"types", "errors", "exits", "prefix_tree", "answers", "checksum", "hub"}  # everybody may import them
ALLOWED = {
    **{leaf: set() for leaf in LEAVES},
    "config_methods": set(),
    "config_distributed": {"config_methods"},
    "config_team": {"agents.role", "config_methods"},
    "config": {"config_methods", "config_team", "config_distributed"},
    "config_file": {"config"},
    "agents": set(),
    "orchestration": {"agents", "rollout.engine"},
    "models": {"config"},
    "rollout": {"config", "distributed", "models"},
    "evaluation": {"agents", "orchestration", "data"},
    "credit_assignment": set(),
    "data": {"config"},
    "distributed": {"config"},
    "launch": {"config", "distributed"},
    "doctor": {"config", "distributed", "launch"},
    "scaling": {"config", "distributed", "launch"},
    "training": {"config", "credit_assignment", "data", "distributed", "models"},
}
FREE = {
    "run",
    "resume",
    "rollouts",
    "engines",
    "loading",
    "serving",
    "teams",
    "phases",
    "cli",
    "cli_machine",
    "cli_options",
    "plan",
    "__main__",
}


def sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])


def unit_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", [f for f in sources() if f.is_relative_to(PACKAGE)], ids=lambda f: str(f.relative_to(ROOT)))
def test_units_import_only_what_the_design_allows(file: Path) -> None:
    unit = unit_of(file)
    if unit in FREE | {"__init__"}:
        return
    allowed = ALLOWED[unit] | LEAVES | {unit}
    if "config" in allowed:
        allowed |= {"config_methods", "config_team", "config_distributed"}  # the other parts of the page
    for module in imported_modules(file):
        if module.startswith("mas_hpc.") and module != "mas_hpc":
            inner = module.removeprefix("mas_hpc.")
            assert any(inner == name or inner.startswith(f"{name}.") for name in allowed), f"{file} imports {module}"
        if module.startswith("mas_hpc_kernels"):
            assert unit == "training", f"{file} imports {module}"


def test_kernels_never_import_the_project() -> None:
    for file in KERNELS.rglob("*.py"):
        assert not [module for module in imported_modules(file) if module == "mas_hpc" or module.startswith("mas_hpc.")], file
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the PyPI package `kernels`"


def test_collectives_and_launchers_stay_in_distributed() -> None:
    for file in sources():
        if file.is_relative_to(PACKAGE / "distributed"):
            continue
        for module in imported_modules(file):
            assert not module.startswith(("torch.distributed", "mpi4py", "deepspeed")), f"{file} imports {module}"
            assert not module.startswith("vllm") or file.name == "vllm.py", f"{file} imports {module}"


def test_the_environment_is_read_by_who_reads_it_as_a_rank_and_by_who_writes_it_for_ranks() -> None:
    for file in sources():
        reads = "os.environ" in file.read_text(encoding="utf-8") or "getenv" in file.read_text(encoding="utf-8")
        assert not reads or file in (PACKAGE / "distributed" / "world.py", PACKAGE / "distributed" / "supervisor.py"), file


@pytest.mark.parametrize(
    "module", ["mas_hpc.config", "mas_hpc.types", "mas_hpc.plan", "mas_hpc.cli", "mas_hpc.credit_assignment.at_grpo"]
)
def test_light_modules_leave_torch_out(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_there_are_few_knobs() -> None:
    keys = {key.split(" (")[0] for key, *_ in knobs()}
    distinct = {key for key in keys if not key.startswith("warm_start.")}  # the same knobs as method (sft)
    others = [key for key in distinct if not key.startswith("method.")]
    assert len(others) <= 85, len(others)  # a team, and how it is spread (also over a card's tiles) and kept, is YAML alone
    assert len(distinct) <= 154, len(distinct)  # of all seven methods; verl's PPO alone resolves to 878
    assert max(key.count(".") for key in distinct) <= 2


def test_every_knob_says_what_it_means() -> None:
    assert [key for key, _, _, meaning in knobs() if not meaning] == []


@pytest.mark.parametrize("file", sources(), ids=lambda f: str(f.relative_to(ROOT)))
def test_files_and_functions_stay_small(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 400, f"{file}: {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{file}:{node.lineno} {node.name}: {length} lines"


@pytest.mark.parametrize("file", sorted((PACKAGE / "training" / "losses").glob("*.py")), ids=lambda f: f.name)
def test_losses_are_pure_and_short(file: Path) -> None:
    assert file.read_text(encoding="utf-8").count("\n") <= 120
    for module in imported_modules(file):
        inside = module.startswith("mas_hpc.training.losses") or not module.startswith("mas_hpc")
        assert inside and not module.startswith("torch.distributed"), f"{file} imports {module}"
