"""Programs that no method writes: every transform, run, repetition, sign and weight, in sums and products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from recsys_embed.core.codes import Codes, CodesIndex
from recsys_embed.core.id_sets import IdSet
from recsys_embed.core.program import (
    Hash,
    Initializer,
    LookupProgram,
    MixedRadixDigit,
    Murmur,
    RankInSet,
    RowLookup,
    Table,
    Transform,
    Weight,
)
from recsys_embed.kernels import reference
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.kernels.triton import status
from recsys_embed.kernels.triton.lazy_lookup import LazyLookup

pytestmark = pytest.mark.kernels
DEVICE = "cpu" if status.interpreted() else "cuda"
IDS = 40
NONE = Initializer("constant")


def transforms(rows: int, name: str, absent: bool = True) -> st.SearchStrategy[Transform]:
    """Transforms of ids in [0, IDS) to a table of ``rows`` rows, at least 6; some may leave ids without a row."""
    affine = st.sampled_from([None, (5, 3, 41)])
    seeds = st.integers(-(2**63), 2**63 - 1)
    digits = st.builds(MixedRadixDigit, div=st.sampled_from([1, 3]), mod=st.just(rows), affine=affine)
    hashes = st.builds(Hash, seeds, st.just(rows - 3), offset=st.sampled_from([0, 1]), num_frequent=st.just(0))
    heads = st.builds(Hash, seeds, st.just(rows - 4), num_frequent=st.just(4), frequent_absent=st.just(absent))
    murmurs = st.builds(Murmur, st.integers(0, 2**32 - 1), st.integers(0, 3), st.just(rows))
    forms = st.sampled_from(["range", "bitmap", "sorted"])
    index = st.builds(IdSet, st.just(name), st.just(IDS), st.sampled_from([0, 7]), st.just(rows - 2), forms)
    members = st.builds(RankInSet, index, rest=st.sampled_from([0, 2] if absent else [2]), salt=seeds)
    packed = st.builds(CodesIndex, st.just(name), st.just(IDS), st.just(2), st.just(rows), seeds)
    codes = st.builds(Codes, packed, st.sampled_from([0, 1]))
    return st.one_of(digits, hashes, heads, murmurs, members, codes)


@st.composite
def programs(draw: Any) -> LookupProgram:
    width = draw(st.sampled_from([1, 3, 4, 8]))
    tables = [Table("a", 7, width, NONE), Table("b", 23, width, NONE), Table("e", 19, 1, NONE), Table("s", 9, 1, NONE)]
    sizes = {t.name: t.rows for t in tables}
    row_lookups = []
    for j in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(["a", "b", "e"]))
        shape: dict[str, Any] = {}
        if name == "e":
            shape = {"width": width} if draw(st.booleans()) else {"num_rows": width}
        weight = Weight("s", draw(transforms(9, f"w{j}", absent=False))) if draw(st.booleans()) else None
        sign = draw(st.sampled_from([None, 5]))
        column = width * draw(st.integers(0, 1)) if row_lookups else 0
        scale = draw(st.sampled_from([1.0, -0.5]))
        row_lookup = RowLookup(name, draw(transforms(sizes[name], f"i{j}")), column, scale, sign, weight, **shape)
        row_lookups.append(row_lookup)
    used = {p.table for p in row_lookups} | {p.weight.table for p in row_lookups if p.weight}
    kept = tuple(t for t in tables if t.name in used)
    return LookupProgram(kept, tuple(row_lookups), draw(st.sampled_from(["sum", "mul"])))


def assert_agrees(program: LookupProgram, ids: torch.Tensor, sparse: bool = False, optional: bool = False) -> None:
    """Vectors and gradients are those of the definition; with ``optional`` the first id is none."""
    assert not program.faults()
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(t.rows, t.width, generator=generator).to(DEVICE).requires_grad_() for t in program.tables]
    oracle = [t.detach().double().requires_grad_() for t in tables]
    index = IndexStore([program.indexes]).to(DEVICE)
    ids = ids.to(DEVICE)
    if optional:
        ids[0] = -1
    lookup = LazyLookup.single("f", program, index, optional)
    (got,) = lookup(ids.unsqueeze(1), tables, sparse=sparse)
    named = dict(zip((t.name for t in program.tables), oracle, strict=True))
    wanted = reference.lookup(program, named, ids.clamp_min(0), index)
    if optional:
        wanted = wanted.masked_fill((ids < 0).unsqueeze(-1), 0.0)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=generator).to(DEVICE)
    got.backward(upstream.float())
    wanted.backward(upstream)
    for ours, theirs in zip(tables, oracle, strict=True):
        assert ours.grad is not None
        right = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(ours.grad.to_dense().double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "transform",
    [
        MixedRadixDigit(mod=7),
        MixedRadixDigit(3, 7, (5, 3, 41)),
        Hash(-9, 3, stride=2, offset=1),
        Hash(5, 3, num_frequent=4),
        Hash(5, 3, num_frequent=4, frequent_absent=True),
        *(Murmur(2**32 - 1, word, 7) for word in range(4)),
        *(RankInSet(IdSet("i", IDS, 6, 7, form)) for form in ("range", "bitmap", "sorted")),
        *(RankInSet(IdSet("i", IDS, 6, 5, form), rest=2, salt=-3) for form in ("range", "bitmap", "sorted")),
        Codes(CodesIndex("i", IDS, 3, 7, salt=4), 2),
    ],
    ids=repr,
)
def test_every_transform_in_a_product(transform: Transform) -> None:
    tables = (Table("a", 7, 4, NONE), Table("b", 23, 4, NONE))
    assert_agrees(
        LookupProgram(tables, (RowLookup("a", transform), RowLookup("b", MixedRadixDigit(mod=23))), "mul"),
        torch.arange(IDS),
    )


@pytest.mark.parametrize("bits", range(1, 17))
def test_codes_of_every_width_beside_sets_of_ids(bits: int) -> None:
    tables = (Table("a", 2**bits, 2, NONE), Table("b", 9, 2, NONE))
    codes = CodesIndex("codes", IDS, 3, 2**bits, salt=bits)
    sets = [RankInSet(IdSet(f"set_{form}", IDS, 3, 9, form)) for form in ("bitmap", "sorted")]  # type: ignore[arg-type]
    row_lookups = [*(RowLookup("a", Codes(codes, j)) for j in range(3)), *(RowLookup("b", s) for s in sets)]
    assert_agrees(LookupProgram(tables, tuple(row_lookups)), torch.arange(IDS))


# Shrinking a failure in the interpreter would take minutes.
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(program=programs(), sparse=st.booleans(), optional=st.booleans(), count=st.sampled_from([1, 9, 30]))
def test_any_program(program: LookupProgram, sparse: bool, optional: bool, count: int) -> None:
    assert_agrees(
        program, torch.randint(0, IDS, (count,), generator=torch.Generator().manual_seed(1)), sparse, optional
    )
