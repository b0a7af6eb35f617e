"""Errors that an export states are those of what is loaded, counted over all elements of the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed.exports import export, load
from recsys_embed.exports.report import TableOutcome


def check(stated: TableOutcome, wanted: Tensor, got: Tensor) -> None:
    off = got.double() - wanted.double()
    values = [off.abs().max().item(), off.square().mean().sqrt().item(), wanted.double().square().mean().sqrt().item()]
    assert [stated.max_error, stated.rms_error, stated.rms] == pytest.approx(values, rel=3e-5)
    assert stated.max_error >= values[0] * (1 - 1e-6)


@pytest.mark.parametrize("zeros", ["none", "rows", "columns"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_of_a_table(precision: Any, zeros: str, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    emb = rse.make_embedding("full", 3000, 20, init="normal:2")
    with torch.no_grad():
        if zeros == "rows":
            emb.weight[torch.rand(3000, generator=g) < 0.6] = 0
        elif zeros == "columns":
            emb.weight[:, torch.tensor([0, 3, 4, 7, 8, 11, 12, 13, 19])] = 0
    wanted = emb.weight.detach().clone()
    report = export(emb, tmp_path / "m", precision)
    (stated,) = report.tables
    assert stated.kept_columns == (11 if zeros == "columns" else 20)
    assert stated.kept_rows == (int(wanted.any(1).sum()) if zeros == "rows" else 3000)
    served = load(tmp_path / "m")
    got: Tensor = served(torch.arange(3000)).detach()
    check(stated, wanted, got)
    if zeros == "columns":
        assert torch.equal(got != 0, (got != 0) & (wanted != 0)), "columns stay where they were"
        torch.testing.assert_close(got, wanted, atol=1.2 if precision == "int4" else 0.05, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_of_a_projection(precision: Any, tmp_path: Path) -> None:
    emb = rse.make_embedding("lowdim", 3000, 32, dim=8, init="normal:2")
    report = export(emb, tmp_path / "m", precision)
    (stated,) = (t for t in report.tables if t.form == "whole")
    key = next(name for name, value in emb.named_parameters() if value.numel() == 8 * 32)
    wanted = emb.get_parameter(key).detach()
    half = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, torch.float16)
    check(stated, wanted, wanted.to(half))
    assert (stated.rms_error == 0) is (precision == "fp32")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_ids_of_any_form_read_what_torch_reads(precision: Any, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    emb = rse.make_embedding("full", 3000, 20, init="normal:2")
    with torch.no_grad():
        emb.weight[torch.rand(3000, generator=g) < 0.6] = 0
    export(emb, tmp_path / "m", precision)
    served, plain = load(tmp_path / "m"), load(tmp_path / "m", backend="torch")
    ids = torch.randint(0, 3000, (7, 64), generator=g)
    rows = plain(torch.arange(3000))
    for form in (ids, ids.int(), ids.t(), ids[:, ::3], ids.expand(2, 7, 64), ids[:0]):
        for module in (served, plain):
            assert torch.equal(module(form), rows[form.long()])
    for bad in (3000, -1, 2**31, 2**40):
        for module in (served, plain):
            with pytest.raises(IndexError, match=str(bad)):
                module(torch.tensor([0, bad]))
