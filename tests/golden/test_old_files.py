"""What version 0.1.0 wrote still loads and means the same: files of make.py beside what that version computed."""

from __future__ import annotations

import importlib
import json
import shutil
import tarfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed.data import open_dataset
from recsys_embed.train import TrainConfig, run_training

FILES = Path(__file__).parent / "files"
PLANS = json.loads((FILES / "plans" / "options.json").read_text())
NAMES = json.loads((FILES / "names.json").read_text())
DROP_INS = json.loads((FILES / "drop_ins.json").read_text())
RULES = ("sgd", "adagrad", "rowwise_adagrad", "adam", "adam_per_row")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
# What was renamed since says so; what was not must not.
old_names = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@cache
def _values(part: str) -> dict[str, Tensor]:
    with np.load(FILES / f"values-{part}.npz") as held:
        return {k: torch.from_numpy(held[k]) for k in held.files}


def value(name: str) -> Tensor:
    return _values("plans" if name.startswith("plans/") else "others")[name]


def same(name: str, got: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got.detach(), value(name), rtol=1e-5, atol=atol, msg=lambda m: f"{name}: {m}")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that are kept as archives."""
    folder = tmp_path_factory.mktemp("golden")
    for path in FILES.glob("*.tar.xz"):
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
    return folder


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


# -- plans ------------------------------------------------------------------------------------------------------------


def schema() -> rse.Schema:
    return rse.Schema.from_dict(PLANS["schema"])


def looked_up(name: str, coll: nn.Module) -> None:
    same(f"{name}/single", coll(value("plans/ids")))
    same(f"{name}/bags", coll(value("plans/values"), value("plans/offsets")))


@old_names
@pytest.mark.parametrize("case", PLANS["cases"])
def test_plan(case: str) -> None:
    """Tables of a plan have their places and initial values, whether it is read or made of the options of then."""
    held, method = PLANS["cases"][case], case.partition("-")[2]
    plan = rse.Plan.from_dict(held["plan"])
    assert rse.Plan.uniform(schema(), method, **held["options"]) == plan
    assert rse.Plan.from_dict(json.loads(plan.to_json())) == plan
    coll = rse.EmbeddingCollection(schema(), plan, seed=PLANS["seed"])
    coll.assign_({name: value(f"plans/counts/{name}") for name in schema().names})
    looked_up(f"plans/{case}", coll)


def test_plan_with_sets_of_ids() -> None:
    plan = rse.Plan.from_dict(json.loads((FILES / "plans" / "sets.json").read_text()))
    looked_up("plans/sets", rse.EmbeddingCollection(schema(), plan))


def test_plan_of_the_planner() -> None:
    of = rse.Schema.from_dict(json.loads((FILES / "plans" / "planned.schema.json").read_text()))
    plan = rse.Plan.from_dict(json.loads((FILES / "plans" / "planned.json").read_text()))
    assert set(plan.reasons) == set(of.names)
    assert plan.notes is not None
    assert plan.footprint(of).serve == plan.notes.bytes == int(value("plans/planned/bytes"))
    ids = torch.arange(60)[:, None] % torch.tensor([s.num_embeddings for s in of])
    same("plans/planned", rse.EmbeddingCollection(of, plan)(ids))


# -- checkpoints ------------------------------------------------------------------------------------------------------


def _rule(about: dict[str, Any], name: str) -> Any:
    cls, given = about["rules"][name]
    return getattr(rse, cls)(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("name", ["none", *RULES, *(f"{r}_all" for r in RULES if r != "adam_per_row")])
def test_collection_and_its_optimizer(name: str, backend: str, unpacked: Path) -> None:
    about = json.loads((unpacked / "checkpoints" / "about.json").read_text())
    of, plan = rse.Schema.from_dict(about["schema"]), rse.Plan.from_dict(about["plan"])
    optimizer = None if name == "none" else _rule(about, name)
    coll = rse.EmbeddingCollection(of, plan, optimizer, seed=9, backend=backend)
    saved = torch.load(unpacked / "checkpoints" / f"{name}.pt", weights_only=True)
    coll.load_state_dict(saved["model"])
    ids = value("checkpoints/ids")
    if optimizer is not None:
        coll.load_optimizer_state_dict(saved["optimizer"])
    same(f"checkpoints/{name}/before", coll.eval()(ids))
    coll.train()
    coll(ids[1::3]).square().sum().backward()
    if optimizer is None:
        with torch.no_grad():
            for p in coll.parameters():
                p -= 0.1 * p.grad
    same(f"checkpoints/{name}/after", coll.eval()(ids), 1e-5)


@old_names
@pytest.mark.parametrize("method", DROP_INS["options"])
def test_drop_in(method: str) -> None:
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in DROP_INS["options"][method].items()}
    module = rse.make_embedding(method, DROP_INS["rows"], DROP_INS["width"], **given)
    state = torch.load(FILES / "drop_ins.pt", weights_only=True)[method]
    module.load_state_dict(state)
    ids = value("drop_ins/ids")
    same(f"drop_ins/{method}", module(ids))
    options = {"mode": "mean", "config": module.config, "unseen": given["unseen"]}
    bag = rse.make_embedding(method, DROP_INS["rows"], DROP_INS["width"], **options)
    bag.load_state_dict(state)
    same(f"drop_ins/{method}/bags", bag(ids, torch.tensor([0, 0, 7, 9])))
    if f"drop_ins/{method}/strings" in _values("others"):
        same(f"drop_ins/{method}/strings", module(["68fd1e64", "Zürich", ""]))


# -- exports, models of others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_export(precision: str, backend: Any, unpacked: Path) -> None:
    folder = unpacked / "exports"
    loaded = rse.load(folder / f"methods.{precision}.safetensors", backend=backend)
    same(f"exports/methods.{precision}", loaded(value("checkpoints/ids")))
    if precision == "bf16":
        return
    pruned = rse.load(folder / f"pruned.{precision}.safetensors", backend=backend)
    same(f"exports/pruned.{precision}", pruned(torch.arange(200)[:, None].expand(200, 4)[::3]))


def test_export_of_drop_ins(unpacked: Path) -> None:
    ids, offsets = torch.arange(DROP_INS["rows"]), torch.tensor([0, 3, 3, 20])
    for method in DROP_INS["options"]:
        loaded = rse.load(unpacked / "exports" / f"bag-{method}.safetensors")
        same(f"exports/bag-{method}", loaded(ids, offsets))
    served = rse.load(unpacked / "exports" / "bag-hash.safetensors")
    same("exports/strings", served(["68fd1e64", "Zürich"], torch.tensor([0, 1])))


@pytest.mark.parametrize("name", ["deepfm", "lr"])
def test_export_of_a_model(name: str, unpacked: Path) -> None:
    loaded = rse.load(unpacked / "exports" / f"{name}.int8.safetensors")
    same(f"exports/{name}", loaded(value("exports/dense"), value("checkpoints/ids")[:5]))


class Ranker(nn.Module):
    """Somebody else's model, as make.py has it."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(700, 8), nn.Embedding(300, 8)
        self.tags = nn.EmbeddingBag(60, 8, mode="mean")
        self.head = nn.Linear(24, 1)

    def forward(self, users: Tensor, items: Tensor, tags: Tensor) -> Tensor:
        return self.head(torch.cat([self.user(users), self.item(items), self.tags(tags)], 1))


def test_compressed_model(unpacked: Path) -> None:
    inputs = [value(f"ranker/{name}") for name in ("users", "items", "tags")]
    model = Ranker()
    rse.compress_(model, rse.Plan.from_dict(json.loads((FILES / "ranker.plan.json").read_text())), init="fresh")
    model.load_state_dict(torch.load(FILES / "ranker.pt", weights_only=True))
    same("ranker/out", model(*inputs))
    loaded = rse.load(unpacked / "exports" / "ranker.int8.safetensors", into=Ranker())
    same("ranker/int8", loaded(*inputs))


def holds(now: Any, then: Any, where: str = "") -> None:
    """Everything that was said then is said now; more may be."""
    if isinstance(then, dict):
        assert isinstance(now, dict), where
        for key, part in then.items():
            assert key in now, f"{where}.{key} is gone"
            holds(now[key], part, f"{where}.{key}")
    elif isinstance(then, list):
        assert isinstance(now, list), where
        assert len(now) == len(then), where
        for i, (a, b) in enumerate(zip(now, then, strict=True)):
            holds(a, b, f"{where}[{i}]")
    elif isinstance(then, float):
        assert now == pytest.approx(then, rel=1e-6), where
    elif not isinstance(then, str):  # texts are for people
        assert now == then, where


def test_reports(tmp_path: Path) -> None:
    """The JSON of reports keeps its keys and numbers, which users' scripts read."""
    torch.manual_seed(0)
    model = Ranker()
    rse.compress_(model, rse.Plan.from_dict(json.loads((FILES / "ranker.plan.json").read_text())))
    report = rse.export(model, tmp_path / "ranker.safetensors", "int8")
    then = json.loads((FILES / "exports.ranker.report.json").read_text())
    del then["bytes"], then["header_bytes"]  # of the file, which names the model's class
    holds(report.to_dict(), then)
    told, then = (
        rse.memory_report(model, optimizer="adam").to_dict(),
        json.loads((FILES / "memory_report.json").read_text()),
    )
    known = {row["method"] for row in then["alternatives"]}  # methods come in every version
    told["alternatives"] = [row for row in told["alternatives"] if row["method"] in known]
    holds(told, then)


# -- data, runs, searches ---------------------------------------------------------------------------------------------


def test_data_folder(unpacked: Path) -> None:
    about = json.loads((FILES / "data.json").read_text())
    data = open_dataset(unpacked / "data")
    assert data.digest == about["digest"]
    assert data.schema(4).to_dict() == about["schema"]
    batch = next(iter(data.batches("train", 16, shuffle=True, seed=2)))
    for name in ("dense", "ids", "label"):
        assert torch.equal(getattr(batch, name), value(f"data/{name}")), name


def test_run_that_was_stopped_goes_on(unpacked: Path, tmp_path: Path) -> None:
    """To the result that it would have had."""
    data, run = open_dataset(unpacked / "data"), copied(unpacked / "run", tmp_path / "run")
    config = TrainConfig.from_dict(json.loads((run / "config.json").read_text()))
    done = run_training(config, data, folder=run, resume=True, show_progress=False)
    then = json.loads((FILES / "run.result.json").read_text())
    now = json.loads((run / "result.json").read_text())
    for split in ("test", "valid"):
        for metric in ("auc", "logloss"):
            assert now[split][metric] == pytest.approx(then[split][metric], rel=1e-4), (split, metric)
    batch = next(iter(data.batches("test", 32, shuffle=False)))
    same("run/logits", done.model.eval()(batch.dense, batch.ids), 1e-4)


def test_finished_run_is_exported(unpacked: Path, tmp_path: Path) -> None:
    data = open_dataset(unpacked / "data")
    for name in ("model.pt", "config.json", "result.json"):
        (tmp_path / "run").mkdir(exist_ok=True)
        shutil.copy(FILES / f"run.{name}", tmp_path / "run" / name)
    rse.export(tmp_path / "run", tmp_path / "m.safetensors")
    batch = next(iter(data.batches("test", 32, shuffle=False)))
    same("run/logits", rse.load(tmp_path / "m.safetensors")(batch.dense, batch.ids))


@pytest.mark.parametrize("kind", ["optembed", "dnis"])
def test_search_that_was_stopped_goes_on(kind: str, unpacked: Path, tmp_path: Path) -> None:
    from recsys_embed import search

    about = json.loads((FILES / f"search-{kind}.json").read_text())
    cls, settings = getattr(search, f"{kind.title()}Search"), getattr(search, f"{kind.title()}Settings")
    folder = copied(unpacked / f"search-{kind}", tmp_path / kind)
    config = TrainConfig.from_dict(about["config"])
    data = open_dataset(unpacked / "data")
    search.run_search(cls, config, data, settings.from_dict(about["settings"]), folder=folder, show_progress=False)
    text = (FILES / f"search-{kind}.plan.json").read_text()
    assert rse.Plan.from_dict(json.loads((folder / "plan.json").read_text())) == rse.Plan.from_dict(json.loads(text))
    report = json.loads((folder / "report.json").read_text())
    for split in ("test", "valid"):
        assert report[split]["auc"] == pytest.approx(about["report"][split]["auc"], rel=1e-4)
    assert report["footprint"]["serve"] == about["report"]["footprint"]["serve"]


@old_names
def test_study_goes_on(unpacked: Path, tmp_path: Path) -> None:
    """Its trials are those of then, and one more is trained."""
    pytest.importorskip("optuna")
    from recsys_embed.search.studies.results import rows_of
    from recsys_embed.search.studies.settings import StudySettings
    from recsys_embed.search.studies.study import MethodStudy

    folder = copied(unpacked / "study", tmp_path / "study")
    asked = json.loads((folder / "study.json").read_text())
    settings = StudySettings.from_dict({**asked["study"], "trials": asked["study"]["trials"] + 1})
    config, storage = TrainConfig.from_dict(asked["train"]), str(folder / asked["storage"])
    study = MethodStudy(config, open_dataset(unpacked / "data"), settings, storage, must_exist=True, folder=folder)
    study.work(None)
    rows, then = rows_of(study), json.loads((FILES / "study.rows.json").read_text())
    assert len(rows) == len(then) + 1
    for now, held in zip(rows, then, strict=False):
        assert {k: now[k] for k in ("trial", "params", "bytes", "state")} == {
            k: held[k] for k in ("trial", "params", "bytes", "state")
        }


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", NAMES)
def test_public_names(module: str) -> None:
    """They are importable where they were; what has moved or is called otherwise now says so."""
    if module.startswith("recsys_embed.sharding"):
        pytest.importorskip("torchrec")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = importlib.import_module(module)
        absent = [name for name in NAMES[module] if not hasattr(found, name)]
    assert not absent, f"{module} no longer has {', '.join(absent)}"


@pytest.mark.parametrize("path", sorted((FILES / "settings").glob("*.toml")), ids=lambda p: p.stem)
def test_settings_file(path: Path) -> None:
    from recsys_embed.train.config import read_settings

    read = read_settings(path)
    parts = {k: read.pop(k) for k in ("compare", "search") if k in read}
    config = TrainConfig.from_dict(read)
    assert {k: config.to_dict()[k] for k in read} == read
    assert all(isinstance(v, dict) for v in parts.values())
