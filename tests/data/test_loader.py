"""Batches: every row once, the same order for the same seed, exact resumption, and damage named on opening."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from helpers import random_rows, read_folder, table, write
from hypothesis import given
from hypothesis import strategies as st

from recsys_embed.data import (
    Batch,
    CriteoOptions,
    Dataset,
    InMemoryDataset,
    RowSource,
    convert_criteo,
    loader,
    open_dataset,
)
from recsys_embed.errors import ConfigError, DataError, UnknownNameError

ROWS = 500


@pytest.fixture
def folder(sharded: Path) -> Path:
    return sharded


@pytest.fixture(params=["memory", "stream"])
def data(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setattr(loader, "CHUNK_ROWS", 30)
    return open_dataset(folder, memory_limit=0 if request.param == "stream" else 1 << 30)


def sort_rows(t: torch.Tensor) -> list[list[float]]:
    return sorted(t.tolist())


def test_file_order_and_types(data: Dataset, folder: Path) -> None:
    batches = list(data.batches("train", 64, shuffle=False))
    assert [len(b.label) for b in batches[:-1]] == [64] * (len(batches) - 1)
    for b in batches:
        assert (b.dense.dtype, b.ids.dtype, b.label.dtype) == (torch.float32, torch.int64, torch.float32)
        assert b.dense.is_contiguous()
        assert b.ids.is_contiguous()
    want = [list(r.values()) for r in read_folder(folder)["train"]]
    got = [[r[-1], *r[:-1]] for r in table(batches).tolist()]
    assert got == want


def test_shuffled_epochs(data: Dataset) -> None:
    plain = table(list(data.batches("train", 64, shuffle=False)))
    first = table(list(data.batches("train", 64, seed=1)))
    assert sort_rows(first) == sort_rows(plain)
    assert not first.equal(plain)
    assert first.equal(table(list(data.batches("train", 64, seed=1))))
    assert not first.equal(table(list(data.batches("train", 64, seed=1, epoch=1))))
    assert not first.equal(table(list(data.batches("train", 64, seed=2))))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("buffer_rows", [40, 100, 10**6])
def test_resuming_at_any_batch(data: Dataset, shuffle: bool, buffer_rows: int) -> None:
    def run(start: int) -> list[Batch]:
        batches = data.batches(
            "train", 48, shuffle=shuffle, seed=3, epoch=2, start_batch=start, buffer_rows=buffer_rows
        )
        out = list(batches)
        assert len(batches) == len(out)
        return out

    whole = run(0)
    for start in (1, 3, len(whole) - 1):
        assert table(run(start)).equal(table(whole[start:]))
    assert run(len(whole)) == []


def test_last_batch(data: Dataset) -> None:
    rows = data.splits["train"]
    kept = data.batches("train", 64, drop_last=True)
    assert len(kept) == rows // 64
    assert {len(b.label) for b in kept} == {64}
    whole = data.batches("train", 64)
    assert len(whole) == -(-rows // 64)
    assert sum(len(b.label) for b in whole) == rows


def test_batches_are_not_views_of_the_data(data: Dataset) -> None:
    for shuffle in (True, False):
        before = table(list(data.batches("valid", 16, shuffle=shuffle)))
        for b in data.batches("valid", 16, shuffle=shuffle):
            for t in b:
                t.zero_()
        assert table(list(data.batches("valid", 16, shuffle=shuffle))).equal(before)


def test_stopping_early_ends_the_thread(data: Dataset) -> None:
    before = threading.active_count()
    it = iter(data.batches("train", 8))
    next(it)
    it.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_an_error_while_loading_reaches_the_consumer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_dataset(folder, memory_limit=0)

    def fail(self: Dataset, *a: object) -> Batch:
        raise DataError("lost")

    monkeypatch.setattr(Dataset, "_read", fail)
    with pytest.raises(DataError, match="lost"):
        list(data.batches("train", 8))


def test_wrong_arguments(data: Dataset) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'train'"):
        data.batches("trian", 8)
    with pytest.raises(ConfigError, match=r"2 faults[\s\S]*batch_size[\s\S]*epoch"):
        data.batches("train", 0, epoch=-1)


@given(st.integers(0, 50), st.integers(1, 20), st.booleans(), st.sampled_from([torch.int32, torch.int64]))
def test_in_memory(n: int, batch_size: int, shuffle: bool, kind: torch.dtype) -> None:
    ids = torch.arange(2 * n, dtype=kind).view(n, 2)
    data = InMemoryDataset(torch.arange(float(n)).view(n, 1), ids, torch.ones(n, dtype=torch.int8))
    batches = list(data.batches(batch_size, shuffle=shuffle, seed=n))
    got = torch.cat([b.ids for b in batches]) if batches else ids.long()
    assert sorted(got[:, 0].tolist()) == ids[:, 0].tolist()
    for b in batches:
        assert b.ids.dtype == torch.int64
        assert (b.dense[:, 0] * 2).long().equal(b.ids[:, 0])


def test_in_memory_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"2 faults[\s\S]*equally many rows[\s\S]*int32 or int64"):
        InMemoryDataset(torch.zeros(2, 1), torch.zeros(3, 1), torch.zeros(2))
    with pytest.raises(ConfigError, match="shapes"):
        InMemoryDataset(torch.zeros(2), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(2))


class TestDamage:
    """What ``open_dataset`` says about a folder that is not whole."""

    @pytest.fixture
    def copy(self, folder: Path, tmp_path: Path) -> Path:
        import shutil

        return Path(shutil.copytree(folder, tmp_path / "copy"))

    def test_missing_and_cut_files_are_all_named(self, copy: Path) -> None:
        shards = sorted(copy.glob("train-*.parquet"))
        shards[0].unlink()
        shards[1].write_bytes(shards[1].read_bytes()[:-7])
        (copy / "vocab" / "C7.parquet").unlink()
        with pytest.raises(DataError) as caught:
            open_dataset(copy)
        for part in (f"{shards[0].name} is missing", f"{shards[1].name} is damaged", "vocab/C7.parquet is missing"):
            assert part in str(caught.value)

    def test_altered_bytes_show_on_verification(self, copy: Path) -> None:
        shard = next(copy.glob("test-*.parquet"))
        raw = bytearray(shard.read_bytes())
        raw[len(raw) // 2] ^= 1
        shard.write_bytes(raw)
        open_dataset(copy)
        with pytest.raises(DataError, match="SHA-256"):
            open_dataset(copy, verify=True)

    def test_unreadable_parquet(self, copy: Path) -> None:
        shard = next(copy.glob("valid-*.parquet"))
        shard.write_bytes(b"x" * shard.stat().st_size)
        with pytest.raises(DataError, match=r"valid-.*cannot be read"):
            list(open_dataset(copy).batches("valid", 8))

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"version": 99}, "expected version 1 or 2; got 99"),
            ({"format": "other"}, "expected format"),
            ({"id_mod": "raw"}, "unknown key .*'id_mod'; did you mean 'id_mode'"),
            ({"labels": None, "_drop": "labels"}, "`labels` is missing"),
        ],
    )
    def test_schema_of_another_kind(self, copy: Path, change: dict[str, object], says: str) -> None:
        path = copy / "schema.json"
        value = {**json.loads(path.read_text()), **change}
        value.pop(str(value.pop("_drop", "")), None)
        path.write_text(json.dumps(value))
        with pytest.raises((DataError, UnknownNameError), match=says):
            open_dataset(copy)

    def test_no_schema(self, copy: Path, tmp_path: Path) -> None:
        (copy / "schema.json").write_text("{")
        with pytest.raises(DataError, match="cannot be read as JSON"):
            open_dataset(copy)
        with pytest.raises(DataError, match=r"holds no schema\.json; make a data folder with"):
            open_dataset(tmp_path / "nowhere")
        (copy / "schema.json").unlink()
        (copy / ".work").mkdir()
        with pytest.raises(DataError, match="did not finish"):
            open_dataset(copy)

    def test_no_statistics(self, copy: Path) -> None:
        (copy / "stats.json").unlink()
        with pytest.raises(DataError, match="cannot be read as statistics"):
            _ = open_dataset(copy).stats


def test_numeric_moments_are_those_of_the_training_rows(folder: Path) -> None:
    data = open_dataset(folder)
    mean, std = data.numeric_moments()
    dense = data.load("train").dense.double()
    torch.testing.assert_close(mean.double(), dense.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(std.double(), dense.std(0, correction=0), rtol=1e-5, atol=1e-6)
    streamed = open_dataset(folder, memory_limit=0).numeric_moments()
    torch.testing.assert_close(streamed, (mean, std))


def test_counts_of_the_vocabularies_are_those_of_the_rows(folder: Path) -> None:
    data = open_dataset(folder)
    ids = data.load("train").ids.long()
    for column, name in enumerate(data.feature_names):
        found = data.counts(name)
        assert found.dtype == torch.int64
        wanted = torch.bincount(ids[:, column], minlength=data.schema(1)[name].num_embeddings)
        assert torch.equal(found, wanted)
        assert torch.equal(RowSource.counts(data, name), wanted)
        assert torch.equal(data.held_out(0.3).counts(name), wanted)


def test_batches_carry_further_parts() -> None:
    n = 10
    weight = torch.arange(float(n))
    data = InMemoryDataset(torch.zeros(n, 1), torch.zeros(n, 2, dtype=torch.int32), torch.ones(n), {"weight": weight})
    found = torch.cat([b.extra["weight"] for b in data.batches(3, seed=1)])
    assert not torch.equal(found, weight)
    assert torch.equal(found.sort().values, weight)
    batch = next(iter(data.batches(4, shuffle=False)))
    dense, ids, label = batch
    assert dense is batch.dense
    assert ids is batch.ids
    assert label is batch.label
    with pytest.warns(DeprecationWarning, match="by position"):
        assert batch[1] is batch.ids
    with pytest.raises(ConfigError, match="'weight' must have 10 rows; got 9"):
        InMemoryDataset(data.dense, data.ids, data.label, {"weight": weight[1:]})


def test_rare_values_count_for_the_unknown_id(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.tsv", random_rows(300, 3, values=60))
    convert_criteo(rows, tmp_path / "out", CriteoOptions(min_count=4))
    data = open_dataset(tmp_path / "out")
    for name in data.feature_names:
        assert torch.equal(data.counts(name), RowSource.counts(data, name))
    assert any(int(data.counts(name)[0]) > 0 for name in data.feature_names)
