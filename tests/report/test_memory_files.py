"""The memory report of what lies on disk: the same bytes as of the module, and damage is named."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import recsys_embed as rse
from recsys_embed import FeatureSpec, Plan, Schema
from recsys_embed.collection.optimizer_state import weights_of
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.report.memory import memory_report
from recsys_embed.report.memory.file_tensors import read_safetensors

METHODS = rse.list_methods()
save_file = pytest.importorskip("safetensors.torch").save_file


def schema() -> Schema:
    return Schema([FeatureSpec("a", 700, 8), FeatureSpec("b", 40, 8), FeatureSpec("c", 2500, 8, pooling="mean")])


def plan_of(info: rse.MethodInfo) -> Plan:
    return Plan.full(schema()) if info.name == "full" else Plan.uniform(schema(), info.name, budget="48KiB")


@pytest.mark.crossed
@pytest.mark.parametrize("info", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_state_of_a_model_says_what_the_model_says(info: rse.MethodInfo, kind: str, tmp_path: Path) -> None:
    from recsys_embed.models import build_model

    model = build_model("deepfm", schema(), plan_of(info), num_dense=2, optimizer=rse.Adagrad(lr=0.1))
    path = tmp_path / f"state.{kind}"
    state = weights_of(model)
    torch.save(state, path) if kind == "pt" else save_file(state, path)
    built, read = memory_report(model), memory_report(path, optimizer=rse.Adagrad(lr=0.1))
    assert read.footprint == built.footprint
    assert read.total("serve", "model") == built.total("serve", "model")
    assert {t.name: (t.method, t.footprint) for t in read.tables} == {
        t.name: (t.method, t.footprint) for t in built.tables
    }
    assert not [n for n in read.notes if "tensors were taken" in n or "holds" in n]
    # The file itself holds little more, of rows that are not rounded yet.
    held = read.total("serve", "model") + read.footprint.unrounded
    assert held <= path.stat().st_size < held + 20_000


@pytest.mark.parametrize("info", METHODS, ids=lambda m: m.name)
def test_state_of_a_drop_in(info: rse.MethodInfo, tmp_path: Path) -> None:
    module = rse.make_embedding(info.name, 3000, 16, **({} if info.name == "full" else {"budget": "64KiB"}))
    torch.save(nn.ModuleDict({"deep": nn.ModuleDict({"user": module})}).state_dict(), tmp_path / "a.pt")
    patterns = ["*user*"] if info.name == "full" else None  # a full table stores what nn.Embedding does
    report = memory_report(tmp_path / "a.pt", tables=patterns)
    (table,) = report.tables
    assert (table.name, table.method) == ("deep/user", info.name)
    assert table.serve == module.footprint().serve
    torch.save(module.state_dict(), tmp_path / "b.pt")
    assert memory_report(tmp_path / "b.pt")["embedding"].serve == module.footprint().serve


def test_half_precision_states(tmp_path: Path) -> None:
    coll = rse.EmbeddingCollection(schema(), dtype=torch.float16)
    torch.save(coll.state_dict(), tmp_path / "a.pt")
    assert memory_report(tmp_path / "a.pt").total("serve") == memory_report(coll).total("serve") == 3240 * 8 * 2


def test_states_of_others_are_guessed_and_named(tmp_path: Path) -> None:
    model = nn.ModuleDict({"user_emb": nn.Embedding(500, 8), "goods": nn.Embedding(400, 8), "top": nn.Linear(8, 2)})
    torch.save({"epoch": 3, "state_dict": model.state_dict(), "optimizer": {"state": {}}}, tmp_path / "a.pt")
    guessed = memory_report(tmp_path / "a.pt")
    assert [t.name for t in guessed.tables] == ["user_emb"]
    assert any("1 tensors were taken for tables by their names" in n for n in guessed.notes)
    named = memory_report(tmp_path / "a.pt", tables=["user_emb.weight", "goods.*"])
    assert named.footprint == memory_report(model).footprint
    assert named.rest == memory_report(model).rest
    nothing = memory_report(tmp_path / "a.pt", tables=["nope"])
    assert any("--tables" in n for n in nothing.notes)


def test_tied_tensors_of_a_file_count_once(tmp_path: Path) -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(500, 8), "head": nn.Linear(8, 500, bias=False)})
    model["head"].weight = model["emb"].weight
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert memory_report(tmp_path / "a.pt").total("serve", "model") == 16_000


def test_run_folder(tmp_path: Path) -> None:
    from recsys_embed.train.checkpoint import save_checkpoint

    pytest.importorskip("tqdm")
    from recsys_embed.models import build_model
    from recsys_embed.train.build import trained_footprint
    from recsys_embed.train.config import TrainConfig

    plan = Plan.uniform(schema(), "lowdim", budget="48KiB")
    model = build_model("deepfm", schema(), plan, num_dense=2, optimizer=rse.Adam(lr=0.1))
    save_checkpoint(tmp_path / "model.pt", TrainConfig().to_dict(), model=model.state_dict())
    report = memory_report(tmp_path)
    assert report.footprint.serve == trained_footprint(model).serve
    # The checkpoint's own settings say that tables are trained by Adam and dense parameters too.
    assert report.settings.to_dict()["optimizer"] == "adam"
    assert report.footprint.optimizer == pytest.approx(trained_footprint(model).optimizer, abs=64)
    assert report.rest.optimizer > 2 * report.rest.weights
    assert memory_report(tmp_path, optimizer="sgd").footprint.optimizer < report.footprint.optimizer


def test_plan_and_schema_files(tmp_path: Path) -> None:
    plan = Plan.uniform(schema(), "hash", budget="48KiB")
    (tmp_path / "plan.json").write_text(plan.to_json())
    (tmp_path / "schema.json").write_text(json.dumps(schema().to_dict()))
    report = memory_report(tmp_path / "plan.json", schema=schema())
    assert report.total("serve") == plan.footprint(schema()).serve
    assert memory_report(tmp_path / "schema.json").total("serve") == 3240 * 8 * 4
    with pytest.raises(ConfigError, match="is a plan, which needs the features"):
        memory_report(tmp_path / "plan.json")


def test_data_folder_from_statistics_alone(tmp_path: Path) -> None:
    pytest.importorskip("polars")
    from recsys_embed.data import make_synthetic, open_dataset

    make_synthetic(tmp_path / "data", rows=2000, seed=1)
    data = open_dataset(tmp_path / "data")
    report = memory_report(tmp_path / "data", embedding_dim=8, optimizer="rowwise_adagrad")
    sizes = [f.num_embeddings for f in data.manifest.features]
    assert report.total("serve") == sum(sizes) * 8 * 4
    assert report.footprint.optimizer == sum(sizes) * 4
    stats = report.tables[0].stats
    assert stats is not None
    assert stats.measured is not None
    assert set(stats.field.unseen) >= {"valid", "test"}
    hashed = Plan.uniform(data.schema(8), "hash", budget=report.total("serve") // 4)
    (tmp_path / "plan.json").write_text(hashed.to_json())
    planned = memory_report(tmp_path / "plan.json", schema=data.schema(8), stats=data)
    rates = [(t.stats.expected.ids, t.stats.measured.ids) for t in planned.tables if t.method == "hash"]
    assert any(measured > 0.3 for _, measured in rates)
    assert all(abs(expected - measured) < 0.15 for expected, measured in rates)


@pytest.mark.parametrize("cut", [0, 5, 8, 60, -1, -40])
def test_cut_safetensors_are_refused(tmp_path: Path, cut: int) -> None:
    save_file({"emb.weight": torch.randn(20, 4), "b": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(whole[:cut])
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        memory_report(tmp_path / "b.safetensors")


@pytest.mark.parametrize("at", range(0, 200, 7))
def test_flipped_headers_are_refused_or_harmless(tmp_path: Path, at: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"emb.weight": torch.randn(20, 4), "b": torch.ones(3)}, path)
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 0x11
    path.write_bytes(data)
    try:
        size = memory_report(path).total("serve", "model")
    except CheckpointError:
        return
    assert size <= path.stat().st_size


@pytest.mark.parametrize("change", [{"shape": [21, 4]}, {"shape": [-20, -4]}, {"dtype": "F64"}, {"dtype": "Q8"}])
def test_headers_that_contradict_themselves_are_refused(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"emb.weight": torch.randn(20, 4)}, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["emb.weight"] |= change
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        memory_report(path)


def test_safetensors_reader_agrees_with_the_library(tmp_path: Path) -> None:
    tensors = {
        f"t{i}": torch.ones(i, 3, dtype=dtype)
        for i, dtype in enumerate([torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.int64])
    }
    save_file(tensors, tmp_path / "a.safetensors")
    for found in read_safetensors(tmp_path / "a.safetensors")[0]:
        assert found.dtype == tensors[found.name].dtype
        assert torch.equal(found.read(), tensors[found.name])


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_files_that_would_run_code_are_refused(tmp_path: Path) -> None:
    torch.save({"emb.weight": torch.zeros(3, 3), "x": Bomb()}, tmp_path / "a.pt")
    torch.save(nn.Embedding(3, 3), tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Bomb()))
    for name in "abc":
        with pytest.raises(CheckpointError, match=r"save model\.state_dict\(\) instead|cannot be read"):
            memory_report(tmp_path / f"{name}.pt")


def test_damage_and_absence_are_named(tmp_path: Path) -> None:
    torch.save(nn.Embedding(300, 30).state_dict(), tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "b.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"b\.pt"):
        memory_report(tmp_path / "b.pt")
    torch.save([1, 2], tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        memory_report(tmp_path / "c.pt")
    with pytest.raises(ConfigError, match="there is nothing at"):
        memory_report(tmp_path / "nope.pt")
    with pytest.raises(ConfigError, match="is no run folder"):
        memory_report(tmp_path)
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ConfigError, match="must hold an object"):
        memory_report(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        memory_report(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"features": 3}')
    with pytest.raises(ConfigError, match="neither a plan nor a schema"):
        memory_report(tmp_path / "x.json")


def test_damaged_configuration_of_a_state_is_named(tmp_path: Path) -> None:
    coll = rse.EmbeddingCollection(schema(), Plan.uniform(schema(), "hash", budget="48KiB"))
    state = dict(coll.state_dict())
    text = bytes(state["_extra_state"].numpy()).replace(b'"num_buckets"', b'"num_bukkets"')
    state["_extra_state"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"(?s)_extra_state cannot be used: .*num_bukkets"):
        memory_report(tmp_path / "a.pt")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_table_that_drop_ins_share_counts_once_when_loaded(precision: str, tmp_path: Path) -> None:
    def build() -> nn.ModuleDict:
        return nn.ModuleDict({"a": nn.Embedding(3000, 16), "b": nn.Embedding(2000, 16)})

    model = build()
    rse.compress_(model, Plan.uniform(Schema.from_model(model), "unified", budget="64KiB"))
    path = tmp_path / "model.safetensors"
    rse.export(model, path, precision)
    loaded = memory_report(rse.load(path, into=build())).total("serve")
    assert loaded == memory_report(path).total("serve")
    assert loaded <= 64 * 1024


def test_tied_tables_stand_for_one_full_table_when_loaded(tmp_path: Path) -> None:
    def build() -> nn.ModuleDict:
        model = nn.ModuleDict({"item": nn.Embedding(3000, 16), "history": nn.EmbeddingBag(3000, 16, mode="mean")})
        model["history"].weight = model["item"].weight
        return model

    model = build()
    rse.compress_(model, Plan.uniform(Schema.from_model(model), "lowdim", budget="64KiB"))
    rse.export(model, tmp_path / "model.safetensors")
    report = memory_report(rse.load(tmp_path / "model.safetensors", into=build()))
    assert report.plain == 3000 * 16 * 4
    assert next(a for a in report.alternatives() if a.method == "full").serve["fp32"] == 3000 * 16 * 4


@pytest.mark.crossed
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("info", METHODS, ids=lambda m: m.name)
def test_a_state_dict_counts_what_its_model_counts(info: rse.MethodInfo, kind: str, tmp_path: Path) -> None:
    """Also where drop-ins share a table, whose bytes stand once in the file."""
    from safetensors.torch import save_model

    model = nn.ModuleDict({n: nn.Embedding(rows, 16) for n, rows in (("a", 3000), ("b", 2000), ("c", 900))})
    options = {} if info.name == "full" else {"budget": "100KiB", "full_below": 0}
    rse.compress_(model, Plan.uniform(Schema.from_model(model), info.name, **options), init="fresh")  # type: ignore[arg-type]
    path = tmp_path / f"state.{kind}"
    torch.save(model.state_dict(), path) if kind == "pt" else save_model(model, str(path))
    built, read = memory_report(model), memory_report(path, tables=["*"] if info.name == "full" else None)
    assert read.total("serve") == built.total("serve")
    assert read.total("serve") <= path.stat().st_size
    shared = {t.storage.name: t.storage.read_by for t in built.tables if t.storage.kind == "shared"}
    assert {t.storage.name: t.storage.read_by for t in read.tables if t.storage.kind == "shared"} == shared


@pytest.mark.parametrize("name", ["x.st", "x", "x.pt", "x.json"])
def test_files_are_told_by_their_content(name: str, tmp_path: Path) -> None:
    module = rse.make_embedding("hash", 1000, 8, num_buckets=100)
    writers: list[tuple[str, Callable[[Path], object]]] = [
        ("x.safetensors", lambda path: rse.export(module, path)),
        ("x.safetensors", lambda path: save_file({"table": torch.ones(3, 4)}, path)),
        ("x.pt", lambda path: torch.save(module.state_dict(), path)),
        ("x.json", lambda path: path.write_text(json.dumps(schema().to_dict()))),
    ]
    (tmp_path / "usual").mkdir()
    for usual, write in writers:
        write(tmp_path / "usual" / usual)
        wanted = memory_report(tmp_path / "usual" / usual)
        (tmp_path / "usual" / usual).replace(tmp_path / name)
        assert memory_report(tmp_path / name).total("serve") == wanted.total("serve") > 0


def test_tables_are_known_by_name_whatever_its_case(tmp_path: Path) -> None:
    torch.save({"Users.EMBEDDING.weight": torch.zeros(300, 8), "Top.weight": torch.zeros(4, 4)}, tmp_path / "a.pt")
    assert [t.name for t in memory_report(tmp_path / "a.pt").tables] == ["Users/EMBEDDING"]


@pytest.mark.parametrize("method", ["adaptive", "freqcut"])
@pytest.mark.parametrize("drop_in", [False, True])
def test_a_file_says_which_of_its_ids_share_rows(method: str, drop_in: bool, tmp_path: Path) -> None:
    """By its own index arrays: ids that were counted own rows that numbering by frequency would give to others."""
    ids = 1000
    counts = torch.ones(ids)
    counts[torch.randperm(ids, generator=torch.Generator().manual_seed(0))[:200]] = 1000.0
    cls = rse.get_method(method).config_cls
    config = replace(cls.for_budget(FeatureSpec("C1", ids, 16), 20_000), order="counts")
    model: nn.Module
    if drop_in:
        module = rse.make_embedding(method, ids, 16, **{k: v for k, v in config.to_dict().items() if k != "method"})
        module.assign_(counts)
        model, name = nn.ModuleDict({"C1": module}), "C1"
    else:
        coll = rse.EmbeddingCollection(Schema([FeatureSpec("C1", ids, 16)]), Plan({"C1": config}))
        model, name = coll.assign_({"C1": counts}), "C1"
    torch.save(model.state_dict(), tmp_path / "a.pt")
    built = memory_report(model, stats={name: counts}).tables[0].stats
    read = memory_report(tmp_path / "a.pt", stats={name: counts}).tables[0].stats
    assert built is not None
    assert read is not None
    assert read.measured == built.measured
    assert read.measured.traffic < 0.5
