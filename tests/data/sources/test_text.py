"""Every source of text beside polars reading the same frame whole."""

from __future__ import annotations

import gzip
import io
import random
from pathlib import Path

import polars as pl
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from recsys_embed.data.sources import Source, open_source
from recsys_embed.data.sources import text as text_module
from recsys_embed.errors import ConfigError, DataError

SQUEEZE = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def rows_of(source: Source, start: int = 0, rows: int = 1 << 20, columns=None) -> tuple[pl.DataFrame, list]:
    """All rows of all files and the bad ones; chunks must follow one another."""
    frames, bad = [pl.DataFrame(schema={c: source.types[c] for c in columns or source.types})], []
    for file in range(len(source.files)):
        at = start
        for chunk in source.chunks(file, start, rows, columns):
            assert chunk.first == at
            assert chunk.stop - chunk.first <= rows
            at = chunk.stop
            frames.append(chunk.frame)
            bad += chunk.bad
    return pl.concat(frames), bad


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Blocks that end anywhere in a record, and types from the first rows alone."""
    monkeypatch.setattr(text_module.TextFiles.blocks, "__defaults__", (101,))
    monkeypatch.setattr(text_module, "SAMPLE_BYTES", 64)


TYPES = {"small": "integer", "large": "unsigned", "real": "float", "flag": "boolean", "zip": "string"}


def table(rows: int = 60) -> pl.DataFrame:
    rng = random.Random(7)
    words = ["", "a", 'say "hi"', "x,y", "two\nlines", "é", "  pad ", "NA"]
    return pl.DataFrame(
        {
            "word": [rng.choice([None, *words[1:]]) for _ in range(rows)],
            "small": [rng.choice([None, 0, -3, 12]) for _ in range(rows)],
            "large": [rng.choice([2**53 + 1, 2**64 - 1]) for _ in range(rows)],
            "real": [rng.choice([None, 0.1, -2.5e-8, 1e300]) for _ in range(rows)],
            "flag": [rng.choice([None, True, False]) for _ in range(rows)],
            "zip": [rng.choice(["00123", "99999"]) for _ in range(rows)],
        },
        schema_overrides={"large": pl.UInt64},
    )


@pytest.mark.parametrize(("separator", "squeeze"), [(",", ""), ("\t", ".gz"), (";", ".zst"), ("|", "")])
def test_csv_is_the_frame_that_was_written(tmp_path, small_blocks, separator, squeeze) -> None:
    frame = table()
    path = tmp_path / f"t.csv{squeeze}"
    path.write_bytes(SQUEEZE[squeeze](frame.write_csv(separator=separator).encode()))
    source = open_source(path, {"types": TYPES})
    got, bad = rows_of(source, rows=17)
    assert not bad
    assert_frame_equal(got, frame)
    resumed, _ = rows_of(source, start=33, rows=17, columns=["large", "word"])
    assert_frame_equal(resumed, frame.select("large", "word")[33:])


@pytest.mark.parametrize("squeeze", SQUEEZE)
def test_json_lines_are_the_frame_that_was_written(tmp_path, small_blocks, monkeypatch, squeeze) -> None:
    frame = table().with_columns(tags=pl.Series([["a"], [], None] * 20), nested=pl.Series([[1, 2], None, [2**60]] * 20))
    path = tmp_path / f"t.jsonl{squeeze}"
    path.write_bytes(SQUEEZE[squeeze](frame.write_ndjson().encode()))
    source = open_source(path)
    got, bad = rows_of(source, rows=17)
    assert not bad
    assert_frame_equal(got, frame)
    resumed, _ = rows_of(source, start=33, rows=17, columns=["nested"])
    assert_frame_equal(resumed, frame.select("nested")[33:])


def test_arrow_files_are_the_frame_that_was_written(tmp_path) -> None:
    frame = table().with_columns(tags=pl.Series([["a"], [], None] * 20))
    frame[:40].with_columns(pl.col("small").cast(pl.Int16)).write_ipc(tmp_path / "a.arrow")
    frame[40:].write_ipc(tmp_path / "b.feather", compression="lz4")
    source = open_source([tmp_path / "a.arrow", tmp_path / "b.feather"])
    assert_frame_equal(rows_of(source, rows=17)[0], frame)
    assert_frame_equal(rows_of(source, start=33, rows=17, columns=["tags"])[0][:7], frame.select("tags")[33:40])
    frame.write_ipc_stream(tmp_path / "c.arrow")
    with pytest.raises(DataError, match="Arrow stream; write an Arrow IPC file"):
        open_source(tmp_path / "c.arrow").types  # noqa: B018


CELLS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from(['"', ",", "\n", "|"]), max_size=5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=20), st.integers(1, 9))
def test_quotes_and_newlines_survive_any_blocks(tmp_path, small_blocks, cells, rows) -> None:
    # A letter before each keeps polars from writing null and numbers.
    frame = pl.DataFrame([("x" + a, "y" + b) for a, b in cells], schema=["first", "second"], orient="row")
    (tmp_path / "t.csv").write_text(frame.write_csv(), newline="")
    got, bad = rows_of(open_source(tmp_path / "t.csv", {"separator": ","}), rows=rows)
    assert not bad
    assert_frame_equal(got, frame)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_bad_rows_are_named_and_no_other_is_lost(tmp_path, small_blocks, ending) -> None:
    lines = ["id,price,title"] + [f"{i},{i}.5,t{i}" for i in range(40)]
    lines[6], lines[12], lines[18] = "5,5.5", "eleven,1.5,t", '17,1,12" disc'
    lines[24], lines[30], lines[36] = '23,1.5,"open', "29,1.5,\udce9", "0035,3.5,t"
    path = tmp_path / "t.csv"
    path.write_bytes(ending.join(lines).encode(errors="surrogateescape"))
    source = open_source(path)
    got, bad = rows_of(source, rows=7)
    assert [b.row for b in bad] == [5, 11, 17, 23, 29, 35]
    assert got["id"].to_list() == [i for i in range(40) if i not in (5, 11, 17, 23, 29, 35)]
    for row, words in zip(
        bad,
        ["expected 3 fields", "not an integer", "a quote stands inside", "none ends it", "byte 0xe9", "not an integer"],
        strict=True,
    ):
        assert words in row.reason
    assert (bad[1].column, bad[1].raw) == ("id", "eleven")
    assert source.place(0, 11) == f"{path}, line 13"
    again, tail = rows_of(source, start=11, rows=7)
    assert tail == bad[1:]
    assert_frame_equal(again, got.filter(pl.col("id") > 10))


def test_dialects(tmp_path) -> None:
    plain = pl.DataFrame({"id": [1, 2], "price": [1.5, None], "name": ["é", "b"]})
    cases = {
        "latin.csv": ("id,price,name\n1,1.5,é\n\n2,,b\n".encode("latin-1"), {"encoding": "latin-1"}),
        "comma.csv": ("id;price;name\n1;1,5;é\n2;-;b\n".encode(), {"decimal": ",", "nulls": ["-"]}),
        "colons.csv": ("1::1.5::é\n2::::b".encode(), {"separator": "::", "names": ["id", "price", "name"]}),
        "bom.tsv": (b"\xef\xbb\xbf" + "id\tprice\tname\r\n1\t1.5\té\r\n2\t\tb\r\n".encode(), {}),
        "named.csv": ("a|b|c\n 1|1.5|é\n2||b\n".encode(), {"names": ["id", "price", "name"], "header": True}),
        "other.txt": ("id,price,name\n1,1.5,é\n2,,b\n".encode(), {"format": "csv"}),
        "gbk.csv": ("id,price,name\n1,1.5,é\n2,,b\n".encode("gbk"), {"encoding": "gbk"}),
    }
    for name, (data, options) in cases.items():
        (tmp_path / name).write_bytes(data)
        got, bad = rows_of(open_source(tmp_path / name, options))
        assert not bad, name
        assert_frame_equal(got, plain)
    (tmp_path / "quotes.csv").write_text('a\tb\n12" disc\t"x\n')
    assert rows_of(open_source(tmp_path / "quotes.csv", {"quote": ""}))[0].rows() == [('12" disc', '"x')]
    assert list(open_source(tmp_path / "colons.csv").types) == ["c1", "c2", "c3"]


def test_files_of_one_table_have_one_type(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("x,y,z\n1,1,\n")
    (tmp_path / "b.csv").write_text("z,y,x\n5,a,1.5\n")
    got, bad = rows_of(open_source([tmp_path / "a.csv", tmp_path / "b.csv"]))
    assert not bad
    assert_frame_equal(got, pl.DataFrame({"x": [1.0, 1.5], "y": ["1", "a"], "z": [None, 5]}))
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"x": 2.5, "new": [true]}\n')
    got, _ = rows_of(open_source([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]))
    assert_frame_equal(got, pl.DataFrame({"x": [1.0, 2.5], "new": [None, [True]]}))


def test_bad_json_lines_are_named(tmp_path, small_blocks, monkeypatch) -> None:
    monkeypatch.setattr(text_module, "SAMPLE_BYTES", 64)
    lines = [f'{{"id": {i}, "tags": ["a"]}}' for i in range(30)]
    lines[10], lines[15], lines[20] = '{"id": 1.5}', "{broken", "[1]"
    (tmp_path / "t.ndjson").write_text("\n".join(lines))
    got, bad = rows_of(open_source(tmp_path / "t.ndjson"), rows=8)
    assert got["id"].to_list() == [i for i in range(30) if i not in (10, 15, 20)]
    assert [(b.row, b.column, b.raw) for b in bad] == [(10, "id", "1.5"), (15, "", "{broken"), (20, "", "[1]")]


def test_options_and_files_that_cannot_be(tmp_path) -> None:
    for name in ("a.xlsx", "e.csv", "t.csv", "w.csv"):
        (tmp_path / name).write_text("x,y\n1,2\n" if name != "e.csv" else "")
    with pytest.raises(ConfigError, match=r"no reader knows this ending \(known endings: .*\.csv.*\.jsonl"):
        open_source(tmp_path / "a.xlsx")
    (tmp_path / "l.jsonl").write_text("[1, 2]\n")
    with pytest.raises(DataError, match="none of the first lines is a JSON object"):
        open_source(tmp_path / "l.jsonl").types  # noqa: B018
    with pytest.raises(ConfigError, match="did you mean 'separator'"):
        open_source(tmp_path / "t.csv", {"seperator": ","})
    with pytest.raises(ConfigError, match=r"(?s)`types`.*`encoding`"):
        open_source(tmp_path / "t.csv", {"encoding": "utf-16", "types": {"x": "int"}})
    with pytest.raises(ConfigError, match="names 'z', which is no column"):
        open_source(tmp_path / "t.csv", {"types": {"z": "string"}}).types  # noqa: B018
    with pytest.raises(DataError, match="empty"):
        open_source(tmp_path / "e.csv").types  # noqa: B018
    (tmp_path / "w.csv").write_bytes("x,y\n1,2".encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        open_source(tmp_path / "w.csv").types  # noqa: B018
    whole = gzip.compress(b"x,y\n" + b"1,2\n" * 9999)
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) - 20])
    with pytest.raises(DataError, match="cut off"):
        rows_of(open_source(tmp_path / "cut.csv.gz"))


@pytest.mark.parametrize("squeeze", SQUEEZE)
def test_libsvm(tmp_path, small_blocks, monkeypatch, squeeze) -> None:
    text = "1 3:1 7:0.5 9:1 # note\n-1 qid:4 9:1\n+1\n0  3:1\t11:1 7:2 4:0\n1 3:x\n1 5:2\n"
    (tmp_path / f"t.svm{squeeze}").write_bytes(SQUEEZE[squeeze](text.encode()))
    options = {"layout": "list", "kinds": {"7": "numeric", "5": "numeric"}}
    monkeypatch.setattr(text_module, "SAMPLE_BYTES", 1 << 20)
    got, bad = rows_of(open_source(tmp_path / f"t.svm{squeeze}", options), rows=2)
    want = {
        "label": [1.0, -1, 1, 0, 1], "qid": [None, 4, None, None, None],
        "indices": [[3, 9], [9], [], [3, 11], []], "x5": [0.0, 0, 0, 0, 2], "x7": [0.5, 0, 0, 2, 0],
    }  # fmt: skip
    assert_frame_equal(got, pl.DataFrame(want))
    assert [(b.row, b.raw) for b in bad] == [(4, "1 3:x")]


def test_libfm_fields_and_libffm(tmp_path) -> None:
    frame = pl.DataFrame({"label": [1.0, -1.0] * 9, "f1": range(18), "f2": range(100, 118)})
    lines = [f"{y:g} {a}:1 {b}:1" for y, a, b in frame.rows()]
    (tmp_path / "t.libfm").write_text("\n".join([*lines, "1 3:1\n"]))
    got, bad = rows_of(open_source(tmp_path / "t.libfm", {"layout": "fields"}))
    assert_frame_equal(got, frame)
    assert [b.row for b in bad] == [18]
    (tmp_path / "t.ffm").write_text("1 0:5:1 1:7:1 1:8:1 2:9:0.25\n0 1:7:1\n0 0:5:1 3:1:1\n0 0:5\n")
    got, bad = rows_of(open_source(tmp_path / "t.ffm"))
    want = {"label": [1.0, 0, 0], "field_0": [5, None, 5], "field_1": [[7, 8], [7], []], "field_2": [0.25, 0, 0],
            "field_3": [None, None, 1]}  # fmt: skip
    assert_frame_equal(got, pl.DataFrame(want))
    assert [b.row for b in bad] == [3]


def test_polars_reads_the_same_csv(tmp_path) -> None:
    """A second oracle: polars' own reader of the whole file."""
    text = table().select("word", "small", "real").write_csv()
    Path(tmp_path / "t.csv").write_text(text, newline="")
    assert_frame_equal(rows_of(open_source(tmp_path / "t.csv"))[0], pl.read_csv(io.StringIO(text)))
