"""What transforms say of themselves, against the rows they give; and a transform of one's own, priced and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

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
)
from recsys_embed.planning.curves import FrequencyCurve
from recsys_embed.planning.loss_estimate import CurveTerms, column_spans, estimate_loss
from recsys_embed.planning.options import goes_by_frequency
from recsys_embed.report.memory.collisions import expected_collisions

IDS = 60
TRANSFORMS = [
    MixedRadixDigit(),
    MixedRadixDigit(mod=7),
    MixedRadixDigit(div=9),
    MixedRadixDigit(div=9, mod=7),
    MixedRadixDigit(div=9, mod=100),
    MixedRadixDigit(mod=7, affine=(5, 3, 61)),
    Hash(3, 20),
    Hash(3, 20, num_frequent=10),
    Hash(3, 20, offset=-10, num_frequent=10, frequent_absent=True),
    Murmur(1, 2, 13),
    RankInSet(IdSet("hot", IDS, 5, 20)),
    RankInSet(IdSet("hot", IDS, 0, 20), rest=8, salt=4),
    RankInSet(IdSet("hot", IDS, 0, IDS)),
]


@dataclass(frozen=True)
class Reversed(Transform):
    """The last id has row 0."""

    size: int

    def signature(self) -> tuple[Any, ...]:
        return (Reversed,)

    def parameters(self) -> tuple[int, ...]:
        return (self.size,)

    @staticmethod
    def map(signature: tuple[Any, ...], ids: Tensor, params: Sequence[Any], at: Any = 0, arrays: Any = None) -> Tensor:
        return (params[0] - 1 - ids) % params[0]


def program(transform: Transform, rows: int) -> LookupProgram:
    return LookupProgram((Table("weight", rows, 4, Initializer("constant")),), (RowLookup("weight", transform),))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_sharing_is_how_ids_share_rows(transform: Transform) -> None:
    rows = transform.rows(torch.arange(IDS)).tolist()
    found = transform.sharing(IDS, 1000)
    private, absent = (set(range(*span)) for span in found[:2])
    assert all(rows.count(rows[i]) == 1 and rows[i] >= 0 for i in private)
    assert all(rows[i] == -1 for i in absent)
    others = {rows[i] for i in range(IDS) if i not in private | absent}
    assert others == {-1} if not found.rows and others else len(others) <= found.rows
    if found.even:
        assert (len(others), private) == (found.rows, set())
    owners = transform.owners(IDS)
    if owners is not None:
        assert [rows[i] for i in owners.tolist()] == list(range(len(owners)))
        assert set(owners.tolist()) == private
    assert transform.by_frequency == (transform.needs is not None or "num_frequent=10" in str(transform))


@pytest.mark.parametrize("rows", [IDS, 20])
def test_a_transform_of_ones_own_is_priced_and_counted_as_what_it_is_most_like(rows: int) -> None:
    like = Hash(1, rows) if rows < IDS else MixedRadixDigit()
    terms = CurveTerms(FrequencyCurve.zipf(IDS, 1.0, 10_000))
    own, known = (estimate_loss(terms, [column_spans(program(t, rows), terms)], 4) for t in (Reversed(rows), like))
    assert own == known
    assert expected_collisions(program(Reversed(rows), rows), IDS) == expected_collisions(program(like, rows), IDS)
    assert not goes_by_frequency(program(Reversed(rows), rows))


@pytest.mark.filterwarnings("ignore:.*is now called:DeprecationWarning")
def test_fields_under_their_earlier_names() -> None:
    hashed: Any = Hash(3, 20, head=10, head_absent=True)  # type: ignore[call-arg]
    assert hashed == Hash(3, 20, num_frequent=10, frequent_absent=True)
    assert (hashed.head, hashed.head_absent) == (10, True)
    read: Any = RowLookup("w", hashed, run=2)  # type: ignore[call-arg]
    assert read.run == read.num_rows == 2
    init: Any = Initializer(law="normal", scale=2.0)  # type: ignore[call-arg]
    assert init.law == "normal"
    with pytest.warns(DeprecationWarning, match="use 'num_frequent'"):
        assert hashed.head == 10
    with pytest.raises(TypeError, match="`head` is the earlier name of `num_frequent`; give one"):
        Hash(3, 20, head=10, num_frequent=10)  # type: ignore[call-arg]
