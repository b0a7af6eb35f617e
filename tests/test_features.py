"""Feature specs and schemas: what is refused, how it is said, and that files come back as they were."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from recsys_embed import FeatureSpec, Schema
from recsys_embed.errors import ConfigError, UnknownNameError


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("name", v) for v in ("", None, 3, "a.b", "a#b", b"a")],
        *[("num_embeddings", v) for v in (0, -1, 2**31, 1.5, "10", True, None, float("nan"), np.float64(3))],
        *[("embedding_dim", v) for v in (0, -1, 65537, 1.5, "10", True, None)],
        *[("pooling", v) for v in ("avg", None, 1, [])],
        *[("ids", v) for v in ("hash", None, [])],
        *[
            ("init", v)
            for v in ("", "normal", "normal:", "normal:-1", "normal:nan", "normal:inf", "uniform:1e400", None)
        ],
        *[("init", v) for v in ("normal:٣", "normal:1 ", "NORMAL:1", 1.0, [])],
    ],
)
def test_arguments_out_of_range_are_refused(key: str, value: Any) -> None:
    good = {"name": "C1", "num_embeddings": 10, "embedding_dim": 4}
    with pytest.raises(ConfigError, match=f"`{key}` must"):
        FeatureSpec(**{**good, key: value})


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)6 faults.*num_embed.*embedding_dim.*pooling.*ids.*name.*init"):
        FeatureSpec("", 0, 0, "x", "y", "z")  # type: ignore[arg-type]


def test_integers_of_numpy_become_those_of_python() -> None:
    spec = FeatureSpec("C1", np.int64(10), np.int32(4))  # type: ignore[arg-type]
    assert spec == FeatureSpec("C1", 10, 4)
    assert json.loads(json.dumps(Schema([spec]).to_dict())) == Schema([spec]).to_dict()


@pytest.mark.parametrize(
    ("init", "distribution"),
    [
        ("sqrt_rows", ("uniform", 0.1)),
        ("sqrt_dim", ("uniform", 0.5)),
        ("xavier", ("uniform", (6 / 104) ** 0.5)),
        ("normal:0.25", ("normal", 0.25)),
        ("uniform:1e-3", ("uniform", 0.001)),
        ("normal:0", ("normal", 0.0)),
    ],
)
def test_initial_distributions(init: str, distribution: tuple[str, float]) -> None:
    spec = FeatureSpec("C1", 100, 4, init=init)
    assert spec.initial_distribution() == pytest.approx(distribution)
    with pytest.warns(DeprecationWarning, match="use 'initial_distribution'"):
        assert spec.init_law() == spec.initial_distribution()


def test_schemas_survive_json() -> None:
    schema = Schema([FeatureSpec("C1", 10, 4), FeatureSpec("C2", 20, 8, "max", "raw", "normal:1")])
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema
    assert hash(schema) == hash(Schema(list(schema)))
    assert schema.uniform_dim is None
    assert schema.with_dim(1).uniform_dim == 1
    with pytest.raises(UnknownNameError, match="did you mean 'C2'"):
        schema["C2 "]


def test_schemas_refuse_what_is_no_feature() -> None:
    spec = FeatureSpec("C1", 10, 4)
    with pytest.raises(ConfigError, match=r"(?s)2 faults.*'C1' occurs more than once.*feature 2 must be a FeatureSpec"):
        Schema([spec, spec, "C2"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="at least one feature"):
        Schema([])


@pytest.mark.parametrize("data", [None, [], {}, {"features": None}, {"features": {}}, "text"])
def test_what_is_no_schema_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match="list 'features'"):
        Schema.from_dict(data)


def test_all_faults_of_a_schema_file_come_at_once() -> None:
    items: list[Any] = [
        {"name": "C1", "num_embeddings": 10, "embedding_dim": 4},
        {"name": "C2", "num_embeddings": 10},
        {"name": "C3", "num_embeddings": 0, "embedding_dim": 4},
        {"name": "C4", "num_embeddings": 10, "embedding_dim": 4, "poolin": "sum"},
        3,
        "abc",
        {"name": "C7", "num_embeddings": 10, "embedding_dim": 4, "pooling": []},
    ]
    with pytest.raises(ConfigError) as caught:
        Schema.from_dict({"features": items})
    text = str(caught.value)
    for part in (
        "`embedding_dim` is missing (feature 1)",
        "'C3'",
        "did you mean 'pooling'",
        "got int (feature 4)",
        "got str (feature 5)",
        "'C7'",
    ):
        assert part in text, text


def test_a_long_initializer_is_refused_at_once() -> None:
    # A pattern that tries every split of the digits would take minutes.
    with pytest.raises(ConfigError, match="`init` must be"):
        FeatureSpec("a", 1, 1, init="normal:" + "9" * 200_000 + "x")
    specs = [FeatureSpec("a", 1, 1, init=f"normal:{x}") for x in ("2", ".5", "0.25", "1e-3")]
    assert [spec.initial_distribution()[1] for spec in specs] == [2.0, 0.5, 0.25, 1e-3]
