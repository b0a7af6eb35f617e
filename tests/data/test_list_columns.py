"""Lists and sequences of a converted table come out of batches as the table has them, in memory and streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pl = pytest.importorskip("polars")

from recsys_embed.data import Batch, Dataset, open_dataset  # noqa: E402
from recsys_embed.data.table.convert import convert_table  # noqa: E402
from recsys_embed.data.table.schema import TableSchema  # noqa: E402

COLUMNS = [
    {"name": "click", "kind": "label"},
    {"name": "item", "kind": "categorical", "vocab": "item", "min_count": 1},
    {"name": "tags", "kind": "list", "separator": "|", "min_count": 1},
    {"name": "history", "kind": "sequence", "vocab": "item", "max_length": 3, "min_count": 1},
    {"name": "row", "kind": "group"},
]


def table(rows: int) -> Any:
    items = [(7 * i) % 23 + 2**60 for i in range(rows)]
    return pl.DataFrame(
        {
            "click": [i % 2 for i in range(rows)],
            "item": items,
            "tags": ["|".join(f"t{(i + j) % 5}" for j in range(i % 4)) for i in range(rows)],
            "history": [items[max(0, i - i % 6) : i] or None for i in range(rows)],
            "row": list(range(rows)),
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lists") / "data"
    convert_table(table(3000), out, TableSchema.from_dict({"columns": COLUMNS}))
    return out


def decoded(data: Dataset, batch: Batch) -> list[dict[str, Any]]:
    """Rows of a batch in the table's own values."""
    values = {
        name: dict(zip(v.ids.tolist(), v.values.to_list(), strict=True))
        for name in data.feature_names
        for v in [data.vocabulary(name)]
    }
    lists = [[], []]
    for number, name in enumerate(("tags", "history")):
        assert batch.lists is not None
        flat, offsets = batch.lists.feature(number)
        lists[number] = [[values[name][i] for i in one.tolist()] for one in flat.tensor_split(offsets[1:-1])]  # type: ignore[assignment]
    items = [values["item"][i] for i in batch.ids[:, 0].tolist()]
    return [
        {"row": r, "click": y, "item": i, "tags": t, "history": h}
        for r, y, i, t, h in zip(batch.extra["group"].tolist(), batch.label.tolist(), items, *lists, strict=True)
    ]


@pytest.mark.parametrize("memory_limit", [1 << 30, 0], ids=["in memory", "streamed"])
def test_batches_hold_the_tables_own_lists(folder: Path, memory_limit: int) -> None:
    data = open_dataset(folder, memory_limit=memory_limit)
    assert data.num_lists == 2
    assert data.schema(4)["history"].table_name == data.schema(4)["item"].table_name
    original = {row["row"]: row for row in table(3000).to_dicts()}
    seen = 0
    for split in data.splits:
        for batch in data.batches(split, 257, seed=1):
            for row in decoded(data, batch):
                wanted = original[row["row"]]
                assert row["item"] == wanted["item"]
                assert row["click"] == wanted["click"]
                assert row["tags"] == [t for t in wanted["tags"].split("|") if t]
                assert row["history"] == (wanted["history"] or [])[-3:]
                seen += 1
    assert seen == 3000


def test_counts_of_a_table_are_those_of_all_its_columns(folder: Path) -> None:
    data = open_dataset(folder)
    counts = sum(
        batch.feature(f).bincount(minlength=data.schema(1)["item"].num_embeddings)
        for batch in data.batches("train", 100, shuffle=False)
        for f in (0, 2)
    )
    assert (data.counts("item") == counts).all()
    assert (data.counts("history") == counts).all()
