"""Sound files of every kind that the library reads, small, and what makes them worse."""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import recsys_embed as rse
from recsys_embed.core.id_sets import set_text
from recsys_embed.data import CriteoOptions, convert_criteo, convert_table, open_dataset
from recsys_embed.models import build_model
from recsys_embed.train.checkpoint import save_checkpoint
from tests.hostile.files import seal, take_apart

ROW = b"%d" + b"\t7" * 13 + b"\t0000000a" * 26 + b"\n"
SCHEMA = rse.Schema([rse.FeatureSpec("a", 500, 8), rse.FeatureSpec("b", 90, 8)])
_HUGE: list[Any] = [2**31, 2**63, 10**300, 1e308, [1] * 30_000, ["x"] * 30_000, "x" * 100_000]
_WRONG: list[Any] = [None, True, -1, 0, -(2**63), 0.5, "", "x", [], {}, [[]], {"a": 1}, [None], "../../etc/passwd"]
VALUES = [*_HUGE, *_WRONG]
EXPORTED = ("collection", "embedding", "model", "served")
DEPTHS = (60, 300, 900, 3000)


def collection() -> rse.EmbeddingCollection:
    """A collection with a pruned table, a projection and an index."""
    config = {name: rse.get_method(name).config_cls.from_params for name in ("adaptive", "lowdim")}
    adaptive = config["adaptive"]({"num_frequent": 40, "num_buckets": 9, "order": "counts"})
    plan = rse.Plan({"a": adaptive, "b": config["lowdim"]({"dim": 3})})
    made = rse.EmbeddingCollection(SCHEMA, plan)
    with torch.no_grad():
        made.table("b.weight")[torch.arange(90) % 3 > 0] = 0
    return made


def _plan(path: Path) -> None:
    optembed = rse.get_method("optembed").config_cls.from_params({"num_kept": 30, "dim": 4, "order": "counts"})
    config = rse.get_method("lowdim").config_cls.from_params({"dim": 3})
    kept = {"a": {"kept": set_text(torch.arange(30) * 3, 500)}}
    rse.Plan({"a": optembed, "b": config}, {"a": "small"}, sets=kept).save(path)


def _data(path: Path) -> None:
    (path / "in").write_bytes(b"".join(ROW % (i % 2) for i in range(60)))
    convert_criteo(path / "in", path / "data", CriteoOptions())


def served(path: Path) -> None:
    """An export with encoders of several kinds."""
    rows = {"click": [0, 1] * 10, "user": ["a", "b"] * 10, "item": [7, 8, 9, None] * 5, "title": [[1.0, 2.0]] * 20}
    columns = {
        "click": {"kind": "label"}, "user": {"kind": "categorical"}, "item": {"kind": "categorical"},
        "title": {"kind": "vector"}, "price": {"kind": "numeric", "buckets": 3},
    }  # fmt: skip
    schema = {"columns": columns, "split": {"kind": "order"}}
    convert_table({**rows, "price": [1.5, 2.5] * 10}, path.parent / "table", schema)
    data = open_dataset(path.parent / "table")
    features = data.schema(4)
    model = build_model("dnn", features, rse.Plan.full(features), num_dense=data.num_dense, hidden=[4])
    rse.export(model, path, encoders=data)


def _checkpoint(path: Path) -> None:
    model = build_model("dcnv2", SCHEMA, rse.Plan.full(SCHEMA), num_dense=3)
    config = {"model": "dcnv2", "model_args": {}, "seed": 0}
    save_checkpoint(path, config, model=model.state_dict(), step=3)


def make(folder: Path) -> dict[str, Path]:
    """A sound file of each kind, by kind."""
    rse.export(collection(), folder / "collection", "int8")
    rse.export(rse.make_embedding("hash", 300, 16, num_buckets=50), folder / "embedding")
    rse.export(build_model("dcnv2", SCHEMA, rse.Plan.full(SCHEMA), num_dense=3), folder / "model", "int4")
    served(folder / "served")
    _plan(folder / "plan.json")
    _data(folder)
    _checkpoint(folder / "model.pt")
    return {
        "collection": folder / "collection",
        "embedding": folder / "embedding",
        "model": folder / "model",
        "served": folder / "served",
        "plan": folder / "plan.json",
        "manifest": folder / "data" / "schema.json",
        "statistics": folder / "data" / "stats.json",
        "checkpoint": folder / "model.pt",
    }


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all values in nested JSON, each container before what is in it."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*at, key))


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a place; ``new`` may be a function of the former one."""
    if not at:
        return new
    out = copy.deepcopy(value)
    inner = out
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = new
    return out


def mutants(value: Any, count: int | None, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Texts of JSON with one value replaced, with words for it; ``count`` of them by chance, or all."""
    every = [(at, i) for at in paths(value) for i in range(len(VALUES) + 3)]
    for at, i in every if count is None else random.Random(seed).sample(every, min(count, len(every))):
        where = "/".join(map(str, at))
        if i < len(VALUES):
            yield f"{where} = {VALUES[i]!r:.40}", json.dumps(changed(value, at, VALUES[i]))
        elif i == len(VALUES):
            depth = DEPTHS[len(where) % len(DEPTHS)]
            text = json.dumps(changed(value, at, "@nested@")).replace('"@nested@"', "[" * depth + "]" * depth)
            yield f"{where} nested", text
        elif at:
            out = copy.deepcopy(value)
            inner = out
            for key in at[:-1]:
                inner = inner[key]
            if i == len(VALUES) + 1:
                inner.pop(at[-1])
                yield f"{where} removed", json.dumps(out)
            elif isinstance(inner, dict):
                inner["strange"] = inner[at[-1]]
                yield f"{where} twice", json.dumps(out)


def _checkpoints(file: Path, count: int | None, seed: int) -> Iterator[tuple[str, bytes]]:
    """Checkpoints with another value, cut, with other bytes, and packed so that they hold more than they weigh."""
    payload, whole = torch.load(file, weights_only=True), file.read_bytes()
    payload["model"] = dict(payload["model"])
    few = torch.zeros(1).expand(1 << 40)
    values = [*VALUES, few, torch.zeros(0), torch.zeros(3, dtype=torch.int8), {"a": few}, {1: 2}, torch.zeros(2, 2)]
    every = [(at, i) for at in paths(payload) for i in range(len(values))]
    for at, i in every if count is None else random.Random(seed).sample(every, min(count, len(every))):
        buffer = io.BytesIO()
        torch.save(changed(payload, at, values[i]), buffer)
        yield f"{'/'.join(map(str, at))} = {values[i]!r:.40}", buffer.getvalue()
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        yield f"cut at {cut}", whole[:cut]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed, zipfile.ZipFile(file) as plain:
        for name in plain.namelist():
            packed.writestr(name, bytes(1 << 28) if name.endswith("/data/0") else plain.read(name))
    yield "a tensor of 256 MiB, compressed", buffer.getvalue()


def jobs(files: dict[str, Path], folder: Path, count: int | None, seed: int = 0) -> Iterator[tuple[str, str, Path]]:
    """Damaged files: kind to open them as, words, path."""
    number = 0
    for kind, file in files.items():
        if kind == "checkpoint":
            for number, (words, made) in enumerate(_checkpoints(file, count, seed)):
                place = folder / f"checkpoint{number}.pt"
                place.write_bytes(made)
                yield kind, f"{kind}: {words}", place
                yield "report", f"{kind}: {words}, reported", place
            continue
        exported = kind in EXPORTED
        parts = take_apart(file) if exported else None
        value = parts[0] if parts else json.loads(file.read_text())
        if parts:
            value.pop("sha256")
        for words, text in mutants(value, count, seed):
            number += 1
            place = folder / str(number)
            place.mkdir()
            if parts:
                made = {**json.loads(text), "sha256": {}} if text[:1] == "{" and "[" * 50 not in text else text
                seal(place / file.name, made, parts[1], parts[2])
            else:
                (place / file.name).write_text(text)
            opened = ["export", "report"] if exported else [kind]
            opened += ["rows"] if kind == "served" else []
            for how in opened:
                yield how, f"{kind}: {words}", place / file.name
