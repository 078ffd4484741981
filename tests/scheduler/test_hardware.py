"""The catalogue, and devices of one's own."""

from __future__ import annotations

import json

import pytest

from scheduler.hardware import CATALOGUE, GIB, device_from_json

MINE = {
    "name": "mine",
    "levels": [
        {"name": "memory", "capacity_bytes": 1e10, "bytes_per_second": 1e11},
        {"name": "cache", "capacity_bytes": 1e7, "bytes_per_second": 1e12},
    ],
    "flops_per_second": 1e12,
}


@pytest.mark.parametrize("device", CATALOGUE.values(), ids=CATALOGUE.keys())
def test_every_device_of_the_catalogue_is_sane_and_names_its_source(device) -> None:
    sizes = [level.capacity_bytes for level in device.levels]
    speeds = [level.bytes_per_second for level in device.levels]
    assert sizes == sorted(sizes) and speeds == sorted(speeds, reverse=True)
    assert min(sizes) > 0 and min(speeds) > 0 and device.flops_per_second > 0 and device.host_seconds >= 0
    for share in (device.weight_share, device.kv_share, device.flops_share, device.attention_share):
        assert 0 < share <= 1
    assert device.source
    assert device.memory is device.levels[-1]


def test_an_h100_has_the_figures_of_its_datasheet() -> None:
    h100 = CATALOGUE["h100"]
    assert (h100.memory.capacity_bytes, h100.memory.bytes_per_second) == (80 * GIB, 3.35e12)
    assert h100.flops_per_second == 989e12


def test_a_device_of_ones_own_is_perfect_where_nothing_is_said_and_its_levels_are_sorted() -> None:
    device = device_from_json(json.dumps(MINE))
    assert [level.name for level in device.levels] == ["cache", "memory"]
    assert (device.host_seconds, device.weight_share, device.kv_share) == (0.0, 1.0, 1.0)


def test_a_working_set_is_read_at_the_speed_of_the_smallest_level_that_holds_it() -> None:
    device = device_from_json(json.dumps(MINE))
    assert device.level_for(1e7).name == "cache"
    assert device.level_for(1e7 + 1).name == device.level_for(1e12).name == "memory"


def test_higher_rates_are_taken_over_and_lower_ones_are_not() -> None:
    device = device_from_json(json.dumps(MINE))
    assert device.raised(1e7, 1e11, 1e11) == device
    faster = device.raised(1e12, 3e11, 5e12)
    assert [level.bytes_per_second for level in faster.levels] == [1e12, 3e11]
    assert faster.flops_per_second == 5e12


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"flops_per_second": 0}, "flops_per_second"),
        ({"flops_per_second": "fast"}, "str"),
        ({"colour": "blue"}, "colour"),
        ({"levels": []}, "memory level"),
        ({"levels": [{"name": "memory", "capacity_bytes": 1e9, "bytes_per_second": 0}]}, "bandwidth"),
        ({"levels": [{"name": "memory", "capacity_bytes": 1e9, "bytes_per_second": "3"}]}, "str"),
        ({"levels": [{"name": "memory", "capacity_bytes": 1e9}]}, "bytes_per_second"),
        ({"levels": 3}, "int"),
        ({"kv_share": 0}, "kv_share"),
    ],
)
def test_a_wrong_description_is_a_value_error_that_says_what_is_wrong(change: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=f"not a device description.*{word}"):
        device_from_json(json.dumps({**MINE, **change}))


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"levels": [{}]}'])
def test_what_is_no_description_at_all_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="not a device description"):
        device_from_json(text)
