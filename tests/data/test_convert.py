"""Conversion from text to folder: values, ids, splits, files, faults."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections import Counter
from fractions import Fraction
from pathlib import Path

import polars as pl
import pytest
from helpers import contents, line, random_rows, read_folder, write
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_embed.data import CriteoOptions, SplitRule, StorageError, Vocabulary, convert_criteo, open_dataset
from recsys_embed.data.criteo.explain import GoodRow
from recsys_embed.data.folder import lock
from recsys_embed.data.stats import stats_table
from recsys_embed.errors import ConfigError, DataError

ALL_TRAIN = SplitRule(valid=Fraction(0), test=Fraction(0))
C = [f"C{i}" for i in range(1, 27)]


def decode(out: Path, row: dict[str, object], name: str) -> object:
    """The value behind an id, by the stored vocabulary."""
    table = dict(pl.read_parquet(out / "vocab" / f"{name}.parquet").select("id", "value").iter_rows())
    return table.get(row[name], "unknown")


@settings(max_examples=10)
@given(st.integers(0, 2**32), st.integers(1, 40), st.booleans())
def test_round_trip_through_vocabularies(tmp_path_factory: pytest.TempPathFactory, seed: int, n: int, gz: bool) -> None:
    folder = tmp_path_factory.mktemp("trip")
    rows = random_rows(n, seed)
    source = write(folder / ("a.tsv.gz" if gz else "a.tsv"), rows, header=bool(seed % 2))
    convert_criteo(source, folder / "out", CriteoOptions(min_count=1, split=ALL_TRAIN))
    got = read_folder(folder / "out")["train"]
    assert len(got) == n
    tables = {
        c: dict(pl.read_parquet(folder / "out" / "vocab" / f"{c}.parquet").select("id", "value").iter_rows()) for c in C
    }
    for row, want in zip(got, rows, strict=True):
        assert row["label"] == want.label
        assert [tables[c][row[c]] for c in C] == list(want.cats)
        for i, v in enumerate(want.ints):
            shift, low = (4, -3) if i == 1 else (1, 0)
            number = 0.0 if v is None else math.log(max(v, low) + shift)
            assert row[f"I{i + 1}"] == pytest.approx(number, rel=1e-6)


def test_ids_follow_training_frequency_and_nothing_else(tmp_path: Path) -> None:
    rows = random_rows(240, 5)
    convert_criteo(write(tmp_path / "a.tsv", rows), tmp_path / "out", CriteoOptions(min_count=2))
    train = rows[: 240 - 40 - 24]
    got = read_folder(tmp_path / "out")
    assert [len(got[s]) for s in ("train", "valid", "test")] == [176, 24, 40]
    assert [r["label"] for s in ("train", "valid", "test") for r in got[s]] == [r.label for r in rows]
    data = open_dataset(tmp_path / "out")
    for j, name in enumerate(C):
        seen = Counter(r.cats[j] for r in train)
        kept = [v for v, c in seen.items() if c >= 2]
        kept.sort(key=lambda v: (-seen[v], v is None, v or 0))
        ids = {v: i for i, v in enumerate(kept, 1)}
        for part, start in (("train", 0), ("valid", 176), ("test", 200)):
            assert [r[name] for r in got[part]] == [ids.get(r.cats[j], 0) for r in rows[start : start + len(got[part])]]
        assert data.schema(4)[name].num_embeddings == len(kept) + 1
        field = data.stats["fields"][name]
        assert field["distinct"] == len(seen)
        assert field["seen_once"] == sum(c == 1 for c in seen.values())
        assert field["coverage"]["1"] == pytest.approx(max(seen.values()) / 176, abs=1e-6)
        unknown = sum(r.cats[j] not in ids for r in rows[200:]) / 40
        assert field["oov_rate"]["test"] == pytest.approx(unknown, abs=1e-6)
        assert field["missing_rate"]["test"] == pytest.approx(
            sum(r.cats[j] is None and None in ids for r in rows[200:]) / 40, abs=1e-6
        )


@pytest.mark.parametrize("bits", [32, 64])
def test_raw_ids_are_the_hashes(tmp_path: Path, bits: int) -> None:
    rows = random_rows(50, 9)
    convert_criteo(
        write(tmp_path / "a.tsv", rows), tmp_path / "out", CriteoOptions(ids="raw", id_bits=bits, split=ALL_TRAIN)
    )
    data = open_dataset(tmp_path / "out")
    ids = data.load("train").ids
    missing = 2**32 if bits == 32 else -(2**63)
    assert ids.tolist() == [[missing if v is None else v for v in r.cats] for r in rows]
    assert data.schema(8)["C1"].ids == "raw"
    assert data.schema(8)["C1"].num_embeddings == len({r.cats[0] for r in rows})
    assert not (tmp_path / "out" / "vocab").exists()
    with pytest.raises(ConfigError, match="raw ids: there is no vocabulary"):
        data.vocabulary("C1")


def test_buckets_become_features(tmp_path: Path) -> None:
    rows = random_rows(60, 3)
    convert_criteo(write(tmp_path / "a.tsv", rows), tmp_path / "out", CriteoOptions(dense="bucket", split=ALL_TRAIN))
    data = open_dataset(tmp_path / "out")
    assert data.num_dense == 0
    assert data.feature_names[:2] == ("I1", "I2")
    assert data.feature_names[13] == "C1"
    vocab = data.vocabulary("I2")
    values = dict(zip(vocab.ids.tolist(), vocab.values.view("int64").tolist(), strict=True))
    for row, want in zip(data.load("train").ids[:, 1].tolist(), rows, strict=True):
        v = want.ints[1]
        if v is None:
            assert row == vocab.missing_id
        else:
            assert values[row] == (math.floor(math.log(v) ** 2) if v > 2 else v)
    (batch,) = data.batches("train", 60)
    assert batch.dense.shape == (60, 0)
    assert batch.ids.shape == (60, 39)


@pytest.mark.parametrize("rule", [SplitRule(), SplitRule("random", seed=3), SplitRule("random", seed=4)])
def test_splits_are_disjoint_and_complete(tmp_path: Path, rule: SplitRule) -> None:
    rows = [GoodRow(0, (k,) + (None,) * 12, (k,) * 26) for k in range(600)]
    convert_criteo(write(tmp_path / "a.tsv", rows), tmp_path / "out", CriteoOptions(ids="raw", split=rule))
    got = {name: [r["C1"] for r in part] for name, part in read_folder(tmp_path / "out").items()}
    assert sorted(v for part in got.values() for v in part) == list(range(600))
    if rule.kind == "order":
        assert got["test"] == list(range(500, 600))
        assert got["valid"] == list(range(440, 500))
    else:
        assert 60 < len(got["test"]) < 140
        assert got["test"] == sorted(got["test"])
        other = SplitRule("random", seed=rule.seed + 1)
        convert_criteo(tmp_path / "a.tsv", tmp_path / "other", CriteoOptions(ids="raw", split=other))
        assert [r["C1"] for r in read_folder(tmp_path / "other")["test"]] != got["test"]


def test_split_by_file_and_natural_order(tmp_path: Path) -> None:
    days = tmp_path / "days"
    days.mkdir()
    for day in (1, 2, 10):
        write(days / f"day_{day}.tsv", [GoodRow(0, (None,) * 13, (day,) * 26)] * 3, header=day == 2)
    rule = SplitRule("file", valid_files=("day_2.*",), test_files=("day_10.*",))
    convert_criteo(days, tmp_path / "out", CriteoOptions(ids="raw", split=rule))
    got = {name: [r["C1"] for r in part] for name, part in read_folder(tmp_path / "out").items()}
    assert got == {"train": [1] * 3, "valid": [2] * 3, "test": [10] * 3}
    convert_criteo(str(days / "*.tsv"), tmp_path / "all", CriteoOptions(ids="raw", split=ALL_TRAIN))
    assert [r["C1"] for r in read_folder(tmp_path / "all")["train"]] == [1] * 3 + [2] * 3 + [10] * 3
    with pytest.raises(ConfigError, match="'x' of split valid matches none"):
        convert_criteo(days, tmp_path / "bad", CriteoOptions(split=SplitRule("file", valid_files=("x",))))


def test_new_rows_are_encoded_with_an_older_folder(tmp_path: Path) -> None:
    rows = random_rows(100, 1)
    first = tmp_path / "first"
    convert_criteo(write(tmp_path / "a.tsv", rows), first, CriteoOptions(split=ALL_TRAIN))
    plain = [GoodRow(None, r.ints, r.cats) for r in rows[:30]] + random_rows(5, 77, labels=False)
    convert_criteo(
        write(tmp_path / "new.tsv", plain), tmp_path / "new", CriteoOptions(like=first, split=SplitRule("all"))
    )
    old, new = open_dataset(first), open_dataset(tmp_path / "new")
    assert new.splits == {"test": 35}
    assert new.load("test").ids[:30].equal(old.load("train").ids[:30])
    assert new.schema(4) == old.schema(4)
    assert new.load("test").label.isnan().all()
    assert new.stats["splits"]["test"]["click_rate"] is None
    stats_table(new.stats)


@pytest.mark.parametrize("suffix", [".tsv", ".gz", ".zst"])
@pytest.mark.parametrize(("newline", "last"), [(b"\n", True), (b"\r\n", True), (b"\n", False), (b"\r\n", False)])
def test_forms_of_a_file(tmp_path: Path, suffix: str, newline: bytes, last: bool) -> None:
    rows = random_rows(20, 2)
    raw = write(tmp_path / "a.tsv", rows, newline=newline, last=last).read_bytes()
    half = len(raw) // 2
    if suffix == ".gz":  # two members in one archive, as `cat a.gz b.gz` makes them
        raw = gzip.compress(raw[:half]) + gzip.compress(raw[half:])
    elif suffix == ".zst":
        zstd = pytest.importorskip("zstandard", reason="zst files need zstandard")
        raw = zstd.compress(raw[:half]) + zstd.compress(raw[half:])
    source = tmp_path / ("b" + suffix)
    source.write_bytes(raw)
    convert_criteo(source, tmp_path / "out", CriteoOptions(ids="raw", split=ALL_TRAIN))
    assert [r["C5"] for r in read_folder(tmp_path / "out")["train"]] == [r.cats[4] for r in rows]


def test_bad_rows_stop_or_are_set_aside(tmp_path: Path) -> None:
    rows = random_rows(30, 4)
    lines = [line(r) for r in rows]
    lines[3] = b"1\t2\t3"
    lines[7] = lines[7].replace(b"\t", b"\0", 1)
    lines[20] = lines[20][:-3] + b"xyz"
    lines[25] = "ü".encode("latin-1") * 50
    source = tmp_path / "a.tsv"
    source.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(DataError) as caught:
        convert_criteo(source, tmp_path / "out")
    for part in (
        "4 faults",
        f"{source}, line 4: expected 40",
        "line 8: ",
        "line 21, column C26",
        "line 26",
        "quarantine",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "out" / "schema.json").exists()
    report = convert_criteo(
        source, tmp_path / "out", CriteoOptions(on_bad_row="quarantine", ids="raw", split=ALL_TRAIN)
    )
    assert report.rows == {"train": 26}
    assert report.quarantined == 4
    kept = [json.loads(x) for x in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(k["line"], k["column"]) for k in kept] == [(4, None), (8, None), (21, "C26"), (26, None)]
    assert [k["raw"].encode("latin-1") for k in kept] == [lines[i] for i in (3, 7, 20, 25)]
    assert {k["file"] for k in kept} == {str(source)}
    good = [r for i, r in enumerate(rows) if i not in (3, 7, 20, 25)]
    assert [r["C1"] for r in read_folder(tmp_path / "out")["train"]] == [r.cats[0] for r in good]
    manifest = open_dataset(tmp_path / "out").manifest
    assert manifest.rows_read == 30
    assert manifest.quarantined == 4


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_cut_archives(tmp_path: Path, kind: str) -> None:
    rows = random_rows(1500, 4, values=10**6)
    raw = write(tmp_path / "a.tsv", rows).read_bytes()
    if kind == "gz":
        packed = gzip.compress(raw)
    else:
        packed = pytest.importorskip("zstandard", reason="zst files need zstandard").compress(raw)
    source = tmp_path / f"cut.{kind}"
    source.write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(DataError, match=r"archive is cut off"):
        convert_criteo(source, tmp_path / "out")
    options = CriteoOptions(on_bad_row="quarantine", ids="raw", split=ALL_TRAIN)
    report = convert_criteo(source, tmp_path / "out", options)
    assert report.quarantined <= 1
    got = [r["C1"] for r in read_folder(tmp_path / "out")["train"]]
    assert got == [r.cats[0] for r in rows[: len(got)]]
    assert "cut off" in open_dataset(tmp_path / "out").stats["file_faults"][0]


def test_damaged_archive(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(write(tmp_path / "a.tsv", random_rows(300, 4, values=10**6)).read_bytes()))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / "a.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"archive is damaged|expected"):
        convert_criteo(tmp_path / "a.gz", tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "the file is empty"), (gzip.compress(b""), "the file is empty")],
    ids=["plain", "gzip"],  # the bytes hold the time, and parallel test processes must agree on names
)
def test_empty_files(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "e.tsv").write_bytes(content)
    with pytest.raises(DataError, match=says):
        convert_criteo(tmp_path / "e.tsv", tmp_path / "out")
    write(tmp_path / "good.tsv", random_rows(10, 1))
    options = CriteoOptions(on_bad_row="quarantine", split=ALL_TRAIN)
    report = convert_criteo([tmp_path / "e.tsv", tmp_path / "good.tsv"], tmp_path / "out", options)
    assert report.rows == {"train": 10}
    assert says in open_dataset(tmp_path / "out").stats["file_faults"][0]


def test_header_alone_and_header_in_another_order(tmp_path: Path) -> None:
    source = write(tmp_path / "h.tsv", random_rows(1, 1), header=True)
    head, _, _ = source.read_bytes().partition(b"\n")
    source.write_bytes(head + b"\n")
    with pytest.raises(DataError, match="a header and no rows"):
        convert_criteo(source, tmp_path / "out")
    source.write_bytes(head.replace(b"I1\tI2", b"I2\tI1") + b"\n")
    with pytest.raises(DataError, match="columns in the order"):
        convert_criteo(source, tmp_path / "out")


def test_binary_junk(tmp_path: Path) -> None:
    import random

    (tmp_path / "j.bin").write_bytes(random.Random(0).randbytes(300_000))
    with pytest.raises(DataError, match=r"j.bin, line 1: "):
        convert_criteo(tmp_path / "j.bin", tmp_path / "out")
    with pytest.raises(DataError, match="no row could be read"):
        convert_criteo(tmp_path / "j.bin", tmp_path / "out", CriteoOptions(on_bad_row="quarantine"))


def test_a_line_without_end(tmp_path: Path) -> None:
    rows = random_rows(4, 1)
    lines = [line(r) for r in rows]
    (tmp_path / "l.tsv").write_bytes(lines[0] + b"\n" + b"a" * (10 << 20) + b"\n" + lines[1] + b"\n")
    report = convert_criteo(
        tmp_path / "l.tsv", tmp_path / "out", CriteoOptions(on_bad_row="quarantine", ids="raw", split=ALL_TRAIN)
    )
    assert report.rows == {"train": 2}
    (bad,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(bad)["line"] == 2
    assert f"got {10 << 20}" in json.loads(bad)["reason"]


def test_labelled_and_unlabelled_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path / "a.tsv", random_rows(3, 1))
    write(tmp_path / "b.tsv", random_rows(3, 1, labels=False))
    with pytest.raises(ConfigError, match=r"a\.tsv has labels and .*b\.tsv has none"):
        convert_criteo([tmp_path / "a.tsv", tmp_path / "b.tsv"], tmp_path / "out")


def test_faults_of_options_come_together() -> None:
    with pytest.raises(ConfigError) as caught:
        CriteoOptions(ids="hash", min_count=0, max_memory=5)  # type: ignore[arg-type]
    for part in ("3 faults", "`ids`", "`min_count`", "`max_memory`"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="leave rows to train on"):
        SplitRule(valid=Fraction(1, 2), test=Fraction(1, 2))
    with pytest.raises(ConfigError, match="no such file"):
        convert_criteo("/nonexistent/x.tsv", "/tmp/never")


def test_folders_in_the_way(tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", random_rows(30, 1))
    out = tmp_path / "out"
    first = convert_criteo(source, out)
    before = contents(out)
    again = convert_criteo(source, out)
    assert (first.already_done, again.already_done) == (False, True)
    assert again.rows == first.rows
    assert contents(out) == before
    with pytest.raises(ConfigError, match=r"min_count: 2 -> 3[\s\S]*--overwrite"):
        convert_criteo(source, out, CriteoOptions(min_count=3))
    convert_criteo(source, out, CriteoOptions(ids="raw"), overwrite=True)
    assert not list((out / "vocab").glob("*"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.docx").write_text("mine")
    with pytest.raises(ConfigError, match=r"thesis\.docx"):
        convert_criteo(source, other)
    with pytest.raises(ConfigError, match="is a file"):
        convert_criteo(source, source)
    with lock(tmp_path / "busy"), pytest.raises(StorageError, match="another process"):
        convert_criteo(source, tmp_path / "busy")


def test_same_input_same_bytes(tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", random_rows(500, 8))
    convert_criteo(source, tmp_path / "one", CriteoOptions(workers=1))
    convert_criteo(source, tmp_path / "two", CriteoOptions(workers=4))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_vocabulary_file_round_trip(tmp_path: Path) -> None:
    convert_criteo(write(tmp_path / "a.tsv", random_rows(100, 8)), tmp_path / "out", CriteoOptions(split=ALL_TRAIN))
    vocab = open_dataset(tmp_path / "out").vocabulary("C2")
    vocab.write(tmp_path / "again.parquet")
    again = Vocabulary.read(tmp_path / "again.parquet", "C2")
    assert again.ids.tolist() == vocab.ids.tolist()
    assert (again.missing_id, again.missing_count, again.size) == (vocab.missing_id, vocab.missing_count, vocab.size)
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "out" / "vocab" / "C2.parquet").read_bytes()


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a regular file"):
        convert_criteo(tmp_path / "pipe", tmp_path / "out")
