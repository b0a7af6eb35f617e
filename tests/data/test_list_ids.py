"""Lists of ids: rows are taken and put together as a plain Python list of lists has it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys_embed import EmbeddingCollection, FeatureSpec, Schema
from recsys_embed.data import Batch, InMemoryDataset
from recsys_embed.data.list_ids import ListIds
from recsys_embed.errors import ConfigError
from recsys_embed.utils.types import BagIds

TABLES = st.integers(1, 3).flatmap(
    lambda count: st.lists(
        st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=count, max_size=count), min_size=1, max_size=6
    )
)


def made(rows: list[list[list[int]]]) -> ListIds:
    features = []
    for feature in zip(*rows, strict=True):
        ends = torch.tensor([0, *map(len, feature)]).cumsum(0)
        features.append((torch.tensor([i for ids in feature for i in ids], dtype=torch.int64), ends))
    return ListIds.of(features)


def read(lists: ListIds) -> list[list[list[int]]]:
    flat = [piece.tolist() for piece in lists.values.tensor_split(lists.offsets[1:-1])]
    return [flat[at : at + lists.num_features] for at in range(0, len(flat), lists.num_features)]


@given(TABLES, st.data())
def test_rows_are_those_of_plain_lists(rows: list[list[list[int]]], data: st.DataObject) -> None:
    lists = made(rows)
    assert read(lists) == rows
    assert len(lists) == len(rows)
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=7))
    assert read(lists[torch.tensor(picked)]) == [rows[i] for i in picked]
    start, stop, step = (data.draw(st.integers(*ends)) for ends in ((-7, 7), (-7, 7), (1, 3)))
    assert (read(lists[start:stop:step]) if rows[start:stop:step] else []) == rows[start:stop:step]
    assert read(ListIds.cat([lists, lists[1:], lists])) == [*rows, *rows[1:], *rows]
    values, offsets = lists.by_feature()
    bags = [piece.tolist() for piece in values.tensor_split(offsets[1:-1])]
    assert bags == [ids for feature in zip(*rows, strict=True) for ids in feature]
    for number in range(lists.num_features):
        values, offsets = lists.feature(number)
        assert [piece.tolist() for piece in values.tensor_split(offsets[1:-1])] == [row[number] for row in rows]


def test_lists_that_do_not_fit_together_are_refused() -> None:
    one, ends = torch.tensor([1, 2]), torch.tensor([0, 2])
    with pytest.raises(ConfigError, match="equally many rows"):
        ListIds.of([(one, ends), (one, torch.tensor([0, 1, 2]))])
    with pytest.raises(ConfigError, match=r"(?s)values.*float32.*offsets.*int64"):
        ListIds(torch.zeros(2), ends.int(), 1)
    with pytest.raises(ConfigError, match="`lists` must have 3 rows"):
        InMemoryDataset(torch.zeros(3, 0), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3), None, made([[[1]]]))


def test_a_shuffled_batch_keeps_every_row_together() -> None:
    rows = [[[i] * (i % 4), [i, i + 1]] for i in range(50)]
    number = torch.arange(50)
    data = InMemoryDataset(
        number.float().unsqueeze(1), number.int().unsqueeze(1), number % 2, {"weight": number}, made(rows)
    )
    seen = []
    for batch in data.batches(8, seed=3):
        assert batch.lists is not None
        assert batch.lists.values.dtype == torch.int64
        assert read(batch.lists) == [rows[i] for i in batch.extra["weight"].tolist()]
        seen += batch.ids[:, 0].tolist()
    assert sorted(seen) == list(range(50))


def test_collections_read_single_ids_and_lists_of_a_batch() -> None:
    """Oracle: torch's own modules, feature by feature."""
    single, lists = [FeatureSpec("a", 20, 4), FeatureSpec("b", 30, 4)], FeatureSpec("tags", 60, 4, pooling="mean")
    schema = Schema([*single, lists, FeatureSpec("seen", 60, 4)])
    coll = EmbeddingCollection(schema)
    rows = [[[i] * (i % 4), [i, i + 1]] for i in range(10)]
    ids = torch.stack([torch.arange(10), torch.arange(10) + 11], 1)
    batch = Batch(torch.zeros(10, 0), ids, torch.zeros(10), lists=made(rows))
    assert isinstance(batch.inputs, BagIds)
    out = coll(batch.inputs)
    for f, name in enumerate(schema.names):
        table, mode = coll.table(f"{name}.weight"), schema[name].pooling
        given = ids[:, f : f + 1].tolist() if f < 2 else [row[f - 2] for row in rows]
        flat = torch.tensor([i for one in given for i in one], dtype=torch.int64)
        ends = torch.tensor([0, *map(len, given)]).cumsum(0)[:-1]
        torch.testing.assert_close(out[:, f], torch.nn.functional.embedding_bag(flat, table, ends, mode=mode))
        assert batch.feature(f).tolist() == flat.tolist()


def test_batches_whose_lists_do_not_fit_are_refused() -> None:
    one, two = made([[[1]], [[2, 3]]]), made([[[1], [2]]])
    parts = torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2)
    with pytest.raises(ConfigError, match="`lists` must have 2 rows, as `label` has; got 1"):
        Batch(*parts, lists=two)
    with pytest.raises(ConfigError, match="some batches have `lists` and others none"):
        Batch.cat([Batch(*parts), Batch(*parts, lists=one)])
    with pytest.raises(ConfigError, match="`num_features` must be one"):
        ListIds.cat([one, two])
