"""torch.export programs of whole models compute what the models compute, and say when they would not."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import recsys_embed as rse
from recsys_embed.errors import ConfigError, ExportError
from recsys_embed.exports.graph import check_graph, to_torch_export
from recsys_embed.exports.graph_inputs import example_inputs, random_inputs
from tests.export import zoo
from tests.tiers import slow_but


def tensor_bytes(file: Path) -> int:
    """Bytes of the tensors in a program's file, without its JSON."""
    parts = zipfile.ZipFile(file).infolist()
    return sum(p.file_size for p in parts if "/weights/weight_" in p.filename or "/constants/tensor_" in p.filename)


@pytest.mark.parametrize("name", zoo.models())
def test_every_model(name: str, tmp_path: Path) -> None:
    written = to_torch_export(zoo.model(name, mixed=False), tmp_path / "model.pt2")
    assert written.check is not None
    assert written.check.max_difference == 0.0, "the program runs the model's own operators"
    assert written.check.batches == (1, 5, 300)


def test_every_method_in_one_model(tmp_path: Path) -> None:
    model = zoo.model("deepfm", optimizer=rse.RowwiseAdagrad(lr=0.1))
    model.train()
    written = to_torch_export(model, tmp_path / "model.pt2")
    assert written.check is not None
    # Eager lookups compute rows (dhe) once per distinct id, in products of other shapes.
    assert written.check.max_difference <= 1e-7
    assert model.training, "the model's mode is its own"
    weights = sum(p.nbytes for p in model.parameters())
    stored = tensor_bytes(written.files[0])
    index = sum(c.footprint().index for c in model.collections().values())
    assert weights + index <= stored <= weights + index + 20_000, "no optimizer state, nothing twice"


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "only"), [(None, ()), *zoo.MODES])
def test_every_drop_in(mode: str | None, only: tuple[str, ...], tmp_path: Path) -> None:
    module = zoo.DropIns(mode, only, padding_idx=None if mode is None else 7)
    ids = torch.arange(12) * 33
    inputs = (ids,) if mode is None else (ids, torch.tensor([0, 3, 3, 8, 12]))
    to_torch_export(module, tmp_path / "bags.pt2", inputs, check=False)
    program = torch.export.load(tmp_path / "bags.pt2").module()
    ids = torch.arange(403)
    inputs = (ids,) if mode is None else (ids, torch.tensor([0, 0, 5, 200]))
    for name, out in program(*inputs).items():
        assert torch.equal(out, module.parts[name](*inputs)), name


@pytest.mark.parametrize("precision", slow_but(["fp32", "bf16", "int8", "int4"], "int4"))
def test_what_an_export_loads(precision: str, tmp_path: Path) -> None:
    served = zoo.served(precision, tmp_path)
    written = to_torch_export(served, tmp_path / "served.pt2")
    assert written.check is not None
    # Eager lookups may decode with another library's kernels, which fuse a multiplication and an addition.
    assert written.check.max_difference <= 1e-6
    assert tensor_bytes(written.files[0]) <= (tmp_path / "served.rse").stat().st_size, "what was pruned stays away"


def test_a_file_runs_without_the_library(tmp_path: Path) -> None:
    emb = rse.make_embedding("multihash", 1000, 4, budget="2KiB")
    to_torch_export(emb, tmp_path / "emb.pt2", check=False)
    ids = torch.tensor([0, 999, -1, 2**63 - 1, -(2**63)])
    code = (
        "import sys, json, torch\n"
        f"out = torch.export.load({str(tmp_path / 'emb.pt2')!r}).module()(torch.tensor({ids.tolist()}))\n"
        "assert 'recsys_embed' not in sys.modules\n"
        "print(json.dumps(out.tolist()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), emb(ids).detach(), rtol=0, atol=0)


def test_the_file_holds_no_pickle_and_no_path_of_this_machine(tmp_path: Path) -> None:
    to_torch_export(zoo.model("fm", mixed=False), tmp_path / "fm.pt2", check=False)
    with zipfile.ZipFile(tmp_path / "fm.pt2") as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert not content.startswith((b"\x80\x02", b"\x80\x04", b"PK")), f"{name} is pickled"
            assert str(Path(rse.__file__).parent).encode() not in content, f"{name} names a path"


def test_somebody_elses_model(tmp_path: Path) -> None:
    model = zoo.two_towers()
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ConfigError, match="example `inputs` of TwoTowers"):
        to_torch_export(model, tmp_path / "towers.pt2")
    written = to_torch_export(model, tmp_path / "towers.pt2", (zoo.two_towers_batch(5),))
    assert written.check is not None
    assert (written.check.max_difference, written.check.batches) == (0.0, (5, 1, 15))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()), "statistics of the batch norm moved"
    logit, liked = torch.export.load(tmp_path / "towers.pt2").module()(zoo.two_towers_batch(9))
    assert logit.shape == liked.shape == (9,)


def test_ids_out_of_range_end_in_an_error(tmp_path: Path) -> None:
    coll = rse.EmbeddingCollection(rse.Schema([rse.FeatureSpec("a", 10, 4), rse.FeatureSpec("b", 20, 4)]))
    to_torch_export(coll, tmp_path / "c.pt2")
    program = torch.export.load(tmp_path / "c.pt2").module()
    assert program(torch.tensor([[9, 19]])).shape == (1, 2, 4)
    for bad in ([10, 0], [-1, 0], [0, 20]):
        with pytest.raises(RuntimeError, match="an id lies outside the range its feature declares"):
            program(torch.tensor([[0, 0], bad]))


def test_ids_never_seen_follow_their_policy_and_are_not_counted(tmp_path: Path) -> None:
    specs = [rse.FeatureSpec(u, 10, 4, unseen=u) for u in ("hash", "oov", "zero")]
    coll = rse.EmbeddingCollection(rse.Schema(specs))
    to_torch_export(coll, tmp_path / "c.pt2")
    assert all(c.looked_up == 0 for c in coll.unseen_counts().values()), "the check is no traffic"
    ids = torch.tensor([3, 10, -5, 2**62]).unsqueeze(1).expand(4, 3)
    assert torch.equal(torch.export.load(tmp_path / "c.pt2").module()(ids), coll(ids))
    assert all(c == (3, 4) for c in coll.unseen_counts().values()), "counting goes on after the check"


def test_a_mismatch_is_an_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    class Drifts(nn.Module):
        """Gives another answer every time, as no traced program can."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.calls = nn.Parameter(torch.ones(1)), 0

        def forward(self, x):
            self.calls += 1
            return x * self.weight + self.calls

    file = tmp_path / "model.pt2"
    file.write_bytes(b"before")
    with pytest.raises(ExportError, match=r"may differ from the model's by 2e-05; they differ by 1"):
        to_torch_export(Drifts(), file, torch.zeros(2))
    assert file.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"], "no temporary files stay"
    to_torch_export(Drifts(), file, torch.zeros(2), tolerance=5.0)
    assert zipfile.is_zipfile(file)


def test_check_graph_sees_one_changed_weight(tmp_path: Path) -> None:
    emb = rse.make_embedding("hash", 40, 4, num_buckets=20)
    to_torch_export(emb, tmp_path / "e.pt2")
    with torch.no_grad():
        emb.weight[7, 2] += 1e-3
    with pytest.raises(ExportError, match=r"differ by 0\.001"):
        check_graph(tmp_path / "e.pt2", emb)
    other = rse.make_embedding("hash", 40, 5, num_buckets=20)
    with pytest.raises(ExportError, match=r"must be .*\(1, 5\).* got .*\(1, 4\)"):
        check_graph(tmp_path / "e.pt2", other)


def test_bad_arguments(tmp_path: Path) -> None:
    emb = rse.make_embedding("full", 10, 4)
    with pytest.raises(ConfigError, match=r"ends in \.pt2"):
        to_torch_export(emb, tmp_path / "emb.zip")
    with pytest.raises(ConfigError, match="first dimension of 2 or more"):
        to_torch_export(emb, tmp_path / "emb.pt2", torch.zeros(1, dtype=torch.long))
    with pytest.raises(ConfigError, match="at least one tensor"):
        to_torch_export(emb, tmp_path / "emb.pt2", ({"a": 3},))


def test_made_up_ids_cover_the_range_each_feature_takes() -> None:
    coll = zoo.collection()
    inputs = random_inputs(coll, 300)
    assert inputs is not None
    for i, spec in enumerate(coll.schema):
        column = inputs[0][:, i]
        if rse.get_method(spec.name).config_cls.accepts_raw:
            assert column.min() == -(2**63), spec.name
            assert column.max() == 2**63 - 1, spec.name
        else:
            assert (column.min(), column.max()) == (0, spec.num_embeddings - 1), spec.name
    bag = rse.make_embedding("hash", 10, 4, num_buckets=3, mode="sum", include_last_offset=True)
    ids, offsets = example_inputs(bag, None)
    assert offsets[-1] == len(ids)
