"""Rows that are computed: each distinct id of a batch once, with the steps that a lookup of every id makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.collection import lookup_bundle
from recsys_embed.core import heads
from recsys_embed.core.generators import TensorTrain
from recsys_embed.kernels.distinct_ids import DistinctIds
from recsys_embed.kernels.native import trains
from recsys_embed.methods.compositional import CompositionalConfig
from recsys_embed.methods.full import FullConfig
from recsys_embed.methods.hash import HashConfig
from recsys_embed.methods.tt import TtConfig, TtEmbedding

SPECS = [
    FeatureSpec("plain", 40, 12),
    FeatureSpec("train", 500, 12),
    FeatureSpec("hashed", 90, 12),
    FeatureSpec("path", 120, 12),
    FeatureSpec("other", 60, 12),
]
CONFIGS: dict[str, Any] = {
    "plain": FullConfig(),
    "train": TtConfig(ranks=(3, 4)),
    "hashed": HashConfig(num_buckets=20),
    "path": CompositionalConfig(num_collisions=4, combine="path", hidden=3),
    "other": TtConfig(ranks=(4,), order="least_significant"),
}
RULES = [rse.Adam(lr=0.01, eps=1e-3), rse.RowwiseAdagrad(lr=0.05), rse.Adam(lr=0.01, eps=1e-3, rows="all")]
BACKENDS = ("auto", "torch", "reference")


def _ids(seed: int, batch: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, min(s.num_embeddings, 25), (batch,), generator=generator) for s in SPECS], 1)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of ids whose vectors heads compute, call after call."""
    sizes: list[int] = []
    for cls in (TensorTrain, heads.PerClassNetwork):

        def counted(self: Any, columns: Tensor, *args: Any, apply: Any = cls.apply) -> Tensor:
            sizes.append(columns.shape[0])
            out: Tensor = apply(self, columns, *args)
            return out

        monkeypatch.setattr(cls, "apply", counted)
    run = trains._run

    def run_counted(head: Any, columns: Tensor, **others: Tensor) -> None:
        sizes.extend([columns.shape[0]] if "out" in others else [])
        run(head, columns, **others)

    monkeypatch.setattr(trains, "_run", run_counted)
    return sizes


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_distinct_id_is_computed_once(backend: Any, computed: list[int]) -> None:
    coll, ids = EmbeddingCollection(Schema(SPECS), Plan(CONFIGS), backend=backend), _ids(0)
    distinct = [len(ids[:, i].unique()) for i in (1, 3, 4)]
    coll(ids)
    assert sorted(computed) == sorted(distinct)
    computed.clear()
    bags = ids.t().reshape(-1), torch.arange(0, ids.numel() + 1, 2)
    coll(*bags)
    assert sorted(computed) == sorted(distinct)
    computed.clear()
    coll.lookup("train", ids[:, 1].view(8, 8))
    assert computed == distinct[:1]


def test_drop_ins_compute_each_distinct_id_once(computed: list[int]) -> None:
    emb = TtEmbedding(500, 12, ranks=(3, 3), padding_idx=2)
    ids = torch.tensor([[2, 7, 7], [9, 2, 7]])
    out = emb(ids)
    assert computed == [3]
    assert not out[0, 0].any()
    assert torch.equal(out[0, 1], out[1, 2])


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=["adam", "rowwise adagrad", "adam of all rows"])
def test_steps_are_those_of_every_id(rule: Any, shared: bool, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    specs, configs = list(SPECS), dict(CONFIGS)
    if shared:
        specs.append(FeatureSpec("again", 500, 12, table="train"))
        configs["again"] = configs["train"]
    schema, plan = Schema(specs), Plan(configs)
    ours = EmbeddingCollection(schema, plan, rule, backend=backend)
    oracle = EmbeddingCollection(schema, plan, rule, backend="torch", dtype=torch.float64)
    for seed in range(6):
        ids = _ids(seed)
        ids = torch.cat([ids, ids[:, 1:2].flip(0)], 1) if shared else ids
        given = (ids,) if seed % 3 else (ids.t().reshape(-1), torch.arange(0, ids.numel() + 1, 4))
        # The first steps are made at the end of backward, later ones within.
        ours(*given).square().sum().backward()
        with monkeypatch.context() as patch:
            patch.setattr(lookup_bundle, "distinct_ids", lambda ids: DistinctIds(ids, None))
            oracle(*given).square().sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), oracle.named_parameters(), strict=True):
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=1e-4, atol=1e-5, msg=name)


def test_the_native_kernels_step_them_beside_plain_tables() -> None:
    coll = EmbeddingCollection(Schema(SPECS), Plan(CONFIGS), rse.RowwiseAdagrad(lr=0.05))
    if coll.backend != "native":
        pytest.skip("needs the compiled kernels")
    assert not coll.bundle.batched["native"].mixed, "gradients of plain tables are not collected"


def test_a_graph_of_a_whole_model_computes_the_same() -> None:
    coll, ids = EmbeddingCollection(Schema(SPECS), Plan(CONFIGS)), _ids(1)
    exported = torch.export.export(coll.eval(), (ids,)).module()
    torch.testing.assert_close(exported(ids), coll(ids))
