"""Sites are data that is checked as it is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from mas_hpc.errors import ConfigError
from mas_hpc.launch.site import FOLDER, load_site, parse_cores

SITES = sorted(file.parent.name for file in FOLDER.glob("*/site.yaml"))


@pytest.mark.parametrize("name", SITES)
def test_every_shipped_site_can_be_read_and_kept_as_json(name: str) -> None:
    site = load_site(name)
    assert site.name == name
    assert type(site).model_validate_json(site.model_dump_json()) == site


def test_aurora_is_as_its_sources_say() -> None:
    node = load_site("aurora").node
    assert [node.socket_of_core(core) for core in (0, 51, 52, 103, 104, 155, 156, 207)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [node.socket_of_tile(tile) for tile in range(12)] == [0] * 6 + [1] * 6
    assert [node.nic_of_core(core) for core in (4, 9, 14, 19, 20, 25)] == [0, 1, 2, 3, 0, 1]  # ALCF's list for DAOS
    assert [node.nic_of_core(core) for core in (56, 61, 66, 71, 74, 79)] == [4, 5, 6, 7, 6, 7]


@pytest.mark.parametrize(("text", "cores"), [("4", (4,)), ("1-3,105", (1, 2, 3, 105)), ("7-7", (7,))])
def test_lists_of_cores(text: str, cores: tuple[int, ...]) -> None:
    assert parse_cores(text) == cores


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "1-3,2", "1 2", "-1", "1-"])
def test_what_is_no_list_of_cores_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="cores"):
        parse_cores(text)


def test_a_site_that_is_unknown_or_wrong_is_told_by_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"site 'frontier': expected one of \['aurora', 'laptop', 'slurm'\], or the path"):
        load_site("frontier")
    file = tmp_path / "site.yaml"
    text = (FOLDER / "aurora/site.yaml").read_text(encoding="utf-8")
    file.write_text(text.replace("tiles: 12", "tiles: twelve"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"site.yaml: node.tiles: Input should be a valid integer"):
        load_site(str(file))
    file.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"site.yaml: expected the keys of a site"):
        load_site(str(file))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"site.yaml: not valid YAML: 'utf-8' codec"):
        load_site(str(file))
    file.write_text(text.replace("[4-14, 17-27,", "[4-14, 27-17,", 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bindings.1.cores: .*'27-17': expected numbers and ranges"):
        load_site(str(file))
    with pytest.raises(ConfigError, match=r"no bind list for 7 ranks a node; expected one of \[12, 6\]"):
        load_site("aurora").binding(7)


def test_each_setting_of_aurora_has_its_source() -> None:
    lines = (FOLDER / "aurora/site.yaml").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("common:"))
    end = next(number for number, line in enumerate(lines) if line.startswith("proxy:"))
    commented = [number for number in range(start, end) if "#" in lines[number]]
    for number in range(start, end):
        if ": " in lines[number].partition("#")[0]:  # a setting: the source is on its line, or on one shortly before
            assert any(number - 6 <= near <= number for near in commented), lines[number]
