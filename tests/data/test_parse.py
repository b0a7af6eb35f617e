"""The word-at-a-time parser against the plain one, and every kind of bad row with what is said about it."""

from __future__ import annotations

import pytest
from helpers import line, random_rows
from hypothesis import given
from hypothesis import strategies as st

from recsys_embed.data.criteo.explain import BadRow, GoodRow, read_line
from recsys_embed.data.criteo.layout import MAX_LINE_BYTES, LineLayout
from recsys_embed.data.criteo.parse import BLANK_INT, ParsedBlock, parse_block

ints = st.one_of(st.none(), st.integers(-(2**63) + 1, 2**63 - 1), st.integers(-100, 10**8 + 1))
GOOD = line(random_rows(1, 0)[0])


def as_rows(block: ParsedBlock) -> list[GoodRow]:
    out = []
    for k in range(block.rows):
        label = None if block.labels is None else int(block.labels[k])
        numbers = tuple(None if v == BLANK_INT else int(v) for v in block.ints[:, k])
        cats = tuple(None if m else int(v) for v, m in zip(block.cats[:, k], block.missing[:, k], strict=True))
        out.append(GoodRow(label, numbers, cats))
    return out


def rows(bits: int, labels: bool) -> st.SearchStrategy[GoodRow]:
    top = 2**32 - 1 if bits == 32 else 2**63 - 1
    cats = st.one_of(st.none(), st.integers(0, top))
    label = st.integers(0, 1) if labels else st.none()
    return st.builds(GoodRow, label, st.tuples(*[ints] * 13), st.tuples(*[cats] * 26))


@given(st.data(), st.sampled_from([32, 64]), st.booleans(), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
def test_text_gives_back_the_values(data: st.DataObject, bits: int, labels: bool, newline: bytes, upper: bool) -> None:
    wanted = data.draw(st.lists(rows(bits, labels), min_size=1, max_size=6))
    lines = [line(r) for r in wanted]
    if upper:
        lines = [raw.upper() for raw in lines]
    block = parse_block(b"".join(x + newline for x in lines), LineLayout(labels=labels, id_bits=bits))
    assert as_rows(block) == wanted
    assert block.lines == len(wanted)
    assert not block.bad


@given(st.lists(st.one_of(st.binary(max_size=400), st.just(GOOD)), min_size=1, max_size=8), st.integers(1, 10**6))
def test_any_bytes_are_rows_or_bad_rows_as_the_slow_reader_says(raw: list[bytes], first: int) -> None:
    lines = [r.replace(b"\n", b"") for r in raw]
    block = parse_block(b"".join(x + b"\n" for x in lines), LineLayout(), first_line=first)
    wanted = [read_line(x, LineLayout(), first + i) for i, x in enumerate(lines)]
    assert as_rows(block) == [r for r in wanted if isinstance(r, GoodRow)]
    assert block.bad == [r for r in wanted if isinstance(r, BadRow)]
    assert block.lines == block.rows + len(block.bad) == len(lines)


@given(st.integers(0, 39), st.binary(max_size=20).filter(lambda b: not set(b) & set(b"\t\n\r")))
def test_one_odd_field_is_judged_as_the_slow_reader_judges_it(column: int, value: bytes) -> None:
    cells = GOOD.split(b"\t")
    cells[column] = value
    raw = b"\t".join(cells)
    block = parse_block(GOOD + b"\n" + raw + b"\n", LineLayout())
    wanted = read_line(raw, LineLayout(), 2)
    if isinstance(wanted, GoodRow):
        assert as_rows(block)[1] == wanted
    else:
        assert block.bad == [wanted]


def swap(column: str, value: bytes) -> bytes:
    cells = GOOD.split(b"\t")
    cells[LineLayout().names.index(column)] = value
    return b"\t".join(cells)


@pytest.mark.parametrize(
    ("raw", "column", "parts"),
    [
        (GOOD + b"\t1", None, ["expected 40 tab-separated fields", "got 41"]),
        (b"0\t1", None, ["expected 40 tab-separated fields", "got 2"]),
        (b"", None, ["got an empty line"]),
        (GOOD.replace(b"\t", b","), None, ["40 separated by comma", "--separator comma"]),
        (GOOD.partition(b"\t")[2], None, ["got 39", "--labels no"]),
        (swap("label", b"2"), "label", ["expected 0 or 1", "'2'"]),
        (swap("label", b""), "label", ["expected 0 or 1", "''"]),
        (swap("I4", b"4.5"), "I4", ["expected an integer or nothing", "'4.5'"]),
        (swap("I4", b"-"), "I4", ["expected an integer or nothing", "'-'"]),
        (swap("I4", b"1e5"), "I4", ["expected an integer", "'1e5'"]),
        (swap("I4", b" 7"), "I4", ["expected an integer", "' 7'"]),
        (swap("I13", b"9" * 19), "I13", ["expected an integer of 64 bits"]),
        (swap("C3", b"0123456g"), "C3", ["8 hexadecimal digits", "'0123456g'"]),
        (swap("C3", b"0000000o"), "C3", ["8 hexadecimal digits", "'0000000o'"]),
        (swap("C3", b"\x10" * 8), "C3", ["8 hexadecimal digits", r"\x10"]),
        (swap("C3", b"0123456789"), "C3", ["at most 8", "got 10", "--id-bits 64"]),
        (swap("C3", b"0" * 17), "C3", ["at most 8", "got 17"]),
        (swap("C26", b"ab\0cdef0"), "C26", [r"'ab\x00cdef0'"]),
        (swap("C26", "é".encode()), "C26", [r"\xc3\xa9"]),
        (swap("C26", b"\xff\xfe"), "C26", [r"\xff\xfe"]),
        (swap("C1", b"f" * (MAX_LINE_BYTES + 1)), None, [f"at most {MAX_LINE_BYTES} bytes"]),
    ],
)
def test_bad_rows_name_line_column_and_reason(raw: bytes, column: str | None, parts: list[str]) -> None:
    block = parse_block(GOOD + b"\n" + raw + b"\n" + GOOD + b"\n", LineLayout(), first_line=10)
    assert block.rows == 2
    (bad,) = block.bad
    assert (bad.line, bad.column) == (11, column)
    message = bad.describe("day_0")
    assert message.startswith("day_0, line 11" + (f", column {column}: " if column else ": "))
    for part in parts:
        assert part in message
    assert bad.raw == raw[:MAX_LINE_BYTES]


def test_several_bad_fields_are_counted() -> None:
    raw = swap("I2", b"x").split(b"\t")
    raw[20] = b"nothex"
    (bad,) = parse_block(b"\t".join(raw) + b"\n", LineLayout()).bad
    assert bad.column == "I2"
    assert "1 more bad field" in bad.reason


def test_64_bit_ids() -> None:
    layout = LineLayout(id_bits=64)
    raw = (
        swap("C1", b"ffffffffffffffff")
        + b"\n"
        + swap("C1", b"8000000000000000")
        + b"\n"
        + swap("C1", b"1" * 17)
        + b"\n"
    )
    block = parse_block(raw, layout)
    assert int(block.cats[0, 0]) == 2**64 - 1
    assert [b.line for b in block.bad] == [2, 3]
    assert "stands for the empty field" in block.bad[0].reason
    assert "at most 16" in block.bad[1].reason


def test_integers_left_by_float_columns_are_read() -> None:
    block = parse_block(swap("I4", b"260.0") + b"\n" + swap("label", b"1.0") + b"\n", LineLayout())
    assert block.rows == 2
    assert int(block.ints[3, 0]) == 260
    assert int(block.labels[1]) == 1  # type: ignore[index]


def test_nothing_at_all() -> None:
    assert parse_block(b"", LineLayout()).rows == 0
