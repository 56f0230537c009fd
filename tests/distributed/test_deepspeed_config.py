"""DeepSpeed's settings: the files that users start from are the built-in ones, and what the run decides is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mas_hpc.config_distributed import DistributedConfig
from mas_hpc.distributed.deepspeed_config import OURS, built_in, engine_settings, read_settings
from mas_hpc.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"


@pytest.mark.parametrize(
    ("name", "stage", "offload"), [("zero1", 1, False), ("zero2", 2, False), ("zero3", 3, False), ("zero3_offload", 3, True)]
)
def test_the_files_are_the_built_in_settings(name: str, stage: int, offload: bool) -> None:
    found = json.loads((CONFIGS / f"{name}.json").read_text())
    assert found == built_in(stage, offload=offload)
    assert read_settings(DistributedConfig(strategy=f"zero{stage}", deepspeed=str(CONFIGS / f"{name}.json"))) == found
    assert read_settings(DistributedConfig(strategy=f"zero{stage}", offload=offload)) == found


@pytest.mark.parametrize("key", OURS)
def test_a_file_that_decides_what_the_run_decides_is_refused(key: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(built_in(2) | {key: 1}))
    with pytest.raises(ConfigError, match=rf"mine.json'.*{key} \(decided by .*take it out"):
        read_settings(DistributedConfig(strategy="zero2", deepspeed=str(file)))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"zero_optimization": 2}'])
def test_a_file_that_is_none_of_deepspeeds_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="start from one of configs/deepspeed"):
        read_settings(DistributedConfig(strategy="zero2", deepspeed=str(file)))


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"absent.json.*start from one of configs/deepspeed"):
        read_settings(DistributedConfig(strategy="zero2", deepspeed="absent.json"))


def test_a_file_of_another_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stage=3, but distributed.strategy=zero2"):
        read_settings(DistributedConfig(strategy="zero2", deepspeed=str(CONFIGS / "zero3.json")))


def test_a_file_and_the_knob_do_not_both_say_where_states_are_kept() -> None:
    with pytest.raises(ConfigError, match=r"set distributed.offload=false"):
        read_settings(DistributedConfig(strategy="zero3", offload=True, deepspeed=str(CONFIGS / "zero3.json")))


@pytest.mark.parametrize(
    ("key", "value", "strategy"),
    [
        ("shard_size", 2, "zero3"),
        ("compute_dtype", "bfloat16", "ddp"),
        ("offload", True, "ddp"),
        ("deepspeed", "x.json", "fsdp2"),
    ],
)
def test_a_knob_that_the_strategy_does_not_read_is_refused(key: str, value: object, strategy: str) -> None:
    with pytest.raises(ValueError, match=rf"distributed.{key}={value}: distributed.strategy={strategy} does not read it"):
        DistributedConfig(strategy=strategy, **{key: value})  # type: ignore[arg-type]


def test_bfloat16_weights_have_gradients_in_float32() -> None:
    settings = engine_settings(built_in(2), is_bfloat16=True)
    assert settings["bf16"] == {"enabled": True}
    assert settings["communication_data_type"] == settings["data_types"]["grad_accum_dtype"] == "fp32"
    assert "bf16" not in engine_settings(built_in(2), is_bfloat16=False)
