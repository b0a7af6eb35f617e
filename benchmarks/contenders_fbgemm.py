"""FBGEMM's and TorchRec's ways to look up and train the tables of the benchmarks."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from contender import EPS, RATE, Contender, collection
from torch import Tensor
from workload import Case

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, Plan, RowwiseAdagrad
from recsys_embed.core.program import Hash, LookupProgram
from recsys_embed.methods.compositional import CompositionalConfig


def _tables(specs: list[tuple[int, int]], rule: str, owners: list[int] | None = None) -> Any:
    """FBGEMM's module over tables of rows and widths; ``owners`` say which table each feature reads."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    return SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, width in specs],
        feature_table_map=owners,
        optimizer=EmbOptimType[rule],
        learning_rate=RATE,
        eps=EPS,
        pooling_mode=PoolingMode.SUM,
    )


def _copy(like: EmbeddingCollection, tables: list[Tensor]) -> None:
    for spec, table in zip(like.schema, tables, strict=True):
        table.detach().copy_(like.table(f"{spec.name}.weight"))


def tbe(case: Case, ids: list[Tensor], like: EmbeddingCollection) -> Contender:
    """FBGEMM's module for plain tables, ids ordered as it wants them beforehand."""
    tables = _tables([(n, case.dim) for n in case.sizes], "EXACT_ROWWISE_ADAGRAD")
    _copy(like, tables.split_embedding_weights())
    flat = [i.T.contiguous().view(-1) for i in ids]
    offsets = [torch.arange(len(f) + 1) for f in flat]
    return Contender(lambda turn: tables(flat[turn], offsets[turn]))


def fused_ebc(case: Case, ids: list[Tensor], like: EmbeddingCollection) -> Contender:
    """TorchRec's fused collection for plain tables."""
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    keys = [f"C{i}" for i in range(1, len(case.sizes) + 1)]
    tables = FusedEmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=k, embedding_dim=case.dim, num_embeddings=n, feature_names=[k])
            for k, n in zip(keys, case.sizes, strict=True)
        ],
        optimizer_type=RowWiseAdagrad,
        optimizer_kwargs={"lr": RATE, "eps": EPS},
        device=torch.device("cpu"),
    )
    _copy(like, list(tables.state_dict().values()))
    flat = [i.T.contiguous().view(-1) for i in ids]
    ones, offsets = [torch.ones_like(f) for f in flat], [torch.arange(len(f) + 1) for f in flat]

    def forward(turn: int) -> Tensor:
        given = KeyedJaggedTensor(keys=keys, values=flat[turn], lengths=ones[turn], offsets=offsets[turn])
        return tables(given).values()

    return Contender(forward)


class Factors(CompositionalConfig):
    """The factors of products, side by side."""

    def program(self, spec: rse.FeatureSpec) -> LookupProgram:
        whole = super().program(spec)
        apart = [replace(p, column=i * spec.embedding_dim) for i, p in enumerate(whole.probes)]
        return replace(whole, probes=tuple(apart), combine="sum")


def index_tbe(case: Case, ids: list[Tensor], like: EmbeddingCollection) -> Contender:
    """Rows computed in torch, then summed by FBGEMM's tables, which read the factors of products for torch."""
    if case.method == "robe":
        return runs_tbe(case, ids, like)
    if case.params.get("combine") != "mul":
        return collection(case, "fbgemm", ids, like)
    composed = [isinstance(like.plan[s.name], CompositionalConfig) for s in like.schema]
    order = sorted(range(len(composed)), key=lambda i: not composed[i])
    features = [like.schema.features[i] for i in order]
    count, dim = sum(composed), case.dim
    plan = Plan(
        {
            s.name: Factors(**{f.name: getattr(like.plan[s.name], f.name) for f in fields(Factors)})
            if composed[i]
            else like.plan[s.name]
            for i, s in zip(order, features, strict=True)
        }
    )
    coll = EmbeddingCollection(rse.Schema(features), plan, RowwiseAdagrad(lr=RATE, eps=EPS), backend="fbgemm")
    for key in like.tables:
        coll.table(key).detach().copy_(like.table(key))
    moved = [i[:, order] for i in ids]

    def forward(turn: int) -> Tensor:
        batch, read = len(moved[turn]), coll(moved[turn])
        first, second = read[:, : count * 2 * dim].view(batch, count, 2, dim).unbind(2)
        return torch.cat([(first * second).flatten(1), read[:, count * 2 * dim :]], 1).view(batch, len(order), dim)

    return Contender(forward, order=order)


def runs_tbe(case: Case, ids: list[Tensor], like: EmbeddingCollection) -> Contender:
    """Runs that begin anywhere in an array, out of FBGEMM's rows: the two that hold a run are read, and it is cut out.

    The array's elements have squares of their own, so its rows are for plain Adagrad. Private tables are a second call.
    """
    width = case.dim
    programs = [like.plan[s.name].program(s) for s in like.schema]
    shared = [j for j, p in enumerate(programs) if p.probes[0].run > 1]
    private = [j for j in range(len(programs)) if j not in shared]
    hashes = [programs[j].probes[0].transform for j in shared]
    size = programs[shared[0]].tables[0].rows
    assert size % width == 0, f"an array of {size} elements is no number of rows of {width}"
    signature, places = (
        hashes[0].signature(),
        [torch.tensor(p) for p in zip(*(h.parameters() for h in hashes), strict=True)],
    )
    array = _tables([(size // width, width)], "EXACT_ADAGRAD", [0] * (2 * len(shared)))
    array.split_embedding_weights()[0].copy_(like.table("robe").detach().view(-1, width))
    own = _tables([(case.sizes[j], width) for j in private], "EXACT_ROWWISE_ADAGRAD")
    for j, table in zip(private, own.split_embedding_weights(), strict=True):
        table.copy_(like.table(f"{like.schema.names[j]}.weight").detach())
    along = torch.arange(width)

    def forward(turn: int) -> Tensor:
        batch = ids[turn]
        first = Hash.map(signature, batch[:, shared], places)
        row, aside = first // width, first % width
        rows = torch.stack([row, (row + 1) % (size // width)], -1)
        found = array(rows.view(len(batch), -1).T.reshape(-1), torch.arange(rows.numel() + 1))
        cut = found.view(len(batch), len(shared), 2 * width).gather(2, aside.unsqueeze(-1) + along)
        alone = own(batch[:, private].T.reshape(-1), torch.arange(len(batch) * len(private) + 1))
        return torch.cat([cut.flatten(1), alone], 1).view(len(batch), len(programs), width)

    return Contender(forward, order=shared + private)
