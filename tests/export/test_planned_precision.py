"""A plan says the precision of every table: its bytes, the file, what is served and what reports say follow it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.precision import FLOATS, Layout, Precision
from recsys_embed.errors import ConfigError, RecsysEmbedError
from recsys_embed.registry import MethodInfo, list_methods
from recsys_embed.report.memory import memory_report

PRECISIONS = get_args(Precision)
SCHEMA = Schema(
    [FeatureSpec("a", 200, 16), FeatureSpec("b", 900, 16), FeatureSpec("c", 60, 8), FeatureSpec("d", 90, 4)]
)
METHODS = pytest.mark.parametrize("method", list_methods(), ids=lambda m: m.name)


def at(plan: Plan, *precisions: Any) -> Plan:
    """The plan with a precision per feature, in turns."""
    chosen = zip(plan.configs.items(), precisions * len(plan), strict=False)
    return Plan({name: dataclasses.replace(config, **option(config, p)) for (name, config), p in chosen})


def option(config: MethodConfig, precision: Any) -> dict[str, Any]:
    """The precision of a configuration, or of the first of its tables, where these have their own."""
    if config.has_own_precisions:
        return {"precisions": (precision, *config.precisions[1:])}
    return {"precision": precision}


def plan_of(method: MethodInfo) -> Plan:
    try:
        return Plan.uniform(SCHEMA, method.name, budget="12KiB")
    except RecsysEmbedError:
        return Plan.full(SCHEMA)


def ids_of(schema: Schema, batch: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randint(0, s.num_embeddings, (batch,), generator=generator) for s in schema], 1)


@METHODS
def test_every_method_mixes_precisions(method: MethodInfo, tmp_path: Path) -> None:
    plan = plan_of(method)
    shares = any(t.shared for name in plan for t in plan[name].program(SCHEMA[name]).tables)
    if any(plan[name].computes for name in plan):
        pytest.skip("computes its vectors")
    mixed = at(plan, "int4") if shares else at(plan, "int8", "fp32", "int2", "fp8")
    assert Plan.from_dict(mixed.to_dict()) == mixed
    plain, source = EmbeddingCollection(SCHEMA, plan), EmbeddingCollection(SCHEMA, mixed, rse.RowwiseAdagrad(lr=0.1))
    ids = ids_of(SCHEMA)
    assert torch.equal(plain(ids), source(ids)), "precision is for what is served"
    source(ids).square().sum().backward()
    source.eval()
    stated = mixed.footprint(SCHEMA, source.optimizer)
    assert dataclasses.replace(source.footprint(), gradient=0) == stated
    assert stated.train == plan.footprint(SCHEMA, source.optimizer).train, "rows train unrounded"
    report = rse.export(source, tmp_path / "c", prune=False)
    assert report.embedding_bytes == stated.serve == memory_report(mixed, schema=SCHEMA).total("serve")
    kinds = {t.name: t.kind for t in report.tables}
    for key, table in mixed.tables(SCHEMA).items():
        if not table.dense:
            assert kinds[key] == table.precision
    matrices = [t for t in mixed.tables(SCHEMA).values() if t.dense]
    served, torchs = (rse.load(tmp_path / "c", backend=backend) for backend in ("auto", "torch"))
    # What heads multiply by is float32 again once it is loaded.
    assert served.footprint().serve == stated.serve + sum(4 * t.elements - t.nbytes() for t in matrices)
    torch.testing.assert_close(served(ids), torchs(ids), rtol=1e-6, atol=1e-6)
    assert served.plan == mixed
    again = rse.export(served, tmp_path / "again", prune=False)
    assert {t.name: t.kind for t in again.tables} == kinds


@given(
    precisions=st.lists(st.sampled_from(PRECISIONS), min_size=4, max_size=4),
    rows=st.lists(st.integers(1, 300), min_size=4, max_size=4),
    widths=st.lists(st.sampled_from([1, 3, 8, 12, 16, 20]), min_size=4, max_size=4),
)
def test_what_is_served_is_each_table_rounded(precisions: Any, rows: Any, widths: Any, tmp_path_factory: Any) -> None:
    specs = [FeatureSpec(f"f{i}", n, w) for i, (n, w) in enumerate(zip(rows, widths, strict=True))]
    schema = Schema(specs)
    source = EmbeddingCollection(schema, at(Plan.full(schema), *precisions))
    path = tmp_path_factory.mktemp("c") / "c"
    rse.export(source, path, search="minmax", prune=False)
    ids = ids_of(schema)
    got = rse.load(path)(ids).flatten(1).split(widths, 1)
    for i, (spec, precision) in enumerate(zip(schema, precisions, strict=True)):
        table = source.table(f"{spec.name}.weight").detach()
        layout = Layout.of(spec.embedding_dim, precision, rows=len(table))
        wanted = layout.decode(layout.encode(table))[ids[:, i]]
        torch.testing.assert_close(got[i], wanted, rtol=1e-6, atol=1e-7)


def test_plans_without_a_precision_are_what_they_were(tmp_path: Path) -> None:
    plan = Plan.full(SCHEMA)
    assert all("precision" not in entry for entry in plan.to_dict()["features"].values())
    source = EmbeddingCollection(SCHEMA, plan)
    assert source.storages == ("width16", "width8", "width4")
    assert rse.export(source, tmp_path / "c").precision == "fp32"
    halves = rse.export(EmbeddingCollection(SCHEMA, plan, dtype=torch.bfloat16), tmp_path / "h")
    assert {t.kind for t in halves.tables} == {"bf16"}


def test_a_precision_given_to_export_is_that_of_all(tmp_path: Path) -> None:
    source = EmbeddingCollection(SCHEMA, at(Plan.full(SCHEMA), "int8", "fp32", "int2", "fp8"))
    report = rse.export(source, tmp_path / "c", "fp16")
    assert ({t.kind for t in report.tables}, report.precision) == ({"fp16"}, "fp16")
    assert rse.export(source, tmp_path / "c").precision == "planned"
    assert rse.export(EmbeddingCollection(SCHEMA, at(Plan.full(SCHEMA), "int8")), tmp_path / "c").precision == "int8"


def test_a_drop_in_is_sized_and_served_at_its_precision(tmp_path: Path) -> None:
    module = rse.make_embedding("hash", 10_000, 16, budget="10KiB", precision="int8")
    assert module.config.num_buckets == 512  # 20 bytes a row
    assert module.footprint().serve == 10_240
    assert module.footprint().train == 512 * 64
    report = rse.export(module, tmp_path / "e")
    assert report.embedding_bytes == 10_240
    ids = torch.arange(999)
    assert 0 < (rse.load(tmp_path / "e")(ids) - module(ids)).abs().max() <= report.max_error


@METHODS
@pytest.mark.parametrize("width", [16, 6])
def test_reports_of_drop_ins_tell_the_bytes_of_rounded_rows(method: MethodInfo, width: int, tmp_path: Path) -> None:
    try:
        module = rse.make_embedding(method.name, 900, width, budget="18KiB", precision="int8")
    except ConfigError:
        pytest.skip("computes its vectors")
    told = memory_report(module)
    written = rse.export(module, tmp_path / "e", prune=False).embedding_bytes
    assert told.total("serve") == module.footprint().serve == written


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="int9"):
        rse.make_embedding("full", 10, 4, precision="int9")
    unified = Plan.uniform(SCHEMA, "unified", budget="12KiB", full_below=0)
    with pytest.raises(ConfigError, match="int8"):
        at(unified, "int8", "fp32").footprint(SCHEMA)


def test_a_file_of_any_precision_becomes_one_of_any_other(tmp_path: Path) -> None:
    schema = Schema([FeatureSpec("user", 200, 16), FeatureSpec("tag", 200, 6)])
    collection = EmbeddingCollection(schema, Plan.uniform(schema, "full"), None)
    ids = torch.arange(200)[:, None].expand(-1, 2)
    # Squared errors relative to those of the rows, of normal numbers, with room for what the first rounding left.
    errors = {"fp32": 0, "fp16": 1e-7, "bf16": 6e-6, "fp8": 1.5e-3, "int8": 5e-5, "int4": 8e-3, "int2": 0.12}
    for first in errors:
        rse.export(collection, tmp_path / "first.safetensors", precision=first)
        served = rse.load(tmp_path / "first.safetensors")
        rows = served(ids)
        for second, error in errors.items():
            rse.export(served, tmp_path / "second.safetensors", precision=second)
            again = rse.load(tmp_path / "second.safetensors")(ids)
            for name, before, after in zip(
                schema.names, rows.split([16, 6], -1), again.split([16, 6], -1), strict=True
            ):
                lost = float((after - before).double().square().mean() / before.double().square().mean())
                assert lost <= error, (first, second, name, lost)
                if first == second:
                    assert torch.equal(after, before), (first, name)
                if second in ("fp16", "bf16"):
                    assert torch.equal(after, before.to(FLOATS[second]).float()), (first, second, name)
