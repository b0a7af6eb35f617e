"""Packed codes: against numpy's bits, in every backend, and damage refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_embed.core import hashing
from recsys_embed.core.codes import Codes, CodesIndex, pack, packed_words, unpack
from recsys_embed.core.id_sets import IdSet
from recsys_embed.core.program import Initializer, LookupProgram, MixedRadixDigit, RankInSet, RowLookup, Table
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.kernels import kinds, reference
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.kernels.native.autograd import SingleLookup
from recsys_embed.kernels.native.library import library


def bits_by_numpy(words: torch.Tensor, count: int, bits: int) -> list[int]:
    """Numbers of ``bits`` bits in little-endian words, as numpy takes bits apart."""
    flat = np.unpackbits(words.numpy().view(np.uint8), bitorder="little")[: count * bits].reshape(count, bits)
    return (flat.astype(np.int64) << np.arange(bits)).sum(1).tolist()


@pytest.mark.parametrize("bits", [*range(1, 17), 24, 31])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_numbers_are_packed_without_gaps(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=100))
    words = pack(torch.tensor(values), bits)
    assert len(words) == packed_words(len(values), bits) == -(-len(values) * bits // 32) + 1
    assert bits_by_numpy(words, len(values), bits) == values == unpack(words, torch.arange(len(values)), bits).tolist()


def program(bits: int, ids: int, columns: int) -> LookupProgram:
    """Sum of one row per code, of tables of all rows that ``bits`` bits can name, beside two sets of ids."""
    rows = 2**bits if bits < 17 else 2**16 + 1
    index = CodesIndex("codes", ids, columns, rows, salt=5)
    tables = (Table("weight", rows, 4, Initializer("constant")), Table("hot", 9, 4, Initializer("constant")))
    row_lookups = [RowLookup("weight", Codes(index, j)) for j in range(columns)]
    sets = [RankInSet(IdSet(f"set_{form}", ids, 3, 9, form)) for form in ("bitmap", "sorted")]  # type: ignore[arg-type]
    return LookupProgram(tables, (*row_lookups, *(RowLookup("hot", s) for s in sets)))


@pytest.mark.parametrize("bits", range(1, 18))
def test_rows_are_the_codes_in_every_backend(bits: int) -> None:
    ids, columns = 500, 3
    made = program(bits, ids, columns)
    assert made.faults() == []
    store = IndexStore([made.indexes])
    codes = torch.from_numpy(np.random.default_rng(bits).integers(0, made.tables[0].rows, (ids, columns)))
    store.assign_(0, {"codes": codes.to(torch.int32)})
    assert torch.equal(store.value(0, "codes"), codes)
    asked = torch.tensor([*range(ids), -1, ids, 2**40, -(2**63), 2**63 - 1])
    for j in range(columns):
        rows = made.row_lookups[j].transform.rows(asked, store.at(0, "codes"), store.arrays)
        assert rows.tolist() == [*codes[:, j].tolist(), *[-1] * 5]
    tables = {t.name: torch.randn(t.rows, t.width) for t in made.tables}
    inside = asked[:ids]
    wanted = tables["weight"][codes].sum(1)
    wanted[3:12] += 2 * tables["hot"]
    found = reference.lookup(made, tables, inside, store)
    torch.testing.assert_close(found, wanted)
    if isinstance(library(), str):
        pytest.skip("no native kernels")
    lookup = SingleLookup(made, store, False)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got = lookup(inside.repeat(20), list(tables.values()), sparse=False)
            assert torch.equal(got, found.repeat(20, 1))
    finally:
        torch.set_num_threads(before)


def test_at_first_codes_are_hashes_and_counts_do_not_change_them() -> None:
    index = CodesIndex("codes", 1000, 2, 50, salt=9)
    store = IndexStore([[IdSet("hot", 1000, 0, 10, "sorted")], [index, IdSet("set", 1000, 0, 400, "bitmap")]])
    store.assign_(1, torch.arange(1000))
    ids = torch.arange(1000)
    for j in range(2):
        salt: Any = hashing.sequence(torch.tensor(9), torch.tensor(j))
        assert torch.equal(store.value(1, "codes")[:, j], hashing.hash_rows(ids, salt, 50))
    assert store.value(1, "set").tolist() == list(range(600, 1000))
    assert store.nbytes == sum(i.nbytes for row in store.indexes for i in row.values())


def test_damaged_codes_are_refused() -> None:
    store = IndexStore([[CodesIndex("codes", 40, 2, 5)]])
    for place in range(len(store.state_dict()["codes"]) - 1):
        bad = copy.deepcopy(store.state_dict())
        bad["codes"][place] = -1
        with pytest.raises(CheckpointError, match=r"'codes' is damaged: its codes must be in \[0, 5\)"):
            store.load_state_dict(bad)


@pytest.mark.parametrize(
    "value", [torch.zeros(39, 2).long(), torch.zeros(40, 2), torch.full((40, 2), 5), torch.full((40, 2), -1)], ids=str
)
def test_wrong_codes_are_refused(value: torch.Tensor) -> None:
    store = IndexStore([[CodesIndex("codes", 40, 2, 5)]])
    before = store.value(0, "codes")
    with pytest.raises(ConfigError, match="index 'codes'"):
        store.assign_(0, {"codes": value})
    assert torch.equal(store.value(0, "codes"), before)


def test_the_header_of_the_kernels_is_written_from_the_table_of_kinds() -> None:
    top = next(p for p in Path(__file__).resolve().parents if (p / "ops/cpu").is_dir())
    text = (top / "ops/cpu/transforms.h").read_text()
    assert text == kinds.header(), f"run `python -m {kinds.__name__}` and compile the kernels again"


def test_a_subclass_with_arithmetic_of_its_own_is_not_taken_for_its_base() -> None:
    class Shifted(MixedRadixDigit):
        @staticmethod
        def map(signature: Any, ids: torch.Tensor, params: Any, at: Any = 0, arrays: Any = None) -> torch.Tensor:
            return ids + 1

    class Named(MixedRadixDigit):
        pass

    assert MixedRadixDigit().encoded() == Named().encoded() == ("identity", {})
    assert Shifted().encoded() is None
