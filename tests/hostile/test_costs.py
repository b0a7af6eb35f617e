"""A small file that says it needs much is refused, in little time and memory."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import recsys_embed as rse
from recsys_embed.core.id_sets import IdSet, members_of, set_text
from recsys_embed.errors import ConfigError
from recsys_embed.models import build_model
from tests.hostile import samples
from tests.hostile.files import open_all, seal, take_apart

SCHEMA = rse.Schema([rse.FeatureSpec("a", 500, 8), rse.FeatureSpec("b", 90, 8)])
HUGE = 2**31 - 1
Parts = tuple[dict[str, Any], dict[str, Any], bytearray]
ROBE = {"method": "robe", "num_elements": 100_000, "block_size": 1}
ADAPTIVE = {"method": "adaptive", "num_frequent": HUGE - 1, "num_buckets": 7, "order": "counts"}


def _all_ids() -> str:
    """A set of all of 2**31 ids but one, in 0.3 MB of text."""
    packer = zlib.compressobj(9)
    full = b"\xff" * (1 << 20)
    packed = b"".join(packer.compress(full) for _ in range(255))
    packed += packer.compress(full[1:] + b"\xfe") + packer.flush()
    return base64.b64encode(packed).decode()


def _collection(widths: dict[str, int], config: dict[str, Any], rows: int = 10, **keys: Any) -> Callable[..., None]:
    def edit(manifest: Any, *_: Any) -> None:
        features = [{"name": n, "num_embeddings": rows, "embedding_dim": d} for n, d in widths.items()]
        plan = {"version": 1, "features": dict.fromkeys(widths, config), **keys}
        item = {"kind": "collection", "paths": [""], "dtype": "F32", "schema": {"features": features}, "plan": plan}
        manifest["modules"] = [item]

    return edit


def _wide_tables(manifest: Any, entries: Any, body: bytearray) -> None:
    """1500 tables of 2**20 columns, of all but the first of which one is kept."""
    manifest["tables"], width = {}, 1 << 20
    entries.clear()
    body.clear()
    for i in range(1500):
        size = 4 + -(-(1 if i else width) * 4 // 8)
        entries[f"w{i}"] = {"dtype": "U8", "shape": [1, size], "data_offsets": [len(body), len(body) + size]}
        body.extend(bytes(size))
        table = {"rows": 1, "width": width, "dtype": "F32", "kind": "int4", "block": 1, "form": "all", "start": 0}
        manifest["tables"][f"w{i}"] = {**table, "count": 1, "columns": [0] if i else None}
    manifest["storages"] = [{"tables": list(manifest["tables"]), "targets": [["", "weight"]]}]
    manifest["dense"] = {}


def _params(**params: Any) -> Callable[..., None]:
    return lambda manifest, *_: manifest["model"]["params"].update(params)


CASES: dict[str, tuple[str, Callable[..., None]]] = {
    "16384 columns, each a block": ("embedding", _collection({"a": 16384}, ROBE)),
    "8 features of 65536 columns, each a block": ("embedding", _collection(dict.fromkeys("abcdefgh", 65536), ROBE)),
    "2000 features": ("embedding", _collection({f"f{i}": 4 for i in range(2000)}, {"method": "full"})),
    "a set of 2**31 ids": ("embedding", _collection({"a": 1}, ADAPTIVE, HUGE, sets={"a": {"frequent": _all_ids()}})),
    "an index of 2**31 ids": ("embedding", _collection({"a": 1}, ADAPTIVE, HUGE)),
    "1500 tables, one column kept": ("embedding", _wide_tables),
    "20000 cross layers": ("model", _params(cross_layers=20_000)),
    "40000 hidden layers": ("model", _params(hidden=[1] * 40_000)),
    "hidden layers of 2**31": ("model", _params(hidden=[2**31, 2**31])),
    "10**18 numeric columns": ("model", lambda manifest, *_: manifest["model"].update(num_dense=10**18)),
}


@pytest.mark.slow
def test_what_a_file_describes_is_bounded_before_it_is_built(tmp_path: Path) -> None:
    rse.export(rse.make_embedding("hash", 300, 16, num_buckets=50), tmp_path / "embedding")
    rse.export(build_model("dcnv2", SCHEMA, rse.Plan.full(SCHEMA), num_dense=3), tmp_path / "model")
    jobs = []
    for i, (which, edit) in enumerate(CASES.values()):
        parts = take_apart(tmp_path / which)
        edit(*parts)
        jobs.append(("export", seal(tmp_path / f"case{i}", *parts)))
    for name, (said, seconds, grown) in zip(CASES, open_all([("export", tmp_path / "model"), *jobs])[1:], strict=True):
        assert said.startswith("refused: CheckpointError"), f"{name}: {said}"
        assert grown < 300, f"{name}: {grown} MiB"
        assert seconds < 20, f"{name}: {seconds} s"


def test_sets_of_ids_are_counted_before_memory_is_taken(tmp_path: Path) -> None:
    spec = {"name": "a", "num_embeddings": HUGE, "embedding_dim": 1}
    schema = rse.Schema([rse.FeatureSpec(**spec)])
    plan = {
        "version": 1,
        "features": {"a": {**ADAPTIVE, "num_frequent": 1000}},
        "sets": {"a": {"frequent": _all_ids()}},
    }
    names = [i.name for i in rse.Plan.from_dict({**plan, "sets": {}})["a"].program(schema["a"]).indexes]
    plan["sets"] = {"a": {names[0]: _all_ids()}}
    with pytest.raises(ConfigError, match=f"takes 1000 distinct ids .* got {HUGE}"):
        rse.Plan.from_dict(json.loads(json.dumps(plan))).members(schema["a"])


@pytest.mark.parametrize("size", [1, 7, 64, 1000, pytest.param(20_000_000, marks=pytest.mark.slow)])
def test_sets_of_ids_come_back(size: int) -> None:
    some = torch.randperm(size)[: max(1, size // 7)].sort().values
    for members in (some, torch.arange(size), torch.tensor([size - 1])):
        assert torch.equal(members_of(set_text(members, size), size, len(members)), members)
    with pytest.raises(ConfigError, match="takes 0 distinct ids"):
        members_of(set_text(some, size), size, 0)


@pytest.mark.parametrize("values", [[0, 1_500_000_000, -1_500_000_000, 5], [0, HUGE, -(2**31), 5], [0, 1, 1, 2]])
def test_index_arrays_are_compared_not_subtracted(values: list[int]) -> None:
    index = IdSet("hot", HUGE, 0, 4, "sorted")
    assert index.damage({"values": torch.tensor(values, dtype=torch.int32)}) is not None
    assert index.damage({"values": torch.tensor([0, 5, 2**30, HUGE - 1], dtype=torch.int32)}) is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_sets_of_any_integers_are_packed_alike(dtype: torch.dtype) -> None:
    for form in ("bitmap", "sorted"):
        index = IdSet("hot", 300, 0, 3, form)  # type: ignore[arg-type]
        packed, wanted = index.packed(torch.tensor([70, 3, 127], dtype=dtype)), index.packed(torch.tensor([3, 70, 127]))
        assert all(torch.equal(packed[name], wanted[name]) for name in wanted)
        for wrong in (torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3, 1, dtype=dtype), torch.zeros(3, dtype=torch.bool)):
            with pytest.raises(ConfigError, match="takes 3 distinct ids"):
                index.packed(wrong)


def _vectors(manifest: Any, *_: Any) -> None:
    """Vector columns of many components, in two numeric columns."""
    (entry,) = (c for c in manifest["encoders"]["columns"] if c["kind"] == "vector")
    more = [{**entry, "name": f"v{i}", "learned": {"width": 1 << 14, "missing": 0}} for i in range(50_000)]
    manifest["encoders"]["columns"] += more


def _encoders(**changes: Any) -> Callable[..., None]:
    def edit(manifest: Any, *_: Any) -> None:
        for item in manifest["encoders"]["vocabularies"].values():
            item.update(changes)

    return edit


def _hashes(manifest: Any, entries: Any, body: bytearray) -> None:
    """Strings of one hash, that end beyond the text."""
    a, b = entries["encoders/0.hashes"]["data_offsets"]
    body[a:b] = bytes(b - a)
    a, b = entries["encoders/0.ends"]["data_offsets"]
    body[a:b] = b"\xff\xff\xff\x7f" * ((b - a) // 4)


ENCODERS: dict[str, tuple[str, Callable[..., None]]] = {
    "50000 vectors of 16384 components": ("refused: DataError", _vectors),
    "a vocabulary of 10**12 ids": ("refused: CheckpointError", _encoders(size=10**12)),
    "a vocabulary of no ids": ("refused: CheckpointError", _encoders(size=1)),
    "vocabularies of one number": ("refused: CheckpointError", _encoders(number=0)),
    "strings of one hash beyond the text": ("opened", _hashes),
}


@pytest.mark.slow
def test_encoders_cost_what_they_weigh(tmp_path: Path) -> None:
    samples.served(tmp_path / "served")
    jobs = []
    for i, (_, edit) in enumerate(ENCODERS.values()):
        parts = take_apart(tmp_path / "served")
        edit(*parts)
        jobs.append(("rows", seal(tmp_path / f"case{i}", *parts)))
    found = open_all([("rows", tmp_path / "served"), *jobs])
    assert found[0][0] == "opened"
    for (name, (wanted, _)), (said, seconds, grown) in zip(ENCODERS.items(), found[1:], strict=True):
        assert said.startswith(wanted), f"{name}: {said}"
        assert grown < 300, f"{name}: {grown} MiB"
        assert seconds < 20, f"{name}: {seconds} s"
