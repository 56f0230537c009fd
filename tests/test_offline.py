"""No network is touched: with a local model, with what the hub's cache holds, and when that is missing."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import constants

from mas_hpc.config import ModelConfig
from mas_hpc.data.files import fetch, read_rows
from mas_hpc.errors import ConfigError, DataError
from mas_hpc.models.load import count_parameters, load_model, load_tokenizer, model_folder
from tests.distributed.launch import ROOT, environment

COMMIT = "0123456789012345678901234567890123456789"
CUT_OFF = """
import ipaddress, socket, sys
connect, look_up = socket.socket.connect, socket.getaddrinfo

def refuse(host):
    raise SystemExit(f"asked the network for {host}")

def local_connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and not ipaddress.ip_address(address[0]).is_loopback:
        refuse(address)
    return connect(self, address)

def local_look_up(host, *rest, **options):
    if host not in ("localhost", "127.0.0.1", "::1", socket.gethostname(), None):
        refuse(host)
    return look_up(host, *rest, **options)

socket.socket.connect, socket.getaddrinfo = local_connect, local_look_up
from mas_hpc.cli import main
sys.argv = ["mas-hpc", *sys.argv[1:]]
main()
"""
SMALL = ("method.steps=1", "evaluation.num_tasks=1", "data.num_train=2", "data.num_test=1")


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A home of the hub's cache with one model, of/model, and one data set, of/data."""
    home = tmp_path / "home"
    snapshots = {kind: home / "hub" / f"{kind}s--of--{kind.removesuffix('set')}" for kind in ("model", "dataset")}
    for folder in snapshots.values():
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(COMMIT)
        (folder / "snapshots" / COMMIT).mkdir(parents=True)
    model, tokenizer = load_model(ModelConfig(hidden_size=16, num_layers=1, num_heads=2), seed=0)
    model.save_pretrained(snapshots["model"] / "snapshots" / COMMIT)
    tokenizer.save_pretrained(snapshots["model"] / "snapshots" / COMMIT)
    for first, split in ((0, "train"), (4, "test")):
        rows = [{"prompt": f"Q{number}", "completion": f"S{number}"} for number in range(first, first + 4)]
        file = snapshots["dataset"] / "snapshots" / COMMIT / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def cut_off(folder: Path, *words: str, home: Path, offline: bool) -> None:
    """A command of ours that ends when it asks for another machine."""
    variables = environment({"HF_HOME": str(home), **({"HF_HUB_OFFLINE": "1"} if offline else {})})
    variables = {name: value for name, value in variables.items() if name not in ("HF_HUB_CACHE", "HF_DATASETS_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", CUT_OFF, *words, f"runs_dir={folder / 'runs'}", *SMALL], capture_output=True, text=True,
        check=False, cwd=ROOT, timeout=100, env=variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_local_model_and_generated_questions_need_no_network(tmp_path: Path, hub: Path) -> None:
    local = tmp_path / "model"
    shutil.copytree(hub / "hub" / "models--of--model" / "snapshots" / COMMIT, local)
    changes = (f"model.path={local}", "warm_start=null", "method.tasks_per_step=1")
    cut_off(tmp_path, "train", "configs/at_grpo.yaml", *changes, home=tmp_path / "none", offline=False)


@pytest.mark.slow
def test_what_the_hubs_cache_holds_is_enough_offline(tmp_path: Path, hub: Path) -> None:
    changes = ("model.path=of/model", "data={kind: documents, path: of/data}", "method.batch_size=2")
    cut_off(tmp_path, "train", "configs/sft.yaml", *changes, home=hub, offline=True)


def test_a_model_that_is_cached_is_not_asked_for_again_even_online(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    assert load_model(ModelConfig(path="of/model"), seed=0)[0].config.hidden_size == 16
    assert load_tokenizer(ModelConfig(path="of/model")).encode("1") == [1]
    assert (
        count_parameters(ModelConfig(path="of/model")) == load_model(ModelConfig(path="of/model"), seed=0)[0].num_parameters()
    )


def test_what_the_cache_lacks_is_one_clear_error_offline(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    what = rf"not in the hub's cache {hub / 'hub'}, and HF_HUB_OFFLINE forbids .* hf download of/another"
    for ask in (load_model, load_tokenizer, count_parameters, partial(model_folder, refresh=True)):
        options = {"seed": 0} if ask is load_model else {}
        with pytest.raises(ConfigError, match=rf"model.path='of/another': .*{what}"):
            ask(ModelConfig(path="of/another"), **options)
    for read in (read_rows, fetch):
        with pytest.raises(DataError, match=rf"data.path='of/another': .*{what} --repo-type dataset"):
            read("of/another")


def forbidden(host: str, *rest: object, **options: object) -> None:
    raise AssertionError(f"asked the network for {host}")
