"""Plans with arrays: what a file gives back, against numpy; and files that are not the plan's are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_embed import FeatureSpec, Plan, Schema
from recsys_embed.core.plan_arrays import DTYPES, PlanArrays, StoredArray
from recsys_embed.errors import ConfigError

SCHEMA = Schema([FeatureSpec("C1", 1000, 8), FeatureSpec("a/b", 50, 8)])
ARRAYS = {
    "C1": {"codes": torch.arange(3000).view(1000, 3) % 11, "places": torch.arange(1000).int()},
    "a/b": {"codes": torch.full((50, 2), 255, dtype=torch.uint8)},
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    Plan.uniform(SCHEMA, "hash", num_buckets=9).with_arrays(ARRAYS).save(path)
    return path


def same(found: Plan) -> bool:
    values = found.assigned(SCHEMA)
    flat, wanted = ({(f, i): t for f, row in v.items() for i, t in row.items()} for v in (values, ARRAYS))
    return flat.keys() == wanted.keys() and all(
        t.dtype == wanted[k].dtype and torch.equal(t, wanted[k]) for k, t in flat.items()
    )


def test_a_plan_comes_back_with_its_arrays(saved: Path) -> None:
    found = Plan.load(saved)
    assert same(found)
    assert found == Plan.uniform(SCHEMA, "hash", num_buckets=9).with_arrays(ARRAYS)
    assert found != Plan.uniform(SCHEMA, "hash", num_buckets=9)
    assert found != found.with_arrays({"C1": {"codes": ARRAYS["C1"]["codes"] + 1}})
    # 3,000 codes of 4 bits, 1,000 places of 10, 100 codes of 8: one word behind each; and what the file says of itself.
    beside = saved.with_name("plan.arrays.safetensors")
    size = beside.stat().st_size
    assert size == 8 + int.from_bytes(beside.read_bytes()[:8], "little") + 1504 + 1256 + 100
    again = Plan.from_dict(json.loads(json.dumps(found.to_dict())))
    assert same(again)
    copy = saved.parent / "elsewhere" / "copy.json"
    again.save(copy)
    beside.unlink()
    assert same(Plan.load(copy))


def test_other_programs_read_the_file(saved: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    found = numpy.load_file(saved.with_name("plan.arrays.safetensors"))
    assert set(found) == {"C1/codes", "C1/places", "a/b/codes"}
    assert (found["a/b/codes"] == 255).all()


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES)),
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    low=st.sampled_from([-5, 0]),
    high=st.sampled_from([1, 2, 15, 127, 255, 2**15 - 1, 2**16 - 1, 2**16, 2**31 - 1, 2**63 - 1]),
    seed=st.integers(0, 99),
)
def test_integers_of_any_size(dtype: str, shape: list[int], low: int, high: int, seed: int) -> None:
    bounds = np.iinfo(dtype)
    low, high = max(low, bounds.min), min(high, bounds.max)
    drawn = np.random.default_rng(seed).integers(low, high, shape, dtype, endpoint=True)
    values = torch.from_numpy(drawn.reshape(shape))
    how = StoredArray.of(values)
    stored = how.encode(values)
    assert (stored.dtype, tuple(stored.shape), stored.nbytes) == (*how.in_file, how.nbytes)
    assert how.nbytes <= values.nbytes
    back = how.decode(stored)
    assert (back.dtype, back.shape) == (values.dtype, values.shape)
    assert torch.equal(back, values)


@pytest.mark.parametrize("change", ["gone", "shorter", "longer", "one bit", "another plan's"])
def test_files_of_other_bytes_are_refused(saved: Path, change: str) -> None:
    beside = saved.with_name("plan.arrays.safetensors")
    data = bytearray(beside.read_bytes())
    if change == "gone":
        beside.unlink()
    elif change == "shorter":
        beside.write_bytes(data[:-1])
    elif change == "longer":
        beside.write_bytes(bytes(data) + b"\0")
    elif change == "one bit":
        data[-3] ^= 1
        beside.write_bytes(data)
    else:
        other = {**ARRAYS, "a/b": {"codes": ARRAYS["a/b"]["codes"] - 1}}
        Plan.uniform(SCHEMA, "hash", num_buckets=9).with_arrays(other).save(saved.with_name("other.json"))
        saved.with_name("other.arrays.safetensors").rename(beside)
    with pytest.raises(ConfigError, match=r"plan\.arrays\.safetensors.*(cannot be read|bytes where|SHA-256)"):
        Plan.load(saved)


@pytest.mark.parametrize(
    "array",
    [
        {"dtype": "int64", "shape": [1 << 40]},
        {"dtype": "int64", "shape": [-1]},
        {"dtype": "int64", "shape": [True]},
        {"dtype": "float32", "shape": [1]},
        {"dtype": ["int64"], "shape": [1]},
        {"dtype": "int64", "shape": [1], "bits": 17},
        {"dtype": "uint8", "shape": [1], "bits": 9},
        {"dtype": "int16", "shape": [1], "bits": 16},
        {"dtype": "int64", "shape": [1], "more": 1},
        {"dtype": "int64"},
        [],
    ],
    ids=str,
)
def test_descriptions_that_do_not_fit_take_no_memory(saved: Path, array: Any) -> None:
    data = json.loads(saved.read_text())
    data["arrays"]["features"]["C1"]["codes"] = array
    saved.write_text(json.dumps(data))
    with pytest.raises(
        ConfigError, match=r"an array of a plan.*\(index 'codes', feature 'C1'\)|bytes where the plan says"
    ):
        Plan.load(saved)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000, "nowhere/codes"])
def test_names_that_no_file_has_are_refused(saved: Path, name: str) -> None:
    data = json.loads(saved.read_text())
    data["arrays"]["file"] = name
    with pytest.raises(ConfigError, match=r"the arrays of the plan, cannot be read: \S"):
        Plan.from_dict(data, saved.parent)


def test_two_arrays_of_one_name_in_the_file_are_refused() -> None:
    with pytest.raises(ConfigError, match="'a/b/codes' names two arrays"):
        PlanArrays.of({"a/b": {"codes": torch.tensor([1])}, "a": {"b/codes": torch.tensor([2])}})


def test_plans_without_arrays_are_written_as_ever(tmp_path: Path) -> None:
    plan = Plan.uniform(SCHEMA, "hash", num_buckets=9)
    assert "arrays" not in plan.to_dict()
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == plan.to_json() + "\n"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert Plan.load(tmp_path / "plan.json") == plan


def test_arrays_that_are_not_at_hand_are_asked_for() -> None:
    described = Plan.from_dict(Plan.uniform(SCHEMA, "hash", num_buckets=9).with_arrays(ARRAYS).to_dict())
    for use in (lambda: described.assigned(SCHEMA), lambda: described.save("nowhere/plan.json")):
        with pytest.raises(ConfigError, match=r"not at hand: .*Plan\.load"):
            use()
    with pytest.raises(ConfigError, match=r"tensors of uint8, .*float32 \(index 'x', feature 'C1'\)"):
        PlanArrays.of({"C1": {"x": torch.zeros(1)}})
    with pytest.raises(ConfigError, match="arrays are for features of the plan; got 'C9'"):
        Plan.uniform(SCHEMA, "full").with_arrays({"C9": {"x": torch.zeros(1).long()}})
