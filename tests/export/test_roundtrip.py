"""What is exported comes back with the same outputs: bit for bit at fp32, within the stated error otherwise."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import recsys_embed as rse
from recsys_embed.compress import compress_
from recsys_embed.core.precision import BITS, Precision
from recsys_embed.errors import CheckpointError, ConfigError, IdRangeError
from recsys_embed.exports import export, load, verify
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.models import build_model
from recsys_embed.plan import Plan
from recsys_embed.registry import MethodInfo, list_methods
from recsys_embed.report.memory import memory_report
from tests.export.zoo import finds, models

PRECISIONS = get_args(Precision)
METHODS = pytest.mark.parametrize("method", list_methods(), ids=lambda m: m.name)
ROWS, WIDTH = 1500, 12
FULL = rse.get_method("full").config_cls.from_params({})
SCHEMA = Schema(
    [
        FeatureSpec(f"C{i}", n, 8, pooling=p)
        for i, (n, p) in enumerate([(40, "sum"), (900, "mean"), (7, "sum"), (300, "max")])
    ]
)


def make(method: MethodInfo, **options: Any) -> Any:
    budget = {} if method.name == "full" else {"budget": "16KiB"}
    return rse.make_embedding(method.name, ROWS, WIDTH, **budget, **options)


def plan_of(method: MethodInfo) -> Plan:
    return (
        Plan.full(SCHEMA) if method.name == "full" else Plan.uniform(SCHEMA, method.name, budget="16KiB", full_below=10)
    )


def ids_of(schema: Schema, batch: int = 50) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randint(0, s.num_embeddings, (batch,), generator=generator) for s in schema], 1)


@pytest.mark.crossed(2)
@METHODS
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", [None, "sum", "max"])
def test_every_drop_in(method: MethodInfo, precision: Any, mode: Any, tmp_path: Path) -> None:
    source = make(method, mode=mode, padding_idx=5)
    report = export(source, tmp_path / "e", precision)
    served = load(tmp_path / "e")
    ids = torch.randint(0, ROWS, (30, 4))
    ids[0, :2] = 5
    wanted, got = source(ids).detach(), served(ids)
    assert not served.training
    assert not got.requires_grad
    if precision == "fp32":
        assert torch.equal(got, wanted)
        assert report.max_error == 0
    else:
        spread = {"fp16": 1e-3, "bf16": 1e-2, "fp8": 0.07, "int8": 1.5e-2, "int4": 0.25, "int2": 1.0}[precision]
        assert (got - wanted).abs().mean() <= spread * wanted.abs().mean().clamp_min(0.1)
        assert report.max_error > 0
    assert type(served) is type(source)
    assert served.config == source.config
    assert served.spec == source.spec


@METHODS
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_method_in_a_collection(method: MethodInfo, precision: Any, tmp_path: Path) -> None:
    source = rse.EmbeddingCollection(SCHEMA, plan_of(method), rse.RowwiseAdagrad(lr=0.1))
    ids = ids_of(SCHEMA)
    source(ids).square().sum().backward()
    source.eval()
    report = export(source, tmp_path / "c", precision)
    served: Any = load(tmp_path / "c")
    wanted, got = source(ids).detach(), served(ids)
    bags = (ids.T.reshape(-1), torch.arange(0, ids.numel() + 1, 10))
    pooled = [m(bags[0], bags[1]).detach() for m in (source, served)]
    if precision == "fp32":
        assert torch.equal(got, wanted)
        assert torch.equal(*pooled)
    else:
        assert (got - wanted).abs().mean() < 0.02 * wanted.abs().mean()
        assert (pooled[1] - pooled[0]).abs().mean() < 0.02 * pooled[0].abs().mean()
    assert served.optimizer is None
    assert served.schema == source.schema
    assert served.plan == source.plan
    assert report.bytes == (tmp_path / "c").stat().st_size == report.embedding_bytes + report.header_bytes


@pytest.mark.crossed
@METHODS
@pytest.mark.parametrize("precision", PRECISIONS)
def test_bytes_are_those_of_the_report(method: MethodInfo, precision: Any, tmp_path: Path) -> None:
    """What the memory report says a plan will take to serve, the file takes and the loaded module holds."""
    plan = plan_of(method)
    report = export(rse.EmbeddingCollection(SCHEMA, plan), tmp_path / "c", precision, prune=False)
    told = memory_report(plan, schema=SCHEMA, precision=precision).total("serve")
    assert report.embedding_bytes == pytest.approx(told, rel=0.01)
    assert report.bytes - report.header_bytes == report.embedding_bytes
    if precision in ("fp32", "fp16", "bf16"):
        # The precision that is asked for is that of all tables, whatever the plan says: that of rows which train.
        said = plan.footprint(SCHEMA, itemsize=4 if precision == "fp32" else 2)
        assert report.embedding_bytes == pytest.approx(said.serve + said.unrounded, rel=0.01)
    if precision == "fp32":
        assert load(tmp_path / "c").footprint().serve == report.embedding_bytes  # type: ignore[operator]
    alone = export(make(method), tmp_path / "e", precision, prune=False)
    assert alone.embedding_bytes == pytest.approx(
        memory_report(make(method), precision=precision).total("serve"), rel=0.01
    )


@pytest.mark.parametrize("name", models())
def test_every_model(name: str, tmp_path: Path) -> None:
    plan = Plan.uniform(SCHEMA, "compositional", num_collisions=3, combine="path", threshold=50)
    narrow = SCHEMA.with_dim(1)
    linear = Plan.uniform(narrow, "unified", budget="2KiB") if name in ("lr", "fm", "deepfm", "widedeep") else None
    vectors = Plan.uniform(SCHEMA, "hash", num_buckets=7) if name == "lr" else plan
    options = {"num_dense": 3, "seed": 5, **finds(name, SCHEMA)}
    model = build_model(name, SCHEMA, vectors, linear if name != "lr" else None, **options)
    model.standardise(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 1.0, 0.5]))
    dense, ids = torch.randn(50, 3), ids_of(SCHEMA)
    model(dense, ids).sum().backward()
    model.eval()
    wanted = model(dense, ids).detach()
    report = export(model, tmp_path / "m", evaluate=lambda m: float(m(dense, ids).detach().mean()), metric="mean")
    served = load(tmp_path / "m")
    assert type(served) is type(model)
    assert torch.equal(served(dense, ids), wanted)
    assert not report.needs_skeleton
    assert report.metric is not None
    assert (report.metric.name, report.metric.change) == ("mean", 0.0)
    assert verify(tmp_path / "m")["metric"]["after"] == report.metric.after
    dense_bytes = sum(p.nbytes for k, p in model.state_dict().items() if not k.startswith(("embedding.", "linear.")))
    assert report.dense_bytes == dense_bytes or name in ("lr", "fm", "deepfm", "widedeep")
    small = export(model, tmp_path / "m", "int8")
    assert small.embedding_bytes < report.embedding_bytes / 1.7
    assert (load(tmp_path / "m")(dense, ids) - wanted).abs().max() < 0.05
    # The same file fills a model that its owner has built.
    fresh = build_model(name, SCHEMA, vectors, linear if name != "lr" else None, num_dense=3, **finds(name, SCHEMA))
    assert torch.equal(load(tmp_path / "m", into=fresh)(dense, ids), load(tmp_path / "m")(dense, ids))


def test_a_model_that_was_changed_needs_its_owner(tmp_path: Path) -> None:
    model = build_model("dnn", SCHEMA, Plan.full(SCHEMA), num_dense=3)
    model.extra = nn.Linear(2, 2)
    assert export(model, tmp_path / "m").needs_skeleton
    with pytest.raises(CheckpointError, match=r"'recsys_embed.models.dnn.DNN'.* load\(path, into=model\)"):
        load(tmp_path / "m")
    fresh = build_model("dnn", SCHEMA, Plan.full(SCHEMA), num_dense=3, seed=9)
    with pytest.raises(CheckpointError, match=r"'extra.weight', which the model lacks"):
        load(tmp_path / "m", into=fresh)
    fresh.extra = nn.Linear(2, 2)
    load(tmp_path / "m", into=fresh)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_training_run(tmp_path: Path) -> None:
    """A run folder is enough: features and plans travel with the weights."""
    from recsys_embed.train.checkpoint import save_checkpoint

    model = build_model("deepfm", SCHEMA, plan_of(rse.get_method("memcom")), num_dense=2, hidden=(8,))
    config = {"model": "deepfm", "model_args": {"hidden": [8]}, "data": "x"}
    save_checkpoint(tmp_path / "run" / "model.pt", config, model=model.state_dict())
    dense, ids = torch.randn(50, 2), ids_of(SCHEMA)
    for source in (tmp_path / "run", str(tmp_path / "run" / "model.pt")):
        export(source, tmp_path / "m")
        assert torch.equal(load(tmp_path / "m")(dense, ids), model.eval()(dense, ids))
    with pytest.raises(ConfigError, match=r"holds no model\.pt"):
        export(tmp_path, tmp_path / "m")
    with pytest.raises(ConfigError, match="does not exist"):
        export(tmp_path / "absent", tmp_path / "m")
    save_checkpoint(tmp_path / "other.pt", {"model": 3}, model=model.state_dict())
    with pytest.raises(CheckpointError, match="holds no trained model"):
        export(tmp_path / "other.pt", tmp_path / "m")
    save_checkpoint(tmp_path / "other.pt", {**config, "model_args": {"hidden": [9]}}, model=model.state_dict())
    with pytest.raises(CheckpointError, match="cannot be built"):
        export(tmp_path / "other.pt", tmp_path / "m")


# -- models of other people -------------------------------------------------------------------------------------------


class Theirs(nn.Module):
    """Full tables of all kinds, one shared between two places, one tied to an output layer, and a drop-in."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(
            {"user": nn.Embedding(300, 8, padding_idx=0), "tags": nn.EmbeddingBag(90, 8, mode="mean")}
        )
        self.same = self.tables["user"]
        self.renormed = nn.Embedding(50, 8, max_norm=0.5)
        self.compressed = rse.make_embedding("multihash", 5000, 8, num_buckets=100)
        self.words = nn.Embedding(40, 8)
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.words.weight
        self.norm = nn.BatchNorm1d(8)

    def forward(self, ids: Tensor) -> Tensor:
        user = self.tables["user"](ids) + self.same(ids // 2) + self.tables["tags"](ids.unsqueeze(1) % 90)
        rest = self.renormed(input=ids % 50) + self.compressed(ids * 7) + self.words(ids % 40)
        return self.head(self.norm(user + rest))


@pytest.fixture
def theirs() -> Theirs:
    torch.manual_seed(1)
    model = Theirs()
    with torch.no_grad():
        model.tables["user"].weight[200:] = 0
    model(torch.arange(300))
    return model.eval()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_models_of_other_people(theirs: Theirs, precision: Any, device: str, tmp_path: Path) -> None:
    ids = torch.arange(300)
    wanted = theirs(ids).detach()
    report = export(theirs, tmp_path / "m", precision, evaluate=lambda m: float(m(ids).detach().sum()))
    wanted = theirs(ids).detach()  # max_norm may round a row once more at every look-up
    with torch.device(device):
        fresh = Theirs()
    served = load(tmp_path / "m", into=fresh)
    assert served is fresh
    assert not served.training
    error = (served(ids) - wanted).abs().mean() / wanted.abs().mean()
    assert (
        error == 0
        if precision == "fp32"
        else error < {"fp16": 1e-3, "bf16": 1e-2, "fp8": 0.07, "int8": 0.02, "int4": 0.3, "int2": 1.0}[precision]
    )
    assert report.notes == ("words: kept whole, its weight is also head.weight",)
    assert report.needs_skeleton
    assert report.metric is not None
    assert report.metric.after == pytest.approx(float(served(ids).detach().sum()), rel=1e-5)
    assert served.same is served.tables["user"]
    # Where a table is as torch has it, torch's module stays.
    assert isinstance(served.tables["tags"], nn.EmbeddingBag) == (precision == "fp32")
    assert {t.name for t in report.tables} == {
        "tables.user.weight",
        "tables.tags.weight",
        "renormed.weight",
        "compressed.weight",
        "compressed.importance",
    } - ({"compressed.importance"} if "importance" not in dict(theirs.compressed.named_parameters()) else set())
    again = export(served, tmp_path / "again", precision)
    with torch.device(device):
        fresh = Theirs()
    assert torch.equal(load(tmp_path / "again", into=fresh)(ids), served(ids)) or precision in BITS
    assert again.needs_skeleton


def test_what_does_not_fit_is_all_named_and_nothing_is_changed(theirs: Theirs, tmp_path: Path) -> None:
    export(theirs, tmp_path / "m", "int8")
    other = Theirs()
    other.tables["tags"] = nn.EmbeddingBag(91, 8, mode="mean")
    other.renormed = nn.Linear(2, 2)  # type: ignore[assignment]
    other.norm = nn.BatchNorm1d(9)
    del other.compressed
    other.new = nn.Linear(1, 1, dtype=torch.float64)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    modules = dict(other.named_modules())
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "m", into=other)
    text = str(caught.value)
    for part in (
        "'tables.tags' is 91 x 8, mode mean; in the file 90 x 8, mean",
        "'renormed' is a Linear in the model, an embedding in the file",
        "the model has no module 'compressed'",
        "the model has 'new.weight', which the file lacks",
        "'norm.weight' is torch.float32 [9] in the model, torch.float32 [8] in the file",
    ):
        assert part in text
    assert dict(other.named_modules()) == modules
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
    export(rse.make_embedding("hash", 10, 4, num_buckets=3), tmp_path / "e")
    with pytest.raises(CheckpointError, match="without `into`"):
        load(tmp_path / "e", into=other)


def test_a_model_after_compress(theirs: Theirs, tmp_path: Path) -> None:
    """Tables that several drop-ins share are in the file once, and in what is loaded."""
    plain = nn.ModuleDict({n: nn.Embedding(2000, 8) for n in ("a", "b", "c")})
    schema = Schema.from_model(plain)
    compress_(plain, Plan.uniform(schema, "unified", budget="16KiB"), init="fresh")
    ids = torch.arange(2000)
    report = export(plain, tmp_path / "m", "int8")
    assert [t.name for t in report.tables] == ["a.unified"]
    fresh = nn.ModuleDict({n: nn.Embedding(2000, 8) for n in ("a", "b", "c")})
    served: Any = load(tmp_path / "m", into=fresh)
    for name in plain:
        assert (served[name](ids) - plain[name](ids)).abs().max() <= report.max_error
        assert torch.equal(served[name].weight, served[name](ids))
    assert served["a"].served["unified"] is served["c"].served["unified"]
    exact = export(plain, tmp_path / "m")
    assert exact.embedding_bytes == 4 * 16 * 1024 // 4
    fresh = nn.ModuleDict({n: nn.Embedding(2000, 8) for n in ("a", "b", "c")})
    served = load(tmp_path / "m", into=fresh)
    assert all(torch.equal(served[n](ids), plain[n](ids)) for n in plain)
    assert sum(p.numel() for p in served.parameters()) * 4 == exact.embedding_bytes


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_was_loaded_can_be_turned_back_or_compressed_anew(precision: Any, tmp_path: Path) -> None:
    def build() -> nn.ModuleDict:
        return nn.ModuleDict({"item": nn.Embedding(900, 8), "day": nn.EmbeddingBag(50, 8, mode="sum", padding_idx=3)})

    def outputs(model: nn.ModuleDict) -> list[Tensor]:
        return [model["item"](torch.arange(900)), model["day"](torch.arange(50).view(10, 5))]

    model, file = build(), tmp_path / "model.safetensors"
    compress_(model, {"item": rse.get_method("hash").config_cls.from_params({"num_buckets": 90}), "day": FULL})
    export(model, file, precision=precision)
    served = load(file, into=build())
    before = outputs(served)
    rse.materialize_(served)
    assert [type(m) for m in served.values()] == [nn.Embedding, nn.EmbeddingBag]
    assert all(torch.equal(a, b) for a, b in zip(outputs(served), before, strict=True))
    assert {p.requires_grad for p in served["item"].parameters()} == {False}
    again = load(file, into=build())
    wide = rse.get_method("lowdim").config_cls.from_params({"dim": 8})
    compress_(again, {"item": wide, "day": wide})
    for found, expected in zip(outputs(again), before, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_torchrec_collections(tmp_path: Path) -> None:
    pytest.importorskip("torchrec")
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

    def make() -> nn.Module:
        tables = [
            EmbeddingBagConfig(name=f"t{i}", embedding_dim=8, num_embeddings=70, feature_names=[f"f{i}"])
            for i in (0, 1)
        ]
        return nn.Sequential(EmbeddingBagCollection(tables=tables, device=torch.device("cpu")))

    source = make().eval()
    jagged = KeyedJaggedTensor(["f0", "f1"], torch.arange(9), lengths=torch.tensor([2, 1, 3, 3]))
    wanted = source(jagged).values().detach()
    for precision, error in (("fp32", 0.0), ("int8", 0.02)):
        export(source, tmp_path / "m", precision)  # type: ignore[arg-type]
        got = load(tmp_path / "m", into=make())(jagged).values()
        assert (got - wanted).abs().max() <= error


# -- what else belongs to an embedding --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_frequent_ids_go_along(precision: Any, tmp_path: Path) -> None:
    counts = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).double()
    found = 0
    for method in list_methods():
        source = make(method).assign_(counts)
        index = source.kernel.index.nbytes
        found += index > 0
        report = export(source, tmp_path / "e", precision, prune=False)
        served: Any = load(tmp_path / "e")
        assert served.kernel.index.nbytes == index
        if precision == "fp32":
            assert torch.equal(served(torch.arange(ROWS)), source(torch.arange(ROWS)))
        assert report.embedding_bytes >= index
    assert found == 0 or precision


@pytest.mark.parametrize("unseen", ["hash", "oov", "zero", "raise", None])
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_ids_never_seen_become_what_they_were(unseen: Any, precision: Any, tmp_path: Path) -> None:
    ids = torch.tensor([3, ROWS, -1, 2**40])
    for name in ("full", "hash", "memcom"):
        source = make(rse.get_method(name), unseen=unseen)
        export(source, tmp_path / "e", precision)
        served: Any = load(tmp_path / "e")
        if unseen == "raise" or (unseen is None and not source.config.accepts_raw):
            with pytest.raises(IdRangeError):
                served(ids)
            continue
        wanted, got = source(ids).detach(), served(ids)
        assert torch.equal(got, wanted) if precision == "fp32" else (got - wanted).abs().max() < 0.5
        assert torch.equal(got == 0, wanted == 0) or precision == "int4"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_served_plain_table_is_called_by_its_path(precision: Any, tmp_path: Path) -> None:
    def make_model() -> nn.Module:
        tables = {"user": nn.Embedding(30, 4, max_norm=1.0), "tags": nn.EmbeddingBag(20, 4, max_norm=1.0)}
        return nn.ModuleDict({"tower": nn.ModuleDict(tables)})

    export(make_model(), tmp_path / "m", precision)
    served: Any = load(tmp_path / "m", into=make_model())
    for name, table in served["tower"].items():
        with pytest.raises(IdRangeError, match=f"feature 'tower/{name}'"):
            table(torch.tensor([[99]]))


def test_pruned_rows_and_columns_of_one_field_among_many(tmp_path: Path) -> None:
    source = rse.EmbeddingCollection(SCHEMA)
    with torch.no_grad():
        source.table("C1.weight")[:, 3:] = 0
        source.table("C3.weight")[::2] = 0
    ids = ids_of(SCHEMA)
    for precision in PRECISIONS:
        report = export(source, tmp_path / "c", precision)
        kept = {t.name: (t.kept_rows, t.kept_columns) for t in report.tables}
        assert kept == {"C0.weight": (40, 8), "C1.weight": (900, 3), "C2.weight": (7, 8), "C3.weight": (150, 8)}
        served: Any = load(tmp_path / "c")
        got, wanted = served(ids), source(ids).detach()
        assert torch.equal(got, wanted) if precision == "fp32" else (got - wanted).abs().max() <= report.max_error
        assert torch.equal(served.table("C1.weight")[:, 3:], torch.zeros(900, 5))
        assert report.embedding_bytes == served.footprint().serve


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_other_dtypes(dtype: torch.dtype, precision: Any, tmp_path: Path) -> None:
    """Vectors leave in the type they had; 16-bit tables are kept as they are at fp32, 64-bit ones are narrowed."""
    for name in ("full", "lowdim", "robe"):
        source = make(rse.get_method(name), dtype=dtype)
        export(source, tmp_path / "e", precision)
        served = load(tmp_path / "e")
        ids = torch.arange(100)
        wanted, got = source(ids).detach(), served(ids)
        assert got.dtype == dtype
        if precision == "fp32":
            assert torch.equal(got, wanted) or dtype == torch.float64
        assert (got - wanted).abs().max() < (2.0 if precision == "int2" else 0.6)


def test_a_served_module_is_a_module(tmp_path: Path) -> None:
    source = make(rse.get_method("lowdim"))
    export(source, tmp_path / "e", "int8")
    served: Any = load(tmp_path / "e")
    ids = torch.arange(50)
    wanted = served(ids)
    for copied in (copy.deepcopy(served), pickle.loads(pickle.dumps(served))):
        assert torch.equal(copied(ids), wanted)
    buffer = io.BytesIO()
    torch.save(served.state_dict(), buffer)
    other: Any = load(tmp_path / "e")
    other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert torch.equal(other(ids), wanted)
    assert served.materialize().shape == (ROWS, WIDTH)
    assert torch.equal(served.materialize()[:50], wanted)
    assert served.table("weight").shape == source.table("weight").shape
    with pytest.raises(ConfigError, match="serves exported tables"):
        served.reset_parameters()
    assert served.to(torch.float64)(ids).dtype == torch.float64
    compiled = torch.compile(load(tmp_path / "e", backend="torch"), backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids), wanted)


def test_backends_give_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("fbgemm_gpu")
    for name, precision in (("full", "int8"), ("multihash", "int4"), ("memcom", "int8")):
        export(make(rse.get_method(name)), tmp_path / "e", precision)  # type: ignore[arg-type]
        outs = [load(tmp_path / "e", backend=b)(torch.arange(ROWS)) for b in ("torch", "fbgemm", "auto")]  # type: ignore[arg-type]
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])
    with pytest.raises(ConfigError, match="unknown backend 'cuda'"):
        load(tmp_path / "e", backend="cuda")  # type: ignore[arg-type]


# -- what cannot be exported ------------------------------------------------------------------------------------------


def test_wrong_arguments(tmp_path: Path) -> None:
    module = make(rse.get_method("hash"))
    with pytest.raises(ConfigError, match="unknown precision 'int3'"):
        export(module, tmp_path / "f", "int3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown search 'best'"):
        export(module, tmp_path / "f", search="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"must be a torch.nn.Module or the path of a run; got int"):
        export(3, tmp_path / "f")  # type: ignore[arg-type]
    assert not (tmp_path / "f").exists()


def test_everything_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Embedding(5, 4), "b": nn.Embedding(5, 4), "c": nn.Linear(4, 4)})
    with torch.no_grad():
        model["a"].weight[2] = float("nan")
        model["b"].weight[1] = float("inf")
        model["c"].weight[0] = float("nan")
    with pytest.raises(ConfigError) as caught:
        export(model, tmp_path / "f")
    for part in ("table 'a.weight' holds NaN", "table 'b.weight' holds NaN", "parameter 'c.weight' holds NaN"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"'a\.weight' is on the meta device"):
        export(model.to("meta"), tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_modules_that_a_file_cannot_bring_back(tmp_path: Path) -> None:
    class Mine(rse.HashEmbedding):  # type: ignore[name-defined,misc]
        pass

    with pytest.raises(ConfigError, match="a subclass of HashEmbedding, which a file cannot bring back"):
        export(Mine(10, 4, num_buckets=3), tmp_path / "f")
    normed = weight_norm(make(rse.get_method("hash")))
    with pytest.raises(ConfigError, match=r"parametrized \('weight'\).*remove_parametrizations"):
        export(normed, tmp_path / "f")
    module = make(rse.get_method("hash"))
    module.extra = nn.Parameter(torch.zeros(3))
    # What a user added is kept as it is.
    export(module, tmp_path / "f")

    class Extra(nn.ModuleList):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    with pytest.raises(ConfigError, match="'_extra_state' is of type dict"):
        export(Extra([nn.Embedding(4, 4)]), tmp_path / "f")


def test_buffers_may_be_infinite(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(4, 4))
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    export(model, tmp_path / "f")
    fresh = nn.Sequential(nn.Embedding(4, 4))
    fresh.register_buffer("mask", torch.zeros(2))
    load(tmp_path / "f", into=fresh)
    assert torch.equal(fresh.mask, model.mask)


def test_the_report_says_what_was_written(theirs: Theirs, tmp_path: Path) -> None:
    report = export(theirs, tmp_path / "m", "int8", evaluate=lambda m: 0.5, metric="AUC")
    text, data = str(report), json.loads(json.dumps(report.to_dict()))
    assert "at int8" in text
    assert re.search(r"tables\.user\.weight +199 of 300 +8 +int8", text)
    assert "AUC: 0.500000 before, 0.500000 after" in text
    assert "load(path, into=model)" in text
    assert data["bytes"] == (tmp_path / "m").stat().st_size
    assert sum(t["bytes"] + t["index_bytes"] for t in data["tables"]) == data["embedding_bytes"]
    assert data["bytes"] == data["embedding_bytes"] + data["dense_bytes"] + data["header_bytes"]
    manifest = verify(tmp_path / "m")
    for table in report.tables:
        assert manifest["tables"][table.name]["max_error"] == table.max_error
        served = load(tmp_path / "m", into=Theirs())
        assert served is not None


@pytest.mark.parametrize("options", [{"combine": "path", "hidden": 3}, {"bag": "pooled"}], ids=str)
def test_collections_with_heads_come_back(options: dict[str, Any], tmp_path: Path) -> None:
    """Networks per class belong to a feature; they stay as they are while the tables are stored anew."""
    plan = {**Plan.full(SCHEMA).configs, **Plan.uniform(SCHEMA, "compositional", num_collisions=4, **options).configs}
    plan["C1"] = Plan.full(SCHEMA)["C1"]
    coll = rse.EmbeddingCollection(SCHEMA, Plan(plan))
    ids = torch.tensor([[3, 899, 6, 299], [39, 0, 1, 5]])
    export(coll, tmp_path / "model", "fp32")
    assert torch.equal(load(tmp_path / "model")(ids), coll(ids))
    export(coll, tmp_path / "small", "int8")
    served = load(tmp_path / "small")
    torch.testing.assert_close(served(ids), coll(ids), atol=0.1, rtol=0)
    export(served, tmp_path / "again", "int8")
    assert torch.equal(load(tmp_path / "again")(ids), served(ids))
