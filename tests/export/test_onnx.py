"""ONNX graphs of whole models compute in onnxruntime what the models compute, hashes bit for bit."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import recsys_embed as rse
from recsys_embed.core import hashing
from recsys_embed.core.id_sets import popcount
from recsys_embed.errors import ConfigError, ExportError, MissingDependencyError
from recsys_embed.exports import onnx_file
from recsys_embed.exports.graph import check_graph, to_onnx, to_torch_export
from recsys_embed.models.base import CTRModel, ModelSpec
from recsys_embed.utils.types import Ids
from tests.export import zoo
from tests.tiers import slow_but


def session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run(file: Path, *inputs: Tensor) -> list[Tensor]:
    graph = session(file)
    feed = {i.name: x.numpy() for i, x in zip(graph.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(out) for out in graph.run(None, feed)]


class Zoo(nn.Module):
    """Every registered model on the same inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleDict({name: zoo.model(name, mixed=False) for name in zoo.models()})

    def forward(self, dense: Tensor, ids: Tensor) -> dict[str, Tensor]:
        return {name: model(dense, ids) for name, model in self.members.items()}


@pytest.mark.slow
def test_every_model(tmp_path: Path) -> None:
    to_onnx(Zoo(), tmp_path / "zoo.onnx", (torch.randn(6, zoo.DENSE), torch.randint(50, (6, 2))))


@pytest.mark.slow
def test_every_method_takes_every_id_it_takes(tmp_path: Path) -> None:
    coll = zoo.collection(optimizer=rse.RowwiseAdagrad(lr=0.1))
    written = to_onnx(coll, tmp_path / "coll.onnx")
    assert written.check is not None
    assert written.check.batches == (1, 5, 300)
    weights = sum(t.nbytes for t in coll.parameters()) + coll.footprint().index
    assert weights <= written.nbytes <= weights + 100_000, "no optimizer state"
    model = onnx.load(tmp_path / "coll.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert str(Path(rse.__file__).parent).encode() not in (tmp_path / "coll.onnx").read_bytes(), "a path got in"
    with torch.no_grad():
        coll.table(next(iter(coll.tables))).add_(1)
    with pytest.raises(ExportError, match="differ by"):
        check_graph(tmp_path / "coll.onnx", coll)


class Bags(nn.Module):
    """Bags of every mode; what they pool is looked up as in the test before."""

    def __init__(self) -> None:
        super().__init__()
        modes = ("sum", "mean", "max")
        self.parts = nn.ModuleDict({m: zoo.DropIns(m, ("full", "hash", "compositional"), padding_idx=7) for m in modes})

    def forward(self, ids: Tensor, offsets: Tensor) -> dict[str, dict[str, Tensor]]:
        return {mode: part(ids, offsets) for mode, part in self.parts.items()}


@pytest.mark.slow
def test_bags(tmp_path: Path) -> None:
    module = Bags()
    # Empty bags first, in between and last; one of padding alone; ids in no order.
    ids = torch.tensor([7, 3, 402, 7, 7, 3, 3, 0, 391])
    offsets = torch.tensor([0, 0, 3, 3, 5, 9, 9])
    to_onnx(module, tmp_path / "bags.onnx", (ids, offsets), check=False)
    with torch.no_grad():
        wanted = module(ids, offsets)
    names = [(mode, name) for mode, parts in wanted.items() for name in parts]
    for (mode, name), out in zip(names, run(tmp_path / "bags.onnx", ids, offsets), strict=True):
        torch.testing.assert_close(out, wanted[mode][name], rtol=1e-5, atol=1e-6, msg=f"{mode} {name}")
        if name != "full":  # whose padding is a stored row, as in torch
            assert not out[[0, 2, 3, 5, 6]].any(), (mode, name)
    with pytest.raises(Exception, match="ScatterND"):
        run(tmp_path / "bags.onnx", ids, offsets.clamp_min(1))  # as torch, which wants the first offset to be 0


@pytest.mark.parametrize(("include", "weighted"), [(True, False), (False, True)])
def test_bags_with_last_offset_and_weights(include: bool, weighted: bool, tmp_path: Path) -> None:
    bag = rse.make_embedding("hash", 90, 4, num_buckets=30, mode="sum", include_last_offset=include)
    ids, offsets = torch.arange(0, 90, 9), torch.tensor([0, 4, 4, 8])
    weights = (torch.randn(10, generator=torch.Generator().manual_seed(0)),) if weighted else ()
    to_onnx(bag, tmp_path / "bag.onnx", (ids, offsets, *weights), check=False)
    (out,) = run(tmp_path / "bag.onnx", ids, offsets, *weights)
    torch.testing.assert_close(out, bag(ids, offsets, *weights).detach())


@pytest.mark.slow
def test_features_of_bags_in_one_call(tmp_path: Path) -> None:
    specs = [rse.FeatureSpec("a", 3000, 4), rse.FeatureSpec("b", 3000, 4, pooling="max")]
    specs += [rse.FeatureSpec("c", 3000, 4, pooling="mean", unseen="zero")]
    schema = rse.Schema(specs)
    hashed = rse.Plan.uniform(schema, "hash", budget="20KiB")
    coll = rse.EmbeddingCollection(schema, rse.Plan({"a": hashed["a"], "b": rse.FullConfig(), "c": hashed["c"]}))
    offsets = torch.tensor([0, 2, 2, 5, 6, 9, 9, 9, 14, 14, 18, 20, 20, 23, 24, 27])
    ids = torch.arange(27) * 31
    to_onnx(coll, tmp_path / "bags.onnx", (ids, offsets), check=False)
    to_torch_export(coll, tmp_path / "bags.pt2", (ids, offsets), check=False)
    program = torch.export.load(tmp_path / "bags.pt2").module()
    ids[20:] *= 1000  # of feature c, which has no row for them
    # More samples, fewer, a feature without any id.
    for bags in (offsets, torch.tensor([0, 9, 9, 20]), torch.tensor([0, 3, 5, 5, 5, 8, 27])):
        values = ids[: bags[-1]]
        if len(bags) == 7:
            values = values % 3000
        wanted = coll(values, bags).detach()
        if len(bags) > 4:  # torch.export takes two samples or more in this form
            torch.testing.assert_close(program(values, bags), wanted)
        torch.testing.assert_close(run(tmp_path / "bags.onnx", values, bags)[0], wanted)


def test_features_of_bags_by_name(tmp_path: Path) -> None:
    coll = rse.EmbeddingCollection(rse.Schema([rse.FeatureSpec("a", 90, 4), rse.FeatureSpec("b", 90, 4)]))
    given = {"a": torch.arange(12).view(4, 3), "b": (torch.arange(7), torch.tensor([0, 2, 2, 5, 7]))}
    to_onnx(coll, tmp_path / "bags.onnx", (given,))
    names = [i.name for i in session(tmp_path / "bags.onnx").get_inputs()]
    assert names == ["ids_a", "ids_b_0", "ids_b_1"]


def test_somebody_elses_model(tmp_path: Path) -> None:
    written = to_onnx(zoo.two_towers(), tmp_path / "towers.onnx", (zoo.two_towers_batch(5),))
    assert written.check is not None
    assert written.check.batches == (5, 1, 15)
    assert {o.type for o in session(written.files[0]).get_outputs()} == {"tensor(float)", "tensor(bool)"}


@pytest.mark.parametrize("precision", slow_but(["fp16", "int8", "int4"]))
def test_what_an_export_loads(precision: str, tmp_path: Path) -> None:
    written = to_onnx(zoo.served(precision, tmp_path), tmp_path / "served.onnx")
    assert written.check is not None
    assert written.nbytes <= (tmp_path / "served.rse").stat().st_size + 60_000


class Integers(nn.Module):
    """Everything that lookups do to ids."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sizes", torch.tensor([2**31 - 1, 1_000_003, 7, 1]))
        self.register_buffer("edges", torch.tensor([-(2**40), -3, 0, 0, 5, 2**62]))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x, salt = ids.unsqueeze(1), hashing.salt(3, "a")
        return {
            "splitmix64": hashing.splitmix64(ids, salt),
            "rows": hashing.hash_rows(x, salt, self.sizes),
            "signs": hashing.hash_signs(ids, salt),
            "murmur": hashing.murmur3_words(ids, 77),
            "remainder": x % self.sizes,
            "divide": torch.div(x, self.sizes, rounding_mode="floor"),
            "divide_by_number": ids // 1000,
            "truncate": torch.div(ids, 1000, rounding_mode="trunc"),
            "shift": ids >> 5,
            "shift_by": ids >> (ids & 63),
            "shift_left": torch.ones_like(ids) << (ids & 63),
            "bits": popcount(ids),
            "narrow": (ids & 0x7FFFFFFF).to(torch.int32) >> 3,
            "byte": (ids & 255).to(torch.uint8) >> 4,
            "place": torch.bucketize(ids, self.edges),
            "place_right": torch.bucketize(ids, self.edges, right=True, out_int32=True),
            "signed_byte": (ids & 255).to(torch.int8) >> 4,
        }


def test_integer_arithmetic_is_exact_on_millions_of_ids(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    edges = torch.tensor([1 << b for b in range(63)] + [-(1 << b) for b in range(64)])
    ids = torch.cat([edges, edges - 1, edges + 1, torch.randint(-(2**63), 2**63 - 1, (1_000_000,), generator=rng)])
    module = Integers()
    to_onnx(module, tmp_path / "integers.onnx", torch.arange(4), check=False)
    wanted = module(ids)
    for name, out in zip(wanted, run(tmp_path / "integers.onnx", ids), strict=True):
        assert out.dtype == wanted[name].dtype, name
        assert torch.equal(out, wanted[name]), name


def test_bytes_read_as_halves_are_exact(tmp_path: Path) -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(torch.float16)

    all_of_them = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(-1, 2)
    to_onnx(Halves(), tmp_path / "h.onnx", all_of_them.view(torch.uint8)[:2], check=False)
    (out,) = run(tmp_path / "h.onnx", all_of_them.view(torch.uint8))
    wanted = all_of_them.view(torch.float16)
    known = ~wanted.isnan()
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out[known].view(torch.int16), wanted[known].view(torch.int16))


def test_what_has_no_translation_is_named(tmp_path: Path) -> None:
    class Singles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(torch.float32)

    with pytest.raises(ExportError, match="cannot be written as ONNX: bytes of UINT8 read as FLOAT"):
        to_onnx(Singles(), tmp_path / "s.onnx", torch.zeros(2, 4, dtype=torch.uint8))


def test_ids_out_of_range_are_refused_by_name(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.coll = rse.EmbeddingCollection(rse.Schema([rse.FeatureSpec("a", 10, 4), rse.FeatureSpec("b", 20, 4)]))
            self.emb = rse.make_embedding("lowdim", 30, 4, budget="200B", name="c")

        def forward(self, ids: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
            return self.coll(ids).sum((1, 2)), self.emb(more)

    to_onnx(Model(), tmp_path / "m.onnx", (torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, dtype=torch.long)))
    for bad in ([[10, 0]], [[-1, 0]], [[0, 20]], [[0, -(2**63)]]):
        with pytest.raises(Exception, match="an id lies outside the range its feature declares"):
            run(tmp_path / "m.onnx", torch.tensor(bad), torch.tensor([29]))
    with pytest.raises(Exception, match=re.escape("ids of feature 'c' must be in [0, 30)")):
        run(tmp_path / "m.onnx", torch.tensor([[9, 19]]), torch.tensor([30]))
    assert len(run(tmp_path / "m.onnx", torch.tensor([[9, 19]]), torch.tensor([29]))) == 2


def test_what_exporters_and_runtimes_raise_names_the_model_and_the_way_out(tmp_path: Path) -> None:
    class Reads(CTRModel):
        key = "reads"

        def __init__(self, fault: str) -> None:
            schema = rse.Schema([rse.FeatureSpec("a", 10, 4)])
            super().__init__(ModelSpec(schema, rse.Plan.full(schema), num_dense=1))
            self.fault = fault

        def logits(self, dense: Tensor, ids: Ids) -> Tensor:
            if self.fault == "traced by torch.export":
                return dense[: int(dense[0, 0])].sum(1)
            found = dense.sum(1) + self.vectors(ids).sum((1, 2))
            return torch.linalg.matrix_exp(found.diag()).sum(0) if self.fault == "written as ONNX" else found

    inputs = torch.ones(4, 1), torch.ones(4, 1, dtype=torch.int64)
    for step in ("traced by torch.export", "written as ONNX"):
        told = (
            f"^model 'reads' cannot be {step}: [^\n]+; give a batch of its data, `inputs=.batch.dense, batch.inputs.`"
        )
        with pytest.raises(ExportError, match=told):
            to_onnx(Reads(step), tmp_path / "m.onnx")
        with pytest.raises(ExportError, match=rf"{step}: [^\n]+; serve it from Python with recsys_embed.export"):
            to_onnx(Reads(step), tmp_path / "m.onnx", inputs)
    with pytest.raises(ExportError, match=r"'reads' cannot be traced by torch\.export"):
        to_torch_export(Reads("traced by torch.export"), tmp_path / "m.pt2")
    to_onnx(Reads(""), tmp_path / "m.onnx")
    three = torch.ones(4, 3), inputs[1]
    with pytest.raises(ExportError, match=r"'reads' cannot be run as it was written: [^\n]+; serve it"):
        check_graph(tmp_path / "m.onnx", Reads(""), three)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_an_empty_batch(tmp_path: Path) -> None:
    coll = rse.EmbeddingCollection(rse.Schema([rse.FeatureSpec("a", 10, 4)]))
    to_onnx(coll, tmp_path / "c.onnx")
    (out,) = run(tmp_path / "c.onnx", torch.zeros(0, 1, dtype=torch.long))
    assert out.shape == (0, 1, 4)


def test_ids_never_seen_follow_their_policy(tmp_path: Path) -> None:
    coll = rse.EmbeddingCollection(rse.Schema([rse.FeatureSpec(u, 10, 4, unseen=u) for u in ("hash", "oov", "zero")]))
    to_onnx(coll, tmp_path / "c.onnx", check=False)
    ids = torch.tensor([3, 10, -5, 2**62]).unsqueeze(1).expand(4, 3)
    assert torch.equal(run(tmp_path / "c.onnx", ids)[0], coll(ids))


def test_tables_in_a_file_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emb = rse.make_embedding("full", 5000, 8)
    file = tmp_path / "emb.onnx"
    first = to_onnx(emb, file, external_data=True, check=False)
    assert first.files[0].stat().st_size < 20_000 < 160_000 <= first.files[1].stat().st_size
    with torch.no_grad():
        emb.weight[4000, 3] += 1
    second = to_onnx(emb, file, external_data=True)
    assert second.files[1] != first.files[1], "a graph never meets another graph's tables"
    assert sorted(tmp_path.iterdir()) == sorted(second.files), "what no graph refers to is removed"
    with torch.no_grad():
        emb.weight[4000, 3] -= 1
    monkeypatch.setattr(onnx_file, "EXTERNAL_BYTES", 100_000)
    third = to_onnx(emb, file, check=False)
    assert third.files == first.files, "equal content, equal names, and large tables stand apart by themselves"


def test_nothing_is_left_where_the_numbers_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    translations = onnx_file.translations

    def wrong() -> dict:
        return {k: v for k, v in translations().items() if "div" not in str(k)}

    class Divides(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.div(ids, 1000, rounding_mode="floor")

    monkeypatch.setattr(onnx_file, "translations", wrong)
    with pytest.raises(ExportError, match="differ by"):
        to_onnx(Divides(), tmp_path / "d.onnx", torch.tensor([2**40 + 999, 5]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_named(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        def find_spec(self, name: str, *_: object) -> None:
            if name.partition(".")[0] == library:
                raise ModuleNotFoundError(name=library)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(MissingDependencyError, match=rf"needs {library}, .*pip install 'recsys-embed\[onnx\]'"):
        to_onnx(rse.make_embedding("full", 10, 4), tmp_path / "e.onnx")


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.onnx"):
        to_onnx(rse.make_embedding("full", 10, 4), tmp_path / "emb.pt2")
    with pytest.raises(ConfigError, match="example `inputs`"):
        to_onnx(nn.Linear(2, 2), tmp_path / "emb.onnx")


def test_dimensions_that_vary_and_doubles(tmp_path: Path) -> None:
    emb = rse.make_embedding("hash", 50, 4, num_buckets=9, dtype=torch.float64)
    inputs = torch.zeros(2, 3, dtype=torch.long)
    to_onnx(emb, tmp_path / "e.onnx", inputs, dynamic_shapes=({1: Dim.DYNAMIC},), check=False)
    ids = torch.arange(8).view(2, 4)
    assert torch.equal(run(tmp_path / "e.onnx", ids)[0], emb(ids))
    (given,), (made,) = session(tmp_path / "e.onnx").get_inputs(), session(tmp_path / "e.onnx").get_outputs()
    assert (given.name, given.shape, made.name, made.type) == ("input", [2, "batch"], "output", "tensor(double)")


class OverHistory(nn.Module):
    """A target item and its history, unpooled, of one table, with padding."""

    def __init__(self, method: str) -> None:
        super().__init__()
        item = rse.FeatureSpec("item", 300, 8, init="normal:1")
        history = rse.FeatureSpec("history", 300, 8, "mean", init="normal:1", table="item", padding_idx=0)
        schema = rse.Schema([item, history])
        plan = rse.Plan.full(schema) if method == "full" else rse.Plan.uniform(schema, method, "4KiB", full_below=0)
        self.embedding = rse.EmbeddingCollection(schema, plan)

    def forward(self, ids: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
        rows, items = self.embedding.lookup("history", history), self.embedding.lookup("item", ids[:, 0])
        score = (rows * items.unsqueeze(1)).sum(-1).masked_fill(history == 0, -1e9)
        return (score.softmax(1).unsqueeze(-1) * rows).sum(1), self.embedding(ids)


@pytest.mark.slow
def test_padding_and_unpooled_vectors(tmp_path: Path) -> None:
    model = OverHistory("freqcut").eval()
    ids, history = torch.tensor([[5, 0], [299, 7], [1, 1]]), torch.tensor([[1, 0, 0, 0], [3, 3, 299, 4], [0, 0, 0, 0]])
    to_onnx(model, tmp_path / "model.onnx", (ids, history))
    to_torch_export(model, tmp_path / "model.pt2", (ids, history))
    with torch.no_grad():
        wanted = model(ids, history)
    for found in (
        run(tmp_path / "model.onnx", ids, history),
        torch.export.load(tmp_path / "model.pt2").module()(ids, history),
    ):
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs)
        assert not found[1][0, 1].any()


@pytest.mark.parametrize("quantization", ["lpt", "alpt", "lsq"])
def test_rows_that_train_in_few_bits_are_exported_first(tmp_path: Path, quantization: str) -> None:
    emb = rse.make_embedding("full", 50, 16, precision="int8", quantization=quantization)
    with pytest.raises(ExportError, match=r"export the model first, then write\s+to_onnx\(recsys_embed.load\(path\)\)"):
        to_onnx(emb, tmp_path / "e.onnx")
    rse.export(emb, tmp_path / "e")
    assert to_onnx(rse.load(tmp_path / "e"), tmp_path / "e.onnx").check is not None
