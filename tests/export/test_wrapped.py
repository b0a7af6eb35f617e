"""Models in wrappers, embeddings with tensors of their users', and tables that stand in no embedding module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import recsys_embed as rse
from recsys_embed.discover import bare_tables, find_tables
from recsys_embed.errors import CheckpointError, ConfigError

U, J = torch.arange(6), torch.arange(6) * 7


class Ranker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item, self.head = nn.Embedding(2000, 16), nn.Embedding(500, 16), nn.Linear(32, 1)

    def forward(self, u: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.user(u), self.item(i)], 1))


def _compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAP: dict[str, Callable[[nn.Module], Any]] = {
    "compile": _compiled,
    "data parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(_compiled(model)),
}
HASH = rse.get_method("hash").config_cls.from_params({"num_buckets": 50})


@pytest.mark.parametrize("name", WRAP)
def test_wrappers_leave_no_prefix_in_plans_reports_and_files(name: str, tmp_path: Path) -> None:
    model, wrap = Ranker(), WRAP[name]
    wrapped = wrap(model)
    assert [t.name for t in find_tables(wrapped)] == ["user", "item"]
    assert rse.Schema.from_model(wrapped).names == ("user", "item")
    plain, seen = (str(rse.memory_report(m)).splitlines()[1:] for m in (model, wrapped))
    assert plain == seen
    rse.export(wrapped, tmp_path / "m")
    assert torch.equal(rse.load(tmp_path / "m", into=Ranker())(U, J), model(U, J))
    into = wrap(Ranker())
    assert rse.load(tmp_path / "m", into=into) is into
    assert torch.equal(into(U, J), model(U, J))


@pytest.mark.parametrize("name", WRAP)
def test_wrappers_of_a_part_leave_no_prefix_either(name: str, tmp_path: Path) -> None:
    def build(wrap: Callable[[nn.Module], Any]) -> Any:
        tower = Ranker()
        tower.scores = nn.Linear(16, 500, bias=False)
        tower.scores.weight = tower.item.weight
        return nn.ModuleDict({"tower": wrap(tower), "out": nn.Linear(1, 1)})

    def run(model: Any) -> torch.Tensor:
        out: torch.Tensor = model["out"](model["tower"](U, J))
        return out

    plain, wrapped = build(lambda model: model), build(WRAP[name])
    assert rse.Schema.from_model(wrapped).names == ("tower/user", "tower/item")
    for seen in (find_tables, lambda model: str(rse.memory_report(model)).splitlines()[1:]):
        assert str(seen(plain)) == str(seen(wrapped))
    for source, target in ((plain, wrapped), (wrapped, plain)):
        for precision in ("fp32", "int8"):
            rse.export(source, tmp_path / "m", precision)  # type: ignore[arg-type]
            into = build(WRAP[name] if target is wrapped else lambda model: model)
            rse.load(tmp_path / "m", into=into)
            torch.testing.assert_close(run(into), run(source), rtol=0, atol=0.0 if precision == "fp32" else 0.05)
    if name == "compile":
        rse.compress_(wrapped, {"tower/_orig_mod/user": HASH, "tower.item": HASH}, init="fresh")
        rse.export(wrapped, tmp_path / "m")
        assert torch.equal(run(rse.load(tmp_path / "m", into=build(lambda model: model))), run(wrapped))


def test_a_load_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    rse.export(Ranker(), tmp_path / "m", "int8")
    into = Ranker()
    modules, state = list(into.modules()), {k: v.clone() for k, v in into.state_dict().items()}

    def fail(*args: Any) -> None:
        raise RuntimeError("stop")

    into.register_load_state_dict_post_hook(fail)
    with pytest.raises(CheckpointError, match="stop"):
        rse.load(tmp_path / "m", into=into)
    assert all(a is b for a, b in zip(into.modules(), modules, strict=True))
    assert all(torch.equal(v, state[k]) for k, v in into.state_dict().items())


def test_a_compiled_model_is_compressed_before_and_after_its_first_call() -> None:
    for first in (False, True):
        model = Ranker()
        wrapped = _compiled(model)
        if first:
            wrapped(U, J)
        rse.compress_(wrapped, {"user": HASH, "item": HASH}, init="fresh")
        assert isinstance(model.user, rse.HashEmbedding)
        assert torch.equal(wrapped(U, J), model(U, J))
        rse.materialize_(wrapped)
        assert torch.equal(wrapped(U, J), model(U, J))


def test_compiled_tables_and_parallel_models_are_refused_by_name() -> None:
    model = Ranker()
    model.user.compile(backend="eager")
    with pytest.raises(ConfigError, match="'user' was compiled in place"):
        rse.compress_(model, {"user": HASH, "item": HASH})
    model = Ranker()
    model.user = _compiled(model.user)
    with pytest.raises(ConfigError, match=r"user is an embedding wrapped by torch\.compile"):
        rse.compress_(model, {t.name: HASH for t in find_tables(model)})
    with pytest.raises(ConfigError, match="DataParallel, which holds on"):
        rse.compress_(nn.DataParallel(Ranker()), {"user": HASH, "item": HASH})


class Scaled(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(500, 16)
        self.register_buffer("scale", torch.tensor(8.1))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.scale


class Over(nn.Module):
    def __init__(self, inner: nn.Module, scale: torch.Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("scale", scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids) * self.scale


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_compress_accepts_export_accepts(precision: Any, tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(Scaled(), nn.Linear(16, 1))
        rse.compress_(model, {"0": HASH}, init="fresh", subclasses={Scaled: lambda old, new: Over(new, old.scale)})
        return model

    model = build()
    rse.export(model, tmp_path / "m", precision)
    served = rse.load(tmp_path / "m", into=build())
    torch.testing.assert_close(served(U), model(U), atol=0.1 if precision == "int8" else 0.0, rtol=0.0)
    assert torch.equal(served.get_buffer("0.inner.scale"), torch.tensor(8.1))


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "int8", "fp16"])
def test_buffers_of_users_come_back_as_they_were(precision: Any, compressed: bool, tmp_path: Path) -> None:
    def build() -> nn.Module:
        table = nn.Embedding(500, 16)
        table.register_buffer("popularity", torch.rand(500))
        table.register_buffer("seen", torch.arange(3))
        return nn.Sequential(table, nn.Linear(16, 1))

    model = build()
    if compressed:
        rse.compress_(model, {"0": HASH})
    rse.export(model, tmp_path / "m", precision)
    without = nn.Sequential(nn.Embedding(500, 16), nn.Linear(16, 1))
    for into in (build(), without):
        served = rse.load(tmp_path / "m", into=into)
        torch.testing.assert_close(served(U), model(U), atol=0.03, rtol=0)
        for name in ("popularity", "seen"):
            assert torch.equal(served.get_buffer(f"0.{name}"), model.get_buffer(f"0.{name}"))


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Parameter(torch.randn(20_000, 16)), nn.Embedding(9000, 16)
        self.out = nn.Linear(16, 5000)

    def forward(self, u: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return (self.user[u] * self.item(i)).sum(1)


def test_tables_that_are_bare_parameters_are_named() -> None:
    model = Half()
    assert [(t.name, t.rows, t.width, t.nbytes) for t in bare_tables(model)] == [("user", 20_000, 16, 1_280_000)]
    assert "user, a parameter 20000 x 16" in str(rse.memory_report(model))
    plan = rse.plan_for_budget(model, "100KiB")
    assert plan.notes is not None
    assert any(text.startswith("user, a parameter") for text in plan.notes.left_out)
    report = rse.compress_(model, plan, init="fresh")
    assert "user, a parameter" in str(report)
    assert report.to_dict()["notes"] == list(report.notes)
    graph = nn.ParameterDict({"user": torch.randn(20_000, 16), "item": torch.randn(9000, 16)})
    with pytest.raises(ConfigError, match=r"it has none; item, a parameter .* user, a parameter"):
        rse.plan_for_budget(graph, "400KiB")
    tied = nn.Module()
    tied.table = nn.Embedding(5000, 8)
    tied.register_parameter("again", tied.table.weight)
    assert not bare_tables(tied)
    assert not bare_tables(nn.Sequential(nn.Embedding(5000, 8), nn.Linear(8, 5000)))
