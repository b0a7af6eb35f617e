"""Features that batched kernels do not know run on torch alone; the others stay fused, and both make one step."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema, registry
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.program import Initializer, LookupProgram, RowLookup, Table
from recsys_embed.core.transforms import Transform
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import BackendError
from recsys_embed.kernels import dispatch
from recsys_embed.kernels.native import library as native_library

needs_native = pytest.mark.skipif(isinstance(native_library.library(), str), reason="no native kernels")


@dataclass(frozen=True)
class Backwards(Transform):
    """The last id reads the first row."""

    size: int

    def signature(self) -> tuple[Any, ...]:
        return (Backwards,)

    def parameters(self) -> tuple[int, ...]:
        return (self.size,)

    @staticmethod
    def map(signature: Any, ids: Tensor, params: Sequence[Any], at: Any = 0, arrays: Any = None) -> Tensor:
        return params[0] - 1 - ids


@dataclass(frozen=True, kw_only=True)
class BackwardsConfig(MethodConfig):
    """A full table in another order."""

    method: ClassVar[str] = "backwards"
    together: bool = param(False, "one table for all features")

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        table = Table("weight", spec.num_ids, spec.embedding_dim, Initializer.plain(spec), shared=self.together)
        return LookupProgram((table,), (RowLookup("weight", Backwards(spec.num_ids)),))

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        return cls.from_params(params)


class BackwardsEmbedding(CompressedEmbedding):
    """Drop-in of backwards."""

    config_cls = BackwardsConfig


SCHEMA = Schema([FeatureSpec("a", 30, 8), FeatureSpec("b", 20, 8), FeatureSpec("c", 25, 8, pooling="mean")])
PLAN = Plan({**Plan.full(SCHEMA).configs, "b": BackwardsConfig()})
RULES = [None, rse.SGD(lr=0.1), rse.Adam(lr=0.1), rse.Adam(lr=0.1, weight_decay=0.1, rows="all")]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register(BackwardsEmbedding, paper="none")


@needs_native
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_one_foreign_transform_leaves_the_others_fused(rule: Any, caplog: pytest.LogCaptureFixture) -> None:
    dispatch.say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        ours = EmbeddingCollection(SCHEMA, PLAN, rule)
        EmbeddingCollection(SCHEMA, PLAN, rule)
    (line,) = [r.message for r in caplog.records]
    assert "feature 'b' runs on torch" in line
    assert "Backwards" in line
    assert ours.backend == "native"
    fused = ours.bundle.batched["native"]
    assert [ours.bundle.parts[p] for p in fused.rest] == [(1,)]
    assert sorted(i for part in fused.parts for i in part) == [0, 2]
    oracle = EmbeddingCollection(SCHEMA, PLAN, rule, backend="torch")
    bags = torch.tensor([1, 2, 29, 3, 19, 0, 24, 24, 1]), torch.tensor([0, 2, 3, 5, 6, 8, 9])
    for step, given in enumerate([(torch.tensor([[3, 5, 7], [29, 19, 24], [3, 0, 0]]),), bags] * 2):
        got, wanted = ours(*given), oracle(*given)
        torch.testing.assert_close(got, wanted, msg=f"step {step}")
        got.sin().sum().backward()
        wanted.sin().sum().backward()
    torch.testing.assert_close(ours.state_dict()["width8"], oracle.state_dict()["width8"])
    if rule is not None:
        saved, right = ours.optimizer_state_dict(), oracle.optimizer_state_dict()
        assert saved["steps"] == right["steps"] == {"width8": 4}
        for name, values in right["state"].items():
            torch.testing.assert_close(saved["state"][name], values)
    else:
        torch.testing.assert_close(ours.width8.grad, oracle.width8.grad)


@needs_native
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_compiled_models_run_both_to_the_same_bits(rule: Any) -> None:
    torch._dynamo.reset()
    plain = EmbeddingCollection(SCHEMA, PLAN, rule)
    assert plain.backend == "native"
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    ids = (torch.tensor([[3, 5, 7], [29, 19, 24], [3, 0, 0]]),)
    bags = torch.tensor([1, 2, 29, 3, 19, 0, 24, 24, 1]), torch.tensor([0, 2, 3, 5, 6, 8, 9])
    for given in (ids, ids, bags):
        got, wanted = compiled(*given), plain(*given)
        assert torch.equal(got, wanted)
        got.sin().sum().backward()
        wanted.sin().sum().backward()
    assert torch.equal(other.state_dict()["width8"], plain.state_dict()["width8"])
    if rule is not None:
        saved, right = other.optimizer_state_dict(), plain.optimizer_state_dict()
        assert saved["steps"] == right["steps"] == {"width8": 3}
        assert all(torch.equal(saved["state"][name], values) for name, values in right["state"].items())


@needs_native
def test_kernels_asked_for_by_name_refuse_it_and_say_what_to_do() -> None:
    with pytest.raises(BackendError, match=r"'b'.*Backwards.*'native'; 'auto' runs these on torch"):
        EmbeddingCollection(SCHEMA, PLAN, backend="native")


@needs_native
def test_features_of_one_table_are_stepped_together() -> None:
    """A row that both a fused feature and a foreign one read would else be stepped twice."""
    schema = Schema([replace(s, num_embeddings=20) for s in SCHEMA])

    @dataclass(frozen=True, kw_only=True)
    class ForwardsConfig(BackwardsConfig):
        method: ClassVar[str] = "forwards"

        def build_program(self, spec: FeatureSpec) -> LookupProgram:
            from recsys_embed.core.transforms import MixedRadixDigit

            program = super().build_program(spec)
            return replace(program, row_lookups=(RowLookup("weight", MixedRadixDigit()),))

    class ForwardsEmbedding(BackwardsEmbedding):
        config_cls = ForwardsConfig

    registry.register(ForwardsEmbedding, paper="none")
    plan = Plan({"a": ForwardsConfig(together=True), "b": BackwardsConfig(together=True), "c": Plan.full(schema)["c"]})
    colls = [EmbeddingCollection(schema, plan, rse.Adam(lr=0.1), backend=b) for b in ("auto", "torch")]
    assert [i for part in colls[0].bundle.batched["native"].parts for i in part] == [2]
    for coll in colls:
        for _ in range(2):
            coll(torch.tensor([[3, 16, 1], [4, 4, 2]])).square().sum().backward()
    torch.testing.assert_close(colls[0].width8, colls[1].width8)


@needs_native
def test_bags_pooled_by_maxima_leave_the_others_fused() -> None:
    schema = Schema([replace(s, pooling=p) for s, p in zip(SCHEMA, ("max", "sum", "mean"), strict=True)])
    colls = [EmbeddingCollection(schema, None, rse.Adam(lr=0.1), backend=b) for b in ("native", "torch")]
    assert [i for part in colls[0].bundle.batched_bags["native"].parts for i in part] == [1, 2]
    bags = torch.tensor([1, 2, 29, 3, 19, 0, 24, 24, 1]), torch.tensor([0, 2, 3, 5, 6, 8, 9])
    for coll in colls:
        for _ in range(2):
            coll(*bags).square().sum().backward()
    torch.testing.assert_close(colls[0].width8, colls[1].width8)
    torch.testing.assert_close(colls[0](*bags), colls[1](*bags))
