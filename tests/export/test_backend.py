"""``load(backend=...)``: what reads the rows, and what the loaded modules say does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import recsys_embed as rse
from recsys_embed.errors import BackendError
from recsys_embed.kernels import fbgemm
from recsys_embed.kernels.dispatch import available_backends
from recsys_embed.kernels.native.autograd import SingleLookup
from recsys_embed.kernels.native.lookup import NativeLookup
from recsys_embed.models import build_model
from tests.hostile.files import seal, take_apart

SCHEMA = rse.Schema([rse.FeatureSpec("a", 100, 8), rse.FeatureSpec("b", 50, 8)])
IDS = torch.arange(50).unsqueeze(1).expand(50, 2)
needs_fbgemm = pytest.mark.skipif(fbgemm.why_not() is not None, reason="FBGEMM is not installed")


def _collection(method: str) -> rse.EmbeddingCollection:
    return rse.EmbeddingCollection(SCHEMA, rse.Plan.uniform(SCHEMA, method, budget="3KiB"))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("fbgemm", marks=needs_fbgemm)])
def test_a_collection_reads_by_the_backend_it_names(tmp_path: Path, precision: str, backend: str, monkeypatch) -> None:
    source = _collection("hash")
    rse.export(source, tmp_path / "c", precision)  # type: ignore[arg-type]
    served = rse.load(tmp_path / "c", backend=backend)  # type: ignore[arg-type]
    wanted = rse.load(tmp_path / "c")(IDS)
    assert served.backend == backend
    read: list[int] = []
    whole = fbgemm.RowReader._whole
    monkeypatch.setattr(fbgemm.RowReader, "_whole", lambda self, *args: read.append(1) or whole(self, *args))
    assert torch.equal(served(IDS), wanted)
    assert bool(read) == (backend == "fbgemm")
    assert not served.bundle.batched  # the compiled kernels are not even at hand


@pytest.mark.parametrize("kind", ["embedding", "model", "state"])
def test_torch_is_honoured_by_every_kind_of_file(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ranker(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.item = torch.nn.Embedding(100, 8)

        def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return self.item(ids)

    config = rse.get_method("hash").config_cls.from_params({"num_buckets": 9})
    model: torch.nn.Module
    if kind == "embedding":
        model = rse.make_embedding("hash", 100, 8, num_buckets=9)
    elif kind == "model":
        model = build_model("dnn", SCHEMA, rse.Plan({"a": config, "b": config}), num_dense=0)
    else:
        model = Ranker()
        rse.compress_(model, {"item": config})
    rse.export(model, tmp_path / "m")
    into = {"into": Ranker()} if kind == "state" else {}
    arguments = (IDS,) if kind == "embedding" else (torch.zeros(50, 0), IDS)
    called: list[str] = []
    for cls, name in ((NativeLookup, "_call"), (SingleLookup, "__call__")):
        run = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda self, *args, _run=run: called.append("native") or _run(self, *args))
    native = any(b.name == "native" and b.available for b in available_backends())
    wanted = model.eval()(*arguments).detach()
    for backend in ("auto", "torch"):
        called.clear()
        served = rse.load(tmp_path / "m", backend=backend, **into)  # type: ignore[arg-type]
        torch.testing.assert_close(served(*arguments), wanted)
        assert bool(called) == (backend == "auto" and native), backend


@needs_fbgemm
def test_fbgemm_refuses_files_that_it_cannot_read(tmp_path: Path) -> None:
    narrow = rse.make_embedding("full", 100, 4)
    rse.export(narrow, tmp_path / "e", "int8")
    with pytest.raises(BackendError, match="can read no table"):
        rse.load(tmp_path / "e", backend="fbgemm")
    model = torch.nn.ModuleDict({"t": torch.nn.Embedding(9, 4)})
    rse.export(model, tmp_path / "m", "int8")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(BackendError):
        rse.load(tmp_path / "m", into=model, backend="fbgemm")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


@needs_fbgemm
def test_a_map_of_rows_that_dwarfs_the_file_is_refused(tmp_path: Path) -> None:
    table = torch.nn.Embedding(2000, 8, _weight=torch.zeros(2000, 8))
    with torch.no_grad():
        table.weight[7] = 1.0
    rse.export(table, tmp_path / "e", "int8")
    assert rse.load(tmp_path / "e", backend="fbgemm")(torch.tensor([7, 8])).sum(1).tolist() == [8.0, 0.0]
    manifest, *rest = take_apart(tmp_path / "e")
    manifest["tables"]["weight"]["rows"] = 1 << 30
    with pytest.raises(BackendError, match=r"takes 4.00 GiB .* use backend 'auto'"):
        rse.load(seal(tmp_path / "huge", manifest, *rest), backend="fbgemm")
