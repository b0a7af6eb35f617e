"""Rows beyond a table, which in a storage of many tables are another feature's, are never read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed.core.program import Initializer, LookupProgram, RowLookup, Table
from recsys_embed.core.transforms import Hash, MixedRadixDigit, Murmur, Transform
from recsys_embed.methods.full import FullConfig


class Halved(Transform):
    """A contributor's transform, of which nothing is known but what it does."""

    def signature(self) -> tuple[Any, ...]:
        return (Halved,)

    def parameters(self) -> tuple[int, ...]:
        return ()

    @staticmethod
    def map(signature: Any, ids: Tensor, params: Sequence[Any], at: Any = 0, arrays: Any = None) -> Tensor:
        return ids // 2


@dataclass(frozen=True, kw_only=True)
class Config(FullConfig):
    transform: ClassVar[Transform] = Halved()
    rows: ClassVar[int] = 5

    def build_program(self, spec: rse.FeatureSpec) -> LookupProgram:
        table = Table("weight", self.rows, spec.embedding_dim, Initializer.plain(spec))
        return LookupProgram((table,), (RowLookup("weight", self.transform),))


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_lookups_check_what_a_transform_does_not_say(backend: str) -> None:
    schema = rse.Schema([rse.FeatureSpec("a", 100, 4), rse.FeatureSpec("b", 100, 4)])
    optimizer = None if backend == "reference" else rse.SGD(lr=0.1)
    coll = rse.EmbeddingCollection(schema, rse.Plan({"a": Config(), "b": FullConfig()}), optimizer, backend=backend)
    before = coll.table("b.weight").detach().clone()
    assert coll(torch.tensor([[9, 3]])).shape == (1, 2, 4)
    with pytest.raises(rse.RecsysEmbedError, match="Halved gave row 49 of a table of 5 rows"):
        coll(torch.tensor([[9, 3], [99, 3]]))
    assert torch.equal(coll.table("b.weight"), before)


@pytest.mark.parametrize(
    "transform",
    [
        MixedRadixDigit(div=2),
        MixedRadixDigit(mod=7),
        MixedRadixDigit(affine=(3, 1, 101)),
        Hash(1, 6),
        Hash(1, 3, 2, 1, 2),
    ],
    ids=repr,
)
def test_programs_whose_tables_are_too_small_are_refused(transform: Transform) -> None:
    config = type("Small", (Config,), {"transform": transform})
    with pytest.raises(rse.RecsysEmbedError, match="table 'weight' has 5 rows, and"):
        config().program(rse.FeatureSpec("a", 100, 4))


@pytest.mark.parametrize(
    "transform",
    [
        MixedRadixDigit(), MixedRadixDigit(div=3), MixedRadixDigit(mod=7), MixedRadixDigit(div=3, mod=9),
        MixedRadixDigit(affine=(3, 1, 101)), MixedRadixDigit(2, 5, (3, 1, 101)), Hash(1, 6),
        Hash(1, 6, stride=4, offset=3),
        Hash(2, 9, num_frequent=4), Hash(2, 9, num_frequent=4, frequent_absent=True), Murmur(3, 1, 11),
    ],
    ids=repr,
)  # fmt: skip
def test_reach_is_one_more_than_the_largest_row(transform: Transform) -> None:
    ids = torch.arange(100)
    for number in (1, 10, 97, 100):
        largest = int(transform.rows(ids[:number]).max())
        reach = transform.reach(number)
        assert reach is not None
        assert largest < reach
    if isinstance(transform, MixedRadixDigit) and not transform.affine:
        assert largest == reach - 1
    else:  # hashed: every row is some id's
        assert int(transform.rows(torch.arange(5000)).max()) == reach - 1
