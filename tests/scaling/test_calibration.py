from pathlib import Path

import pytest

from mas_hpc.config import RunConfig
from mas_hpc.errors import ConfigError
from mas_hpc.launch.site import load_site
from mas_hpc.scaling.calibration import Calibration, Line, fit_line, read_calibration
from mas_hpc.scaling.load import Lengths
from mas_hpc.scaling.machine import machine_of
from mas_hpc.scaling.shape import shape_of
from mas_hpc.scaling.step import Question, predict

FOUND = Calibration(
    host="here", date="2026-01-01", versions={"torch": "2"}, device="cpu", ranks=2, gemm_tflops=0.1, pass_tflops=0.05,
    memory_gb_per_s=10, optimizer_gb_per_s=5, spread=0.02,
    collectives=(Line(collective="all_reduce", latency_s=1e-3, s_per_byte=1e-9, residual=0.1),),
)  # fmt: skip


def test_a_line_is_found_and_neither_end_is_negative() -> None:
    sizes = [1e3, 1e5, 1e7]
    line = fit_line("all_reduce", sizes, [1e-4 + 2e-9 * size for size in sizes])
    assert (line.latency_s, line.s_per_byte, line.residual) == pytest.approx((1e-4, 2e-9, 0.0), abs=1e-9)
    falling = fit_line("all_reduce", sizes, [3e-4, 2e-4, 1e-4])
    assert falling.latency_s > 0
    assert falling.s_per_byte == 0


def test_a_file_that_is_none_names_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    with pytest.raises(ConfigError, match="mas-hpc calibrate -o"):
        read_calibration(file)
    file.write_text('{"ranks": 2}')
    with pytest.raises(ConfigError, match="host: Field required"):
        read_calibration(file)
    file.write_text(FOUND.model_dump_json())
    assert read_calibration(file) == FOUND


def test_a_prediction_by_hand_from_what_was_measured() -> None:
    # One chain of 256 tokens a rank: 6 body T + 6 head N + 12 attention pairs at 0.05 TFLOP/s; one bucket of 4 bytes a weight;
    # AdamW's 7 passes at 5 GB/s and 5 of clipping and buckets at 10 GB/s.
    config = RunConfig.model_validate(
        {"model": {"hidden_size": 256}, "team": {"topology": "single"}, "method": {"kind": "sft", "batch_size": 2}}
    )
    shape = shape_of(config.model)
    lengths = Lengths(question=32, completion=224, sigma=0, limit=256, source="here")
    machine = machine_of(load_site("laptop"), FOUND)
    parts = predict(Question(config=config, shape=shape, lengths=lengths, machine=machine), 1).parts
    flops = 6 * shape.body * 256 + 6 * shape.head * 224 + 12 * shape.attention * 256**2 / 2
    num_bytes = 4 * shape.parameters
    assert parts["passes"] == pytest.approx(flops / 0.05e12)
    assert parts["collectives"] == pytest.approx(1e-3 + 1e-9 * num_bytes)
    assert parts["optimizer"] == pytest.approx(7 * num_bytes / 5e9 + 5 * num_bytes / 10e9)
    assert parts["decode"] == parts["sync"] == 0
