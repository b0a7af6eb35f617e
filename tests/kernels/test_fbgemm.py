"""What FBGEMM does here: it reads quantised rows of exports; as a backend to train on, it is a name of old files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Schema
from recsys_embed.core.precision import Layout
from recsys_embed.errors import IdRangeError
from recsys_embed.kernels import dispatch, fbgemm
from recsys_embed.models import build_model

WHY = fbgemm.why_not()
needs_fbgemm = pytest.mark.skipif(WHY is not None, reason=f"fbgemm: {WHY}")


def ids_of(schema: Schema, batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, s.num_embeddings, (batch,), generator=generator) for s in schema], 1)


def bags_of(schema: Schema, batch: int, seed: int = 0, longest: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (len(schema), batch), generator=generator)
    values = [
        torch.randint(0, s.num_embeddings, (int(n),), generator=generator)
        for s, n in zip(schema, lengths.sum(1), strict=True)
    ]
    return torch.cat(values), torch.nn.functional.pad(lengths.flatten().cumsum(0), (1, 0))


def test_as_a_backend_it_warns_and_runs_what_auto_picks(tmp_path: Path) -> None:
    schema = Schema([FeatureSpec("a", 60, 8), FeatureSpec("b", 300, 8)])
    auto = EmbeddingCollection(schema, optimizer=rse.Adam(lr=0.1))
    with pytest.warns(DeprecationWarning, match="no longer looks up or trains.*'auto' picks runs instead"):
        named = EmbeddingCollection(schema, optimizer=rse.Adam(lr=0.1), backend="fbgemm", seed=1)
    assert named.backend == auto.backend
    assert "fbgemm" not in {b.name for b in dispatch.available_backends()}
    # Weights and state of a backend are those of every other, so what it wrote goes on here.
    auto(ids_of(schema, 30)).square().sum().backward()
    torch.save([auto.state_dict(), auto.optimizer_state_dict()], tmp_path / "old.pt")
    state, steps = torch.load(tmp_path / "old.pt")
    named.load_state_dict(state)
    named.load_optimizer_state_dict(steps)
    for coll in (auto, named):
        coll(ids_of(schema, 30, 1)).square().sum().backward()
    assert torch.equal(named.width8, auto.width8)


def test_a_training_run_that_names_it_still_runs() -> None:
    schema = Schema([FeatureSpec("a", 60, 8), FeatureSpec("b", 300, 8)])
    with pytest.warns(DeprecationWarning, match="'fbgemm'"):
        model = build_model(
            "fm", schema, rse.Plan.full(schema), optimizer=rse.SGD(lr=0.1), backend="fbgemm", num_dense=0
        )
    model(torch.zeros(5, 0), ids_of(schema, 5)).sum().backward()


@needs_fbgemm
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4", "int2"])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.01], ids=lambda k: f"kept {k}")
def test_exports_are_served_by_its_inference_tables(
    precision: Any, kept: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = Schema([FeatureSpec("a", 3000, 16), FeatureSpec("b", 40, 16), FeatureSpec("c", 700, 16)])
    coll = EmbeddingCollection(schema)
    with torch.no_grad():
        table = coll.table("a.weight")
        table[torch.rand(len(table), generator=torch.Generator().manual_seed(0)) >= kept] = 0.0
    rse.export(coll, tmp_path / "c.safetensors", precision=precision)
    ours, plain = (rse.load(tmp_path / "c.safetensors", backend=b) for b in ("fbgemm", "torch"))
    ids = torch.cat([ids_of(schema, 500), torch.tensor([[2999, 39, 699], [0, 0, 0]])])
    torch.testing.assert_close(ours(ids), plain(ids), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours(*bags_of(schema, 20)), plain(*bags_of(schema, 20)), rtol=1e-6, atol=1e-6)
    with pytest.raises(IdRangeError, match="'b'"):
        ours(torch.tensor([[0, 40, 0]]))
    for name in plain.storages if plain.served is not None else ():
        stored, other = ours.served[name], plain.served[name]
        pruned = any(p.form != "all" for p in stored.parts)
        assert (stored.places is not None) == pruned
        assert stored.nbytes == other.nbytes + 4 * stored.rows * pruned, "what indices take is counted"
        assert ours.footprint().index - plain.footprint().index == 4 * stored.rows * pruned
        # It is FBGEMM that reads: torch decodes the last rows at most, whose registers would end beyond the table.
        monkeypatch.setattr("recsys_embed.kernels.stored_tables.positions", None)
        monkeypatch.setattr(Layout, "decode", lambda self, rows: pytest.fail("decoded by torch"))
        stored(torch.arange(100))


@needs_fbgemm
def test_rows_that_do_not_exist_are_refused_before_the_kernel() -> None:
    layout = Layout("int8", 16)
    reader = fbgemm.RowReader(layout)
    data = layout.encode(torch.randn(100, 16))
    places = torch.tensor([-1, 3, 99], dtype=torch.int32)
    got = reader.remapped(data, torch.tensor([2, 0, 1]), places)
    assert torch.equal(got, torch.cat([layout.decode(data[99:]), torch.zeros(1, 16), layout.decode(data[3:4])]))
    for bad in (-1, 3, 2**40):
        with pytest.raises(IndexError, match=r"rows must be in \[0, 3\)"):
            reader.remapped(data, torch.tensor([0, bad]), places)
    with pytest.raises(IndexError, match=r"rows must be in \[0, 100\)"):
        reader(data, torch.tensor([100]))
    assert reader.remapped(data[:2], torch.tensor([0, 0]), places).eq(0).all(), "all of a small table"


@needs_fbgemm
@pytest.mark.parametrize("kind", ["INT8", "INT4", "INT2", "FP16"])
def test_pruned_tables_are_read_as_its_own_module_reads_them(kind: str) -> None:
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    layout = Layout(kind.lower(), 16)
    data = layout.encode(torch.randn(300, 16))
    places = torch.full((1000,), -1, dtype=torch.int32)
    places[torch.randperm(1000)[:300].sort()[0]] = torch.arange(300, dtype=torch.int32)
    theirs = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("t", 300, 16, getattr(SparseType, kind), EmbeddingLocation.HOST)],
        device="cpu",
        output_dtype=SparseType.FP32,
        index_remapping=[places],
        row_alignment=1,
    )
    theirs.initialize_weights()
    theirs.split_embedding_weights(split_scale_shifts=False)[0][0].copy_(data.view(torch.uint8))
    rows = torch.randint(0, 1000, (700,))
    got = fbgemm.RowReader(layout).remapped(data, rows, places)
    assert torch.equal(got, theirs(rows.int(), torch.arange(701, dtype=torch.int32)))
    assert bool((got == 0).all(1).eq(places[rows] < 0).all()), "absent rows are zeros, and no others"
