"""Strings as ids: the documented definition in plain Python, agreement with the data tool, and where they are taken."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.core.hashing import string_ids
from recsys_embed.errors import ConfigError
from recsys_embed.registry import MethodInfo, list_methods
from recsys_embed.testing import example

SAMPLE = Path(os.environ.get("RECSYS_EMBED_DATA", "absent")) / "criteo_kaggle" / "criteo_days1to6.tsv.gz"
HASHING = [m for m in list_methods() if m.config_cls.accepts_raw]
INDEXED = [m for m in list_methods() if not m.config_cls.accepts_raw]


def definition(value: Any, id_bits: int = 32) -> int:
    """The id of one value, by the sentences of the documentation."""
    if value is None or value != value or value in ("", b""):
        return 2**32 if id_bits == 32 else -(2**63)
    if isinstance(value, int):
        number = value
    else:
        text = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        if re.fullmatch(rb"[0-9a-fA-F]{8}|[0-9a-fA-F]{16}", text):
            number = int(text, 16)
        else:
            number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return (number + 2**63) % 2**64 - 2**63


HEX = st.text("0123456789abcdefABCDEF", min_size=6, max_size=17)
VALUES = st.one_of(
    st.text(max_size=20), HEX, HEX.map(str.encode), st.binary(max_size=18), st.none(), st.just(float("nan")),
    st.integers(-(2**63), 2**64 - 1), st.text("0123456789abcdef", min_size=8, max_size=8),
)  # fmt: skip


@given(values=st.lists(VALUES, max_size=20), id_bits=st.sampled_from([32, 64]))
def test_any_values_follow_the_definition(values: list[Any], id_bits: Any) -> None:
    wanted = [definition(v, id_bits) for v in values]
    assert string_ids(values, id_bits=id_bits).tolist() == wanted
    assert string_ids(np.array([*values, None], dtype=object)[:-1], id_bits=id_bits).tolist() == wanted


@given(values=st.lists(st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"])), min_size=1))
def test_arrays_of_strings(values: list[str]) -> None:
    assert string_ids(np.array(values)).tolist() == [definition(v) for v in values]
    encoded = np.array([v.encode() for v in values])
    assert string_ids(encoded).tolist() == [definition(v) for v in values]


def test_published_values() -> None:
    """Computed once with Python's hashlib; they may never change, or trained tables lose their rows."""
    texts = ["a", "user:17", "17", "Zürich", "0", "ffffffffffffffff", "68FD1E64"]
    hashed = [3405396810240292928, 575456571000080189, -5441670452138395360, 636548684707296368, 8493733112532773764]
    assert string_ids(texts).tolist() == [*hashed, -1, 0x68FD1E64]


def test_shapes() -> None:
    assert string_ids("a").shape == ()
    assert string_ids([]).shape == (0,)
    assert string_ids(np.zeros((2, 0), dtype=object)).shape == (2, 0)
    assert torch.equal(string_ids([["a", "b"], ["c", "a"]]), string_ids(["a", "b", "c", "a"]).view(2, 2))
    assert torch.equal(string_ids((("a",), ("b",))), string_ids([["a"], ["b"]]))
    strided = np.array([["a", "b"], ["c", "d"]]).T
    assert torch.equal(string_ids(strided), string_ids(["a", "c", "b", "d"]).view(2, 2))
    assert string_ids(["a"]).dtype == torch.int64


def test_integers_keep_their_bits() -> None:
    huge = [2**63, 2**64 - 1, -(2**63), 2**63 - 1, 0]
    wanted = [-(2**63), -1, -(2**63), 2**63 - 1, 0]
    assert string_ids(huge).tolist() == wanted
    assert string_ids(np.array([2**63, 2**64 - 1, 5], dtype=np.uint64)).tolist() == [-(2**63), -1, 5]
    assert string_ids(torch.tensor([2**63 - 1, 5]).view(torch.uint64)).tolist() == [2**63 - 1, 5]
    assert string_ids(torch.tensor([-1]).view(torch.uint64)).tolist() == [-1]
    assert string_ids(np.array([1, 2], dtype=np.int16)).tolist() == [1, 2]
    assert string_ids([np.int32(3), np.uint64(2**64 - 1)]).tolist() == [3, -1]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0], "got 1.0 (float)"),
        ([True, 1], "got True (bool)"),
        ([1, True], "got True (bool)"),
        ([2**64], str(2**64)),
        ([-(2**63) - 1], "int"),
        (["a", ["b"]], "equal length"),
        ([["a"], ["b", "c"]], "equal length"),
        ([{"a"}], "set"),
        ({"a": 1}, "dict"),
        (np.array([1.0]), "float64"),
        (np.array([True]), "bool"),
        (torch.tensor([1.0]), "float32"),
        (torch.tensor([True]), "bool"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), "datetime64"),
    ],
)
def test_other_values_are_refused(values: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        string_ids(values)


def test_hexadecimal_only() -> None:
    assert string_ids(["1f", "F", "", "68fd1e64"], hexadecimal=True).tolist() == [31, 15, 2**32, 0x68FD1E64]
    wide = string_ids(["f" * 16, "7", ""], hexadecimal=True, id_bits=64)
    assert wide.tolist() == [-1, 7, -(2**63)]
    for value, bits in (("f" * 9, 32), ("xyz", 32), ("0x1f", 32), ("f" * 17, 64), ("8" + "0" * 15, 64)):
        with pytest.raises(ConfigError, match="hexadecimal digits"):
            string_ids(["1f", value], hexadecimal=True, id_bits=bits)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`id_bits` must be 32 or 64"):
        string_ids(["a"], id_bits=16)  # type: ignore[arg-type]


# -- the data tool ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id_bits", [32, 64])
def test_strings_have_the_ids_of_the_data_tool(tmp_path: Path, id_bits: Any) -> None:
    """A file converted with raw ids, and its fields as strings."""
    from recsys_embed.data import CriteoOptions, SplitRule, convert_criteo, open_dataset

    digits = id_bits // 4
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        cats = ["".join(rng.choice(list("0123456789abcdef"), digits)) for _ in range(26)]
        cats[int(rng.integers(26))] = ""
        rows.append(cats)
    text = "".join("\t".join(["0"] + ["1"] * 13 + cats) + "\n" for cats in rows)
    (tmp_path / "day.tsv").write_text(text)
    options = CriteoOptions(ids="raw", id_bits=id_bits, split=SplitRule(valid=Fraction(0), test=Fraction(0)))
    convert_criteo(tmp_path / "day.tsv", tmp_path / "out", options)
    ours = string_ids(rows, id_bits=id_bits)
    assert torch.equal(open_dataset(tmp_path / "out").load("train").ids, ours)
    assert torch.equal(ours, string_ids(rows, id_bits=id_bits, hexadecimal=True))


@pytest.mark.skipif(not SAMPLE.exists(), reason="RECSYS_EMBED_DATA is not set")
@pytest.mark.slow
def test_strings_of_real_rows_have_the_ids_of_the_data_tool(tmp_path: Path) -> None:
    from recsys_embed.data import CriteoOptions, SplitRule, convert_criteo, open_dataset

    options = CriteoOptions(ids="raw", split=SplitRule(valid=Fraction(0), test=Fraction(0)))
    convert_criteo(SAMPLE, tmp_path / "out", options)
    with gzip.open(SAMPLE, "rt") as file:
        rows = [line.rstrip("\n").split("\t")[14:] for line in file]
    assert torch.equal(open_dataset(tmp_path / "out").load("train").ids, string_ids(rows))


# -- where they are taken ---------------------------------------------------------------------------------------------

WORDS = ["de", "68fd1e64", "", "Zürich"]


@pytest.mark.parametrize("method", HASHING, ids=lambda m: m.name)
def test_hashing_methods_take_strings(method: MethodInfo) -> None:
    ids = string_ids(WORDS)
    for policy in (None, "hash"):
        module = example(method, unseen=policy)
        wanted = module(ids)
        assert torch.equal(module(WORDS), wanted)
        assert torch.equal(module(np.array(WORDS)), wanted)
        assert torch.equal(module(np.array(WORDS, dtype=object).reshape(2, 2)), wanted.view(2, 2, -1))
        assert torch.equal(module([WORDS[:2], WORDS[2:]]), wanted.view(2, 2, -1))
        assert torch.equal(module(ids.numpy()), wanted)
        assert torch.equal(module(ids.view(torch.uint64)), wanted)
        assert module([]).shape == (0, module.output_dim)
    bag = example(method, mode="sum")
    assert torch.equal(bag(WORDS, torch.tensor([0, 3])), bag(ids, torch.tensor([0, 3])))
    assert torch.equal(bag([WORDS]), bag(ids.view(1, -1)))
    for policy in ("oov", "zero", "raise"):
        with pytest.raises(ConfigError, match=f"strings for feature 'embedding'.*{policy}.*string_ids"):
            example(method, unseen=policy)(WORDS)
        with pytest.raises(ConfigError, match="strings"):
            example(method, unseen=policy)(np.array(WORDS, dtype=object))


@pytest.mark.parametrize("method", INDEXED, ids=lambda m: m.name)
def test_other_methods_say_who_takes_strings(method: MethodInfo) -> None:
    module = example(method, unseen="hash")
    for given_as in (WORDS, np.array(WORDS), [WORDS], "de", b"de"):
        with pytest.raises(
            ConfigError, match=r"strings for feature 'embedding'.*hashing method.*string_ids.*vocabulary"
        ):
            module(given_as)
    for junk in ([1, 2], np.array([1]), None, 3):
        with pytest.raises(ConfigError, match="must be a tensor"):
            module(junk)


def test_collections_take_strings_of_features_that_hash() -> None:
    schema = Schema([FeatureSpec("word", 100, 4), FeatureSpec("index", 9, 4), FeatureSpec("tags", 50, 4, ids="raw")])
    hashed = rse.get_method("hash").config_cls.from_params({"num_buckets": 7})
    plain = rse.get_method("full").config_cls.from_params({})
    coll = EmbeddingCollection(schema, Plan({"word": hashed, "index": plain, "tags": hashed}))
    index, tags, offsets = torch.tensor([3, 4]), ["x", "y", "68fd1e64"], torch.tensor([0, 1, 3])
    wanted = coll({"word": string_ids(["a", "b"]), "index": index, "tags": (string_ids(tags), offsets)})
    given_as = {"word": ["a", "b"], "index": index, "tags": (tags, offsets)}
    assert torch.equal(coll(given_as), wanted)
    assert torch.equal(coll({**given_as, "tags": (np.array(tags), offsets)}), wanted)
    assert torch.equal(coll({**given_as, "word": [["a"], ["b"]]}), wanted)
    assert given_as["word"] == ["a", "b"], "what the caller gave is not changed"
    with pytest.raises(ConfigError, match="strings for feature 'index'"):
        coll({**given_as, "index": ["a", "b"]})
    with pytest.raises(ConfigError, match=r"equal length"):
        coll({**given_as, "tags": [["x"], ["y", "z"]]})


@pytest.mark.parametrize("values", [["de", None, "68fd1e64"]])
def test_columns_of_data_frames(values: list[Any]) -> None:
    polars = pytest.importorskip("polars")
    assert string_ids(polars.Series(values)).tolist() == [definition(v) for v in values]
