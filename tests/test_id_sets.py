"""Sets of ids as arrays: positions against a search in plain Python, and damage refused."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_embed.core.id_sets import IdSet, positions
from recsys_embed.core.program import RankInSet
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.kernels.indexes import IndexStore


@st.composite
def _index(draw: st.DrawFn, form: str) -> tuple[IdSet, torch.Tensor]:
    size = draw(st.integers(1, 300))
    start = draw(st.integers(0, size - 1))
    count = draw(st.integers(1, size - start))
    counts = draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))
    return IdSet("hot", size, start, count, form), torch.tensor(counts)  # type: ignore[arg-type]


def _oracle(index: IdSet, counts: list[int]) -> list[int]:
    """Members in order of ids: those of the wanted ranks by falling count, ties to the smaller id."""
    by_rank = sorted(range(index.size), key=lambda i: (-counts[i], i))
    return sorted(by_rank[index.start : index.start + index.count])


@pytest.mark.parametrize("form", ["bitmap", "sorted"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_positions_are_places_in_the_sorted_members(form: str, data: st.DataObject) -> None:
    cases = [data.draw(_index(form)) for _ in range(data.draw(st.integers(1, 3)))]
    store = IndexStore([[index] for index, _ in cases])
    for program, (index, counts) in enumerate(cases):
        store.assign_(program, counts)
        members = _oracle(index, counts.tolist())
        assert store.value(program, "hot").tolist() == members
        ids = torch.tensor([*range(index.size), -1, index.size, 2**40, -(2**63), 2**63 - 1])
        want = [members.index(i) if i in members else -1 for i in ids.tolist()]
        params = (index.start, index.count, index.size)
        assert positions(index.form, ids, params, store.at(program, "hot"), store.arrays).tolist() == want


@pytest.mark.parametrize("form", ["range", "bitmap", "sorted"])
def test_without_counts_ids_are_ranks(form: str) -> None:
    index = IdSet("hot", 200, 3, 70, form)  # type: ignore[arg-type]
    store = IndexStore([[index]])
    rows = RankInSet(index).rows(torch.arange(200), 0, store.arrays)
    assert rows.tolist() == [-1] * 3 + list(range(70)) + [-1] * 127
    assert store.nbytes == index.nbytes


def test_others_hash_behind_the_members() -> None:
    rows = RankInSet(IdSet("hot", 1000, 0, 10), rest=5).rows(torch.arange(1000))
    assert rows[:10].tolist() == list(range(10))
    assert set(rows[10:].tolist()) == set(range(10, 15))


@pytest.mark.parametrize("size", [63, 64, 65, 10**6])
@pytest.mark.parametrize("share", [0.001, 0.3, 1.0])
def test_the_smaller_form_is_chosen(size: int, share: float) -> None:
    index = IdSet.smallest("hot", size, 0, max(1, int(size * share)))
    assert index.nbytes == min(4 * index.count, -(-size // 64) * 12) == IndexStore([[index]]).nbytes


def test_a_module_from_the_meta_device_comes_back_as_ranks() -> None:
    index = IdSet("hot", 100, 0, 40, "bitmap")
    with torch.device("meta"):
        store = IndexStore([[index]])
    assert store.to_empty(device="cpu").value(0, "hot").tolist() == list(range(40))


@pytest.mark.parametrize("form", ["bitmap", "sorted"])
def test_damaged_arrays_are_refused(form: str) -> None:
    store = IndexStore([[IdSet("hot", 100, 0, 40, form)]])  # type: ignore[arg-type]
    good = copy.deepcopy(store.state_dict())
    for name, tensor in good.items():
        for place in range(tensor.numel()):
            for change in (1, 1 << 40 if tensor.dtype == torch.int64 else 1 << 30):
                bad = copy.deepcopy(good)
                bad[name][place] ^= change
                with pytest.raises(CheckpointError, match="damaged"):
                    store.load_state_dict(bad)
    assert all(torch.equal(a, b) for a, b in zip(store.state_dict().values(), good.values(), strict=True))


@pytest.mark.parametrize("counts", [torch.ones(99), torch.full((100,), -1.0), torch.full((100,), float("nan"))])
def test_wrong_counts_are_refused(counts: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="counts"):
        IndexStore([[IdSet("hot", 100, 0, 4, "sorted")]]).assign_(0, counts)
