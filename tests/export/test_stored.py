"""Served tables read like the tables they were made from, whatever was dropped and however rows are kept."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import recsys_embed as rse
from recsys_embed.core.id_sets import bitmap
from recsys_embed.core.index import IndexArrays
from recsys_embed.core.precision import SEARCHES, Layout
from recsys_embed.exports import export, load
from recsys_embed.exports.pack import Packed, choose_parts, chunks, inspect_table, pack_bits
from recsys_embed.kernels.stored_tables import Part, Stored

KINDS = ("fp32", "fp16", "bf16", "fp8", "int8", "int4", "int2")
ERRORS = {"fp32": 0.0, "fp16": 1e-3, "bf16": 1e-2, "fp8": 0.25, "int8": 2e-2, "int4": 0.4, "int2": 2.0}
PATTERNS = ("whole", "scattered", "few", "head", "columns", "both", "nothing")


def table(rows: int, width: int, pattern: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(rows, width, generator=generator).clamp(-3, 3)
    if pattern in ("scattered", "both"):
        out[torch.rand(rows, generator=generator) < 0.5] = 0
    if pattern == "few":
        out[torch.rand(rows, generator=generator) < 0.99] = 0
    if pattern == "head":
        out[rows // 3 :] = 0
    if pattern in ("columns", "both"):
        out[:, torch.randperm(width, generator=generator)[: width // 2 + 1]] = 0
    return out * (pattern != "nothing")


def pack(tables: list[Tensor], kind: str, prune: bool = True) -> list[Packed]:
    packs = []
    for i, t in enumerate(tables):
        packed, faults = inspect_table(f"t{i}", lambda a, b, t=t: t[a:b], *t.shape, t.dtype, kind, prune)
        assert faults == []
        packs.append(packed)
    choose_parts(packs)
    return packs


def stored(packs: list[Packed], dtype: torch.dtype = torch.float32, **options: Any) -> Stored:
    data = torch.cat([piece.flatten() for p in packs for piece in p.stored("minmax")])
    none = {"words": torch.zeros(0).long(), "ranks": torch.zeros(0).int(), "values": torch.zeros(0).int()}
    arrays = {k: torch.cat([p.arrays().get(k, empty) for p in packs]) for k, empty in none.items()}
    longest = max(p.part.count for p in packs)
    return Stored([p.part for p in packs], packs[0].width, data, IndexArrays(arrays, longest), dtype, **options)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 700), st.sampled_from(PATTERNS)), min_size=1, max_size=4),
    width=st.sampled_from([1, 2, 3, 7, 8, 13, 16]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_rows_are_those_of_the_tables(shapes, width, kind, seed) -> None:
    tables = [table(n, width, pattern, seed + i) for i, (n, pattern) in enumerate(shapes)]
    whole, packs = torch.cat(tables), pack(tables, kind)
    served = stored(packs)
    rows = torch.randint(0, len(whole), (200,), generator=torch.Generator().manual_seed(seed))
    got = served(rows)
    assert got.shape == (200, width)
    assert (got - whole[rows]).abs().max() <= ERRORS[kind]
    assert torch.equal(got, served.dense()[rows])
    assert served.nbytes == sum(p.part.nbytes + p.part.index_bytes for p in packs)
    assert served.nbytes <= sum(Layout.of(width, kind, rows=len(t)).nbytes(len(t)) for t in tables)
    for start, packed in zip(itertools.accumulate([0, *map(len, tables[:-1])]), packs, strict=True):
        if packed.part.form != "all":
            assert not served.dense(start, packed.part.rows)[~packed.used].any()
    for packed, t in zip(packs, tables, strict=True):
        largest, _, rms = packed.error.close(t.numel())
        assert largest <= ERRORS[kind]
        assert rms == pytest.approx(float(t.square().mean().sqrt()), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_decodes_rows_of_every_width(kind: str, tmp_path: Path) -> None:
    """Also those of one-row tables, which of few columns take as many bytes at several kinds."""
    for width, count in itertools.product(range(1, 10), (1, 3)):
        module = rse.make_embedding("full", count, width)
        want = Layout.of(width, kind, rows=count)
        kept = want.decode(want.encode(module.weight.detach(), SEARCHES.get(kind, "minmax")))[:count]
        export(module, tmp_path / "t", kind, prune=False)
        for backend in ("auto", "torch"):
            assert torch.equal(load(tmp_path / "t", backend=backend)(torch.arange(count)), kept), (width, count)


@pytest.mark.parametrize("kind", KINDS)
def test_absent_rows_may_be_asked_for(kind: str) -> None:
    served = stored(pack([table(3000, 16, "both")], kind))
    rows = torch.tensor([-1, 5, -1, 7])
    assert torch.equal(served(rows, partial=True)[[1, 3]], served(rows[[1, 3]]))


@pytest.mark.parametrize(
    ("pattern", "form", "columns"),
    [
        ("whole", "all", False),
        ("scattered", "bitmap", False),
        ("few", "sorted", False),
        ("head", "range", False),
        ("columns", "all", True),
        ("both", "bitmap", True),
        ("nothing", "range", False),
    ],
)
def test_the_smallest_form_is_taken(pattern: str, form: str, columns: bool) -> None:
    (packed,) = pack([table(20_000, 16, pattern)], "fp32")
    assert packed.part.form == form
    assert (packed.part.columns is not None) == columns
    (kept,) = pack([table(20_000, 16, pattern)], "fp32", prune=False)
    assert (kept.part.form, kept.part.columns) == ("all", None)


def test_little_is_not_worth_slower_reading() -> None:
    rows = table(20_000, 16, "whole")
    rows[::200] = 0
    (packed,) = pack([rows], "fp32")
    assert packed.part.form == "all"


def test_a_table_of_zeros_keeps_one_row() -> None:
    for kind in KINDS:
        served = stored(pack([torch.zeros(5000, 16), torch.ones(10, 16)], kind))
        assert not served(torch.arange(5000)).any()
        assert (served(torch.arange(5000, 5010)) == 1).all()
        assert served.nbytes < 5000


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_follow_the_module(kind: str) -> None:
    served = stored(pack([table(2000, 16, "scattered")], kind), torch.float64)
    assert served.dtype == served(torch.tensor([3])).dtype == torch.float64
    served = served.to(torch.bfloat16)
    assert served.dtype == served(torch.tensor([3])).dtype == torch.bfloat16
    rebuilt = stored(pack([table(2000, 16, "scattered")], kind))
    rebuilt.load_state_dict(rebuilt.state_dict())
    assert set(rebuilt.state_dict()) == {"data", "words", "ranks", "values"}


def test_only_rows_that_are_read_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    served = stored(pack([table(5000, 16, "whole")], "int8"))
    seen = []
    plain = Layout.decode
    monkeypatch.setattr(Layout, "decode", lambda self, rows: seen.append(len(rows)) or plain(self, rows))
    served(torch.arange(7))
    assert seen == [7]


def test_lookups_trace_without_guards_on_values() -> None:
    """A served table is part of compiled and exported programs: no shape depends on what rows hold."""
    for pattern, kind in (("whole", "int8"), ("both", "int4")):
        served = stored(pack([table(900, 16, pattern), table(70, 16, "whole")], kind))
        rows = torch.tensor([0, 969, 900, 899])
        program = torch.export.export(served, (rows,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
        other = torch.randint(0, 970, (50,))
        assert torch.equal(program.module()(other), served(other))


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_bits_are_packed_as_an_index_has_them(mask: list[bool]) -> None:
    bits = torch.tensor(mask)
    assert torch.equal(pack_bits(bits), bitmap(bits.nonzero().squeeze(1), len(mask))[0])


def test_a_table_is_read_in_chunks_that_cover_it() -> None:
    for rows, width in ((1, 1), (5, 1 << 21), (1 << 20, 3), (3_000_000, 1)):
        ranges = list(chunks(rows, width))
        assert ranges[0][0] == 0
        assert ranges[-1][1] == rows
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
        assert max(stop - start for start, stop in ranges) * width <= max(1 << 18, width)


def test_blocks_end_where_chunks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one element share scales in blocks of 64, and chunks need not be made of whole blocks."""
    rows = table(1000, 1, "scattered")
    whole = torch.cat(list(pack([rows], "int8")[0].stored("minmax")))
    monkeypatch.setattr("recsys_embed.exports.pack._ELEMENTS", 37)
    assert torch.equal(torch.cat(list(pack([rows], "int8")[0].stored("minmax"))), whole)


def test_weights_that_cannot_be_kept_are_named() -> None:
    rows = torch.zeros(100, 4)
    rows[7, 2] = float("nan")
    rows[9, 1] = float("inf")
    for kind in KINDS:
        _, faults = inspect_table("C1.weight", lambda a, b: rows[a:b], 100, 4, rows.dtype, kind, True)
        assert faults == ["table 'C1.weight' holds NaN or infinite values in 2 rows, the first of them row 7"]
    large = torch.full((10, 4), -1e6)
    for kind in KINDS:
        _, faults = inspect_table("t", lambda a, b: large[a:b], 10, 4, rows.dtype, kind, True)
        assert ("holds values up to 1e+06" in "".join(faults)) == (kind not in ("fp32", "bf16"))


def test_parts_of_one_storage_count_their_bytes() -> None:
    part = Part(1000, Layout("int8", 16), "bitmap", 0, 400)
    assert (part.nbytes, part.index_bytes) == (400 * 20, 16 * 12)
    assert Part(1000, Layout("fp32", 16), "sorted", 0, 3).index_bytes == 12
