"""Byte sizes: exact, and nothing else passes for one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_embed.core.footprint import Footprint, format_bytes, parse_bytes
from recsys_embed.errors import ConfigError

UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@given(st.integers(1, 10**25), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " ", "\t"]))
def test_whole_sizes_are_exact(number: int, unit: str, space: str) -> None:
    for text in (f"{number}{space}{unit}", f" {number}{space}{unit.lower()} ", f"{number}.0{unit.upper()}"):
        assert parse_bytes(text) == number * UNITS[unit]
    assert parse_bytes(number) == number


def test_fractions_round_down() -> None:
    assert parse_bytes("1.5GiB") == 3 * 2**29
    assert parse_bytes("0.1KB") == 100
    assert parse_bytes("1.9B") == 1
    assert parse_bytes(np.int64(7)) == 7


@pytest.mark.parametrize(
    "size",
    [
        0,
        -1,
        True,
        False,
        None,
        1.5,
        float("nan"),
        b"1MiB",
        [],
        "",
        " ",
        "MiB",
        "-1MiB",
        "+1MiB",
        "1e400",
        "1e3",
        "1e400GiB",
        "0",
        "0.5",
        "0x10",
        "1_000",
        "1,5GiB",
        "1.GiB",
        ".5GiB",
        "1 Mi B",
        "1MiBs",
        "5 bananas",
        "٣MiB",
        "３MiB",
        "1²",
        "inf",
        "nan",
        "9" * 400 + "GiB",
        "1." + "0" * 5000 + "B",
        "1MiB\x00",
    ],
)
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match="byte"):
        parse_bytes(size)


@given(st.integers(0, 10**18))
def test_text_reads_back(size: int) -> None:
    text = format_bytes(size)
    if size >= 1024:
        assert abs(parse_bytes(text) - size) <= 0.006 * size
    if 1 <= size < 1024:
        assert parse_bytes(text) == size


@given(*[st.tuples(*[st.integers(0, 10**12)] * 4)] * 2)
def test_footprints_add_by_cause(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    total = Footprint(*a) + Footprint(*b)
    assert (total.weights, total.index, total.optimizer, total.gradient) == tuple(
        x + y for x, y in zip(a, b, strict=True)
    )
    assert total.serve == a[0] + a[1] + b[0] + b[1]
    assert total.train == sum(a) + sum(b)
