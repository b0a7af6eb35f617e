"""The file: safetensors to everybody, and refused unless every byte of it is as it was written."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import recsys_embed as rse
from recsys_embed.errors import CheckpointError
from recsys_embed.exports import export, load, verify
from recsys_embed.exports.file_format import DTYPES, MAX_HEADER, ExportFile, header_bytes, lay_out
from recsys_embed.features import MAX_ROWS, FeatureSpec, Schema
from recsys_embed.plan import Plan

MARK = b'{"__metadata__":{"digest":"'


def source() -> rse.EmbeddingCollection:
    """A collection with a quantised table, a pruned one, a projection and an index buffer."""
    schema = Schema([FeatureSpec("a", 60, 8), FeatureSpec("b", 3000, 8), FeatureSpec("c", 90, 8)])
    methods = {"a": "full", "b": "full", "c": "lowdim"}
    options: dict[str, dict[str, Any]] = {"full": {}, "lowdim": {"dim": 3}}
    coll = rse.EmbeddingCollection(
        schema, Plan({n: rse.get_method(m).config_cls.from_params(options[m]) for n, m in methods.items()})
    )
    with torch.no_grad():
        coll.table("b.weight")[torch.arange(3000) % 3 > 0] = 0
    return coll


IDS = torch.stack([torch.arange(60), torch.arange(60) * 50, torch.arange(60)], 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "c.safetensors"
    export(source(), path, "int8")
    return path


@pytest.fixture(scope="module")
def answer(whole: Path) -> torch.Tensor:
    return load(whole)(IDS)


def test_the_safetensors_library_reads_it(whole: Path) -> None:
    file, theirs = ExportFile(whole), load_file(whole)
    assert theirs.keys() == file.entries.keys()
    for name, tensor in theirs.items():
        assert torch.equal(file.tensor(name), tensor)
    with safe_open(whole, "pt") as f:
        manifest = json.loads(f.metadata()["recsys_embed"])
    assert manifest == file.manifest == verify(whole)
    assert {
        name: hashlib.sha256(t.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for name, t in theirs.items()
    } == (manifest["sha256"])


@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 5), max_size=3)), max_size=6
    )
)
def test_any_tensors_are_laid_out_as_the_library_wants(shapes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "f"
    entries = lay_out({f"t{i}": (dtype, shape) for i, (dtype, shape) in enumerate(shapes)})
    tensors = {n: torch.ones(e.shape).to(DTYPES[e.dtype]) for n, e in entries.items()}
    body = b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"" for t in tensors.values())
    path.write_bytes(header_bytes({"version": 1}, entries) + body)
    file, theirs = ExportFile(path), load_file(path)
    for name, tensor in tensors.items():
        assert torch.equal(file.tensor(name), tensor)
        assert torch.equal(theirs[name], tensor)
        assert theirs[name].shape == tensor.shape


def test_a_mapped_file_is_not_changed_by_its_module(whole: Path) -> None:
    before = whole.read_bytes()
    served = load(whole)
    for tensor in [*served.parameters(), *served.buffers()]:
        tensor.data.zero_()
    assert whole.read_bytes() == before


@pytest.mark.parametrize("memory_map", [True, False])
def test_reading_and_mapping_agree(whole: Path, answer: torch.Tensor, memory_map: bool) -> None:
    assert torch.equal(load(whole, mmap=memory_map)(IDS), answer)


# -- damage -----------------------------------------------------------------------------------------------------------


def regions(path: Path) -> list[int]:
    """Where parts of the file begin and end: length, digest, manifest, header, every tensor."""
    file = ExportFile(path)
    data = path.read_bytes()
    header = file.header_size
    at = [0, 4, 8, 8 + len(MARK), 8 + len(MARK) + 64, data.index(b"manifest") if b"manifest" in data else 100, header]
    for e in file.entries.values():
        at += [header + e.start, header + e.stop]
    return sorted({a for a in at if a <= len(data)})


def refused_or_same(path: Path, answer: torch.Tensor) -> bool:
    """Whether a file is refused; if it is read, it must give the answer of the whole one."""
    try:
        got = load(path)(IDS)
    except CheckpointError as e:
        return str(path) in str(e)
    assert torch.equal(got, answer)
    return False


def test_every_cut_is_refused(whole: Path, answer: torch.Tensor, tmp_path: Path) -> None:
    data, path = whole.read_bytes(), tmp_path / "cut"
    places = {max(0, min(len(data) - 1, a + d)) for a in regions(whole) for d in (-1, 0, 1)}
    for length in sorted(places | set(range(0, len(data), 997))):
        path.write_bytes(data[:length])
        assert refused_or_same(path, answer)
    path.write_bytes(data + b"\0")
    assert refused_or_same(path, answer)


def test_every_flipped_region_is_refused(whole: Path, answer: torch.Tensor, tmp_path: Path) -> None:
    data, path = bytearray(whole.read_bytes()), tmp_path / "flipped"
    places = {max(0, min(len(data) - 1, a + d)) for a in regions(whole) for d in (-1, 0, 1)}
    for place in sorted(places | set(range(0, len(data), 211))):
        for bit in (1, 0x80):
            data[place] ^= bit
            path.write_bytes(data)
            assert refused_or_same(path, answer), place
            data[place] ^= bit


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(start=st.floats(0, 1), length=st.integers(1, 300), filler=st.binary(min_size=1, max_size=300))
def test_overwritten_stretches_are_refused(whole, answer, tmp_path, start, length, filler) -> None:
    data, path = bytearray(whole.read_bytes()), tmp_path / "over"
    at = int(start * (len(data) - 1))
    piece = (filler * length)[:length]
    changed = data[:at] + piece[: len(data) - at] + data[at + length :]
    path.write_bytes(changed)
    assert refused_or_same(path, answer) == (changed != data)


def test_the_message_says_which_tensor(whole: Path, tmp_path: Path) -> None:
    file, data = ExportFile(whole), bytearray(whole.read_bytes())
    entry = file.entries["b.weight"]
    data[file.header_size + entry.start + 5] ^= 1
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"f is damaged: tensor 'b.weight', bytes .* expected SHA-256 .* got "):
        load(tmp_path / "f")
    with pytest.raises(CheckpointError, match=r"b\.weight"):
        verify(tmp_path / "f")
    assert load(tmp_path / "f", verify=False)(IDS).shape == (60, 3, 8)


def test_without_digests_structure_is_still_checked(whole: Path, tmp_path: Path) -> None:
    data, path = whole.read_bytes(), tmp_path / "f"
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="it was cut"):
        load(path, verify=False)
    # The bitmap of the kept rows names rows beyond the stored ones.
    file = ExportFile(whole)
    entry = file.entries["b.weight.rows.words"]
    broken = bytearray(data)
    broken[file.header_size + entry.start] ^= 0xFF
    path.write_bytes(broken)
    with pytest.raises(CheckpointError, match=r"'b.weight.rows.\*' do not tell 1000 of 3000 rows"):
        load(path, verify=False)
    # As many rows as there should be, but one of them behind the table's last.
    at = file.header_size + entry.start + 8 * (3000 // 64)
    word = int.from_bytes(data[at : at + 8], "little")
    assert word
    path.write_bytes(data[:at] + (word & (word - 1) | 1 << 63).to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(CheckpointError, match=r"'b.weight.rows.\*' do not tell 1000 of 3000 rows"):
        load(path, verify=False)


# -- files made to harm -----------------------------------------------------------------------------------------------


def signed(header: Any, body: bytes = b"") -> bytes:
    """A file whose header has a right digest, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    whole = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(whole).hexdigest().encode()
    at = 8 + len(MARK)
    return whole[:at] + digest + whole[at + 64 :] + body


def with_header(tensors: dict[str, Any], manifest: Any = None) -> dict[str, Any]:
    metadata = {"digest": "0" * 64, "recsys_embed": json.dumps(manifest or {"version": 1})}
    return {"__metadata__": metadata, **tensors}


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "too few for a header"),
    "a length alone": ((1 << 20).to_bytes(8, "little"), "too few"),
    "a huge length": ((1 << 62).to_bytes(8, "little") + b"x" * 200, "its header claims 4611686018427387904 bytes"),
    "a length beyond the file": ((5000).to_bytes(8, "little") + b"x" * 200, "claims 5000 bytes"),
    "somebody's safetensors": (
        signed(b'{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}' + b" " * 90),
        "was not written by",
    ),
    "a pickle": (b"\x80\x04\x95" + b"." * 200, "not an exported file"),
    "no manifest": (signed({"__metadata__": {"digest": "0" * 64}}), "holds no manifest"),
    "a list": (signed(MARK + b"0" * 64 + b'"}}'), "holds no manifest"),
    "a deep header": (
        signed(MARK + b"0" * 64 + b'"},"t":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        "nested too deeply",
    ),
    "a deep manifest": (
        signed(with_header({}, None) | {"__metadata__": {"digest": "0" * 64, "recsys_embed": "[" * 200_000}}),
        "nested",
    ),
    "broken JSON": (signed(MARK + b"0" * 64 + b'"},"t":'), "header cannot be read"),
    "not a number": (signed(MARK + b"0" * 64 + b'"},"t":NaN}'), "NaN is not JSON"),
    "a key twice": (signed(MARK + b"0" * 64 + b'"},"t":1,"t":2}'), "key 't' occurs more than once"),
    "a long integer": (signed(MARK + b"0" * 64 + b'"},"t":' + b"9" * 10_000 + b"}"), "cannot be read"),
    "offsets beyond the file": (
        signed(with_header({"t": entry(shape=[2 << 40], offsets=[0, 8 << 40])}), b"x" * 8),
        "it was cut",
    ),
    "a negative shape": (signed(with_header({"t": entry(shape=[-2, -1])}), b"x" * 8), "tensor 't' is described by"),
    "a shape of floats": (signed(with_header({"t": entry(shape=[2.0])}), b"x" * 8), "tensor 't' is described by"),
    "a shape of flags": (signed(with_header({"t": entry(shape=[True, 2])}), b"x" * 8), "tensor 't' is described by"),
    "a shape that overflows": (signed(with_header({"t": entry(shape=[1 << 62] * 8)}), b"x" * 8), "takes"),
    "a shape of many": (
        signed(with_header({"t": entry(shape=[1 << 60] * 90_000)}), b"x" * 8),
        "tensor 't' is described by",
    ),
    "an unknown dtype": (signed(with_header({"t": entry(dtype="F4")}), b"x" * 8), "tensor 't' is described by"),
    "a dtype that is a list": (signed(with_header({"t": entry(dtype=[])}), b"x" * 8), "tensor 't' is described by"),
    "three offsets": (signed(with_header({"t": entry(offsets=[0, 4, 8])}), b"x" * 8), "tensor 't' is described by"),
    "no offsets": (signed(with_header({"t": {"dtype": "F32", "shape": [2]}}), b"x" * 8), "tensor 't' is described by"),
    "a text for a tensor": (signed(with_header({"t": "F32"}), b"x" * 8), "tensor 't' is described by"),
    "falling offsets": (signed(with_header({"t": entry(shape=[0], offsets=[8, 8])}), b"x" * 8), "begins at byte 8"),
    "overlap": (
        signed(with_header({"t": entry(), "u": entry(offsets=[4, 12])}), b"x" * 12),
        "the one before ends at 8",
    ),
    "a gap": (signed(with_header({"t": entry(), "u": entry(offsets=[12, 20])}), b"x" * 20), "the one before ends at 8"),
    "misaligned": (
        signed(with_header({"t": entry("U8", [1], [0, 1]), "u": entry(offsets=[1, 9])}), b"x" * 9),
        "not aligned",
    ),
    "too much": (signed(with_header({"t": entry()}), b"x" * 9), "something was added"),
    "another version": (
        signed(with_header({}, {"version": 3})),
        "format version 3; this library reads",
    ),
    "a version that is a flag": (signed(with_header({}, {"version": True})), "format version True"),
    "no version": (signed(with_header({}, [1])), "format version None"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_without_allocating(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    path = tmp_path / "../hostile file" / "f"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    for options in ({}, {"verify": False, "mmap": False}):
        tracemalloc.start()
        with pytest.raises(CheckpointError) as caught:
            load(path, **options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert message in str(caught.value)
        assert len(str(caught.value)) < 600
        assert peak < 40 << 20


def test_a_header_longer_than_is_read_is_not_written() -> None:
    with pytest.raises(CheckpointError, match=f"at most {MAX_HEADER}"):
        header_bytes({"text": "x" * MAX_HEADER}, {})


def test_files_that_are_no_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="no exported file at"):
            load(path)
    with pytest.raises(CheckpointError, match="it is a folder: `recsys-embed export` makes a file of a run"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="no exported file at"):
        load(tmp_path / "pipe")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("rows", [1, 1000])
def test_a_safetensors_file_of_others_is_not_called_damaged(tmp_path: Path, rows: int, metadata: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"weight": torch.zeros(rows, 4)}, tmp_path / "f", metadata)
    with pytest.raises(CheckpointError, match=r"a safetensors file, but not one that recsys_embed\.export wrote"):
        load(tmp_path / "f")


# -- manifests made to harm -------------------------------------------------------------------------------------------


def edited(path: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The file with another manifest and right digests."""
    file, data = ExportFile(path), path.read_bytes()
    manifest = json.loads(json.dumps(file.manifest))
    change(manifest)
    out.write_bytes(header_bytes(manifest, file.entries) + data[file.header_size :])
    return out


def at(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


def drop(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return change


PLAN = ("modules", 0, "plan", "features")
HARM: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a class path": at("modules", 0, "kind", value="os.system"),
    "an unknown method": at(*PLAN, "a", "method", value="os.system"),
    "a method's unknown option": at(*PLAN, "a", "code", value="print()"),
    "another width": at("modules", 0, "schema", "features", 0, "embedding_dim", value=9),
    "more ids": at("modules", 0, "schema", "features", 0, "num_embeddings", value=61),
    "very many ids": at("modules", 0, "schema", "features", 0, "num_embeddings", value=2**31 - 1),
    "ids beyond counting": at("modules", 0, "schema", "features", 0, "num_embeddings", value=2**70),
    "a negative size": at("modules", 0, "schema", "features", 0, "num_embeddings", value=-1),
    "a plan of a list": at("modules", 0, "plan", value=[]),
    "no modules": at("modules", value=[]),
    "two modules": lambda m: m["modules"].append(m["modules"][0]),
    "a module elsewhere": at("modules", 0, "paths", value=["x"]),
    "no paths": at("modules", 0, "paths", value=[]),
    "paths of numbers": at("modules", 0, "paths", value=[1]),
    "an unknown dtype": at("modules", 0, "dtype", value="I64"),
    "no tables": at("tables", value={}),
    "a table too many": lambda m: m["tables"].update(x=m["tables"]["a.weight"]),
    "other rows": at("tables", "a.weight", "rows", value=59),
    "other width": at("tables", "a.weight", "width", value=7),
    "another kind": at("tables", "a.weight", "kind", value="int4"),
    "an unknown kind": at("tables", "a.weight", "kind", value="int3"),
    "a block of floats": lambda m: m["tables"]["a.weight"].update(kind="fp32", block=2),
    "another block": at("tables", "a.weight", "block", value=2),
    "no block": at("tables", "a.weight", "block", value=0),
    "an unknown form": at("tables", "a.weight", "form", value="hash"),
    "another form": at("tables", "b.weight", "form", value="all"),
    "more kept": at("tables", "b.weight", "count", value=1001),
    "all kept of more": at("tables", "b.weight", "rows", value=3001),
    "a range past the end": lambda m: m["tables"]["b.weight"].update(form="range", start=2500),
    "columns past the end": at("tables", "a.weight", "columns", value=[0, 1, 2, 3, 4, 5, 6, 8]),
    "columns twice": at("tables", "a.weight", "columns", value=[0, 0, 1, 2, 3, 4, 5, 6]),
    "columns of text": at("tables", "a.weight", "columns", value="abcdefgh"),
    "a storage of strangers": at("storages", 0, "tables", value=["x"]),
    "a storage twice": lambda m: m["storages"].append(m["storages"][0]),
    "a table twice": lambda m: m["storages"][0]["tables"].append(m["storages"][0]["tables"][0]),
    "tables in another order": lambda m: m["storages"][0]["tables"].reverse(),
    "a target too many": lambda m: m["storages"][0]["targets"].append(["x", "y"]),
    "no target": at("storages", 0, "targets", value=[]),
    "a target that is a text": at("storages", 0, "targets", value=["xy"]),
    "a target twice": lambda m: m["storages"][0]["targets"].append(m["storages"][0]["targets"][0]),
    "another target": lambda m: m["storages"][0]["targets"][0].__setitem__(1, "served"),
    "dense without a tensor": lambda m: m["dense"].update(x={"dtype": "F32"}),
    "dense that is a table": lambda m: m["dense"].update({"bundle.x": {"dtype": "F32", "tensor": "a.weight"}}),
    "dense of numbers": lambda m: m["dense"].update(x=1),
    "no dense": at("dense", value={}),
    "no digests": at("sha256", value={}),
    "a short digest": at("sha256", "a.weight", value="00"),
    "digests of numbers": at("sha256", "a.weight", value=0),
    "another model": at("model", value={"kind": "model", "key": "deepfm", "num_dense": 1 << 60, "params": {}}),
    "an unknown model": at("model", value={"kind": "model", "key": "os.system", "num_dense": 3, "params": {}}),
    "a huge model": at(
        "model", value={"kind": "model", "key": "dnn", "num_dense": 3, "params": {"hidden": [1 << 40] * 3}}
    ),
    "a model of texts": at("model", value={"kind": "model", "key": ["dnn"], "num_dense": "3", "params": "x"}),
    "an unknown kind of model": at("model", "kind", value="pickle"),
    "no model": drop("model"),
}


@pytest.mark.parametrize("name", HARM)
def test_manifests_that_do_not_fit_are_refused(name: str, whole: Path, tmp_path: Path) -> None:
    path = edited(whole, tmp_path / "f", HARM[name])
    for check in (load, verify):
        with pytest.raises(CheckpointError) as caught:
            check(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 1200


def test_all_faults_of_a_table_are_named_with_what_was_expected(whole: Path, tmp_path: Path) -> None:
    change = {"rows": 0, "form": "hash", "dtype": "I64", "columns": [0, "1"]}
    path = edited(
        whole,
        tmp_path / "f",
        lambda m: [m["tables"]["a.weight"].update(change), drop("tables", "a.weight", "block")(m)],
    )
    with pytest.raises(CheckpointError, match=r"f is damaged: `block` is missing \(manifest, table 'a.weight'\)"):
        load(path)
    path = edited(whole, tmp_path / "g", lambda m: m["tables"]["a.weight"].update(change))
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value).splitlines() == [
        f"{path} is damaged: 4 faults in manifest, table 'a.weight':",
        "  - `form` must be one of all, range, bitmap, sorted; got 'hash'",
        "  - `dtype` must be one of F64, F32, F16, BF16; got 'I64'",
        f"  - `rows` must be an integer in [1, {64 * MAX_ROWS}]; got 0",
        "  - `columns` must be a non-empty list of integers >= 0, or None; got [0, '1']",
    ]


def test_keys_of_a_later_version_are_left_out(whole: Path, answer: torch.Tensor, tmp_path: Path) -> None:
    def add(m: dict[str, Any]) -> None:
        for part in (m, m["model"], m["tables"]["a.weight"], m["storages"][0], *m["dense"].values()):
            part["later"] = part["place"] = 1

    assert torch.equal(load(edited(whole, tmp_path / "f", add))(IDS), answer)


def test_an_edited_file_with_right_digests_is_a_file(whole: Path, answer: torch.Tensor, tmp_path: Path) -> None:
    assert torch.equal(load(edited(whole, tmp_path / "f", lambda m: None))(IDS), answer)


def test_nothing_is_imported_that_the_file_names(whole: Path, tmp_path: Path) -> None:
    """Names of classes are for people: a file for somebody's model says one, and it is never looked up."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    export(model, tmp_path / "m")
    path = edited(tmp_path / "m", tmp_path / "f", at("model", "class", value="this.does.not.exist"))
    fresh = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    assert torch.equal(load(path, into=fresh)(torch.arange(5)), model(torch.arange(5)))


def test_digests_are_sha256_of_the_bytes_on_disk(whole: Path) -> None:
    file, data = ExportFile(whole), whole.read_bytes()
    for name, e in file.entries.items():
        piece = np.frombuffer(data, np.uint8, e.stop - e.start, file.header_size + e.start)
        assert hashlib.sha256(piece.tobytes()).hexdigest() == file.manifest["sha256"][name]
