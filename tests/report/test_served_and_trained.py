"""Bytes to serve and bytes to train are told apart: by plans, modules, files, reports and compressions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema, compress_, materialize_, memory_report
from recsys_embed.core.precision import Precision
from recsys_embed.train.rounded_rows import rounded_rows

SCHEMA = Schema([FeatureSpec("a", 2000, 16), FeatureSpec("b", 300, 16)])
CASES: list[tuple[str, dict[str, Any]]] = [
    ("full", {"precision": "int8"}),
    ("full", {"precision": "int8", "quantization": "lpt"}),
    ("lowdim", {"precision": "int4", "dim": 4}),
    ("tiered", {"blocks": (5, 100)}),
    ("tiered", {"blocks": (5,), "precisions": ("int8", "dropped"), "order": "counts"}),
]
METHODS = pytest.mark.parametrize(("method", "options"), CASES, ids=lambda v: v if isinstance(v, str) else "")


def made(method: str, options: dict[str, Any], kind: str) -> Any:
    if kind == "collection":
        return EmbeddingCollection(SCHEMA, Plan.uniform(SCHEMA, method, **options))
    return rse.make_embedding(method, 2000, 16, **options)


def held_by(module: nn.Module) -> int:
    """Bytes of everything that a module's state holds."""
    return sum(v.nbytes for k, v in module.state_dict().items() if not k.endswith("_extra_state"))


@METHODS
@pytest.mark.parametrize("kind", ["collection", "drop-in"])
@pytest.mark.parametrize("precision", [None, "fp32", "fp16", "int2"])
def test_a_file_is_told_as_it_is_served_whatever_its_plan_says(
    method: str, options: dict[str, Any], kind: str, precision: Precision | None, tmp_path: Path
) -> None:
    module = made(method, options, kind)
    written = rse.export(module, tmp_path / "e", precision, prune=False)
    assert memory_report(module, precision=precision).total("serve") == written.embedding_bytes
    assert memory_report(tmp_path / "e").footprint.train == written.embedding_bytes
    said = module.footprint()
    assert said.serve + said.unrounded == held_by(module)
    if precision is None:
        assert said.serve == written.embedding_bytes
    served: Any = rse.load(tmp_path / "e")
    # What heads multiply by is float32 again once it is loaded.
    matrices = {t.name for p in (served.bundle.programs.values() if kind == "collection" else [served.program])
                for t in p.tables if t.dense}  # fmt: skip
    if precision == "fp32" or not matrices:
        assert served.footprint().serve == written.embedding_bytes
    assert served.footprint().serve == served.footprint().train
    loaded = memory_report(served)
    assert loaded.total("serve") == loaded.footprint.serve == served.footprint().serve
    assert loaded.footprint.unrounded == 0


@METHODS
def test_a_report_is_the_sum_of_both_numbers(method: str, options: dict[str, Any]) -> None:
    plan = Plan.uniform(SCHEMA, method, **options)
    module, optimizer = EmbeddingCollection(SCHEMA, plan, rse.RowwiseAdagrad(lr=0.1)), rse.RowwiseAdagrad(lr=0.1)
    for report in (memory_report(module), memory_report(plan, schema=SCHEMA, optimizer=optimizer)):
        assert replace(report.footprint, gradient=0) == plan.footprint(SCHEMA, optimizer)
        assert (report.footprint.serve, report.footprint.train) == (report.total("serve"), report.total("train"))
        totals = report.to_dict()["totals"]
        assert totals["weights"] + totals["index"] == report.footprint.serve + report.footprint.unrounded
    assert memory_report(plan, schema=SCHEMA, precision="fp16").footprint.serve == memory_report(
        plan, schema=SCHEMA, precision="fp16"
    ).total("serve")


@METHODS
def test_a_compression_tells_what_is_held_and_what_will_be_served(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    def model() -> nn.ModuleDict:
        return nn.ModuleDict({"a": nn.Embedding(2000, 16), "b": nn.Embedding(300, 16), "top": nn.Linear(2, 1)})

    target = model()
    report = compress_(target, Plan.uniform(SCHEMA, method, **options), init="fresh")
    assert report.bytes_before == 2300 * 64
    assert report.bytes_after == rse.export(target, tmp_path / "e", prune=False).embedding_bytes
    assert report.bytes_held == held_by(target) - 12
    assert report.to_dict()["bytes_held"] == report.bytes_held
    assert ("the model itself holds" in str(report)) == (report.bytes_held != report.bytes_after)
    # As found: what was compressed before counts as it would be served.
    again = materialize_(target)
    assert (again.bytes_before, again.bytes_after) == (report.bytes_after, 2300 * 64)


def test_rows_of_a_file_are_not_rounded_to_its_plan_when_they_are_measured(tmp_path: Path) -> None:
    module = made("full", {"precision": "int2"}, "collection")
    ids = torch.tensor([[3, 7], [1999, 299]])
    with rounded_rows(module):
        rounded: Tensor = module(ids).detach()
    assert not torch.equal(rounded, module(ids))
    rse.export(module, tmp_path / "e", "fp32")
    served: Any = rse.load(tmp_path / "e")
    with rounded_rows(served):
        assert torch.equal(served(ids), module(ids))
