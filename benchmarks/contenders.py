"""Ways to look up and train the same tables: this library's backends and what people use instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor
from workload import Case

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, Plan, RowwiseAdagrad
from recsys_embed.methods.compositional import CompositionalConfig
from recsys_embed.plan import table_key
from recsys_embed.program import LookupProgram
from recsys_embed.registry import get_method

RATE, EPS = 0.01, 1e-8


class Contender:
    """``forward(turn)`` looks up a batch; ``step()``, after its backward, finishes what backward has not updated.

    Args:
        same_rule: its updates are rowwise Adagrad's, so that weights can be compared after a step.
        trains: whether a whole step makes sense.
        order: of the fields in its output, where it is another one.
    """

    def __init__(
        self,
        forward: Callable[[int], Tensor],
        step: Callable[[], None] | None = None,
        same_rule: bool = True,
        trains: bool = True,
        order: list[int] | None = None,
    ) -> None:
        self.forward, self.step, self.same_rule, self.trains, self.order = forward, step, same_rule, trains, order


def collection(case: Case, backend: str, ids: list[Tensor], like: EmbeddingCollection | None) -> Contender:
    schema = case.schema()
    coll = EmbeddingCollection(schema, case.plan(schema), RowwiseAdagrad(lr=RATE, eps=EPS), backend=backend)
    if like is not None:
        coll.load_state_dict(like.state_dict())
    return Contender(lambda turn: coll(ids[turn]))


def _copy(like: EmbeddingCollection, tables: list[Tensor]) -> None:
    for spec, table in zip(like.schema, tables, strict=True):
        table.detach().copy_(like.table(f"{spec.name}.weight"))


def tbe(case: Case, ids: list[Tensor], like: EmbeddingCollection) -> Contender:
    """FBGEMM's module for plain tables, ids ordered as it wants them beforehand."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(n, case.dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for n in case.sizes],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=RATE,
        eps=EPS,
        pooling_mode=PoolingMode.SUM,
    )
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


def per_table(case: Case, ids: list[Tensor], like: EmbeddingCollection) -> Contender:
    """A module per table as DLRM has them, in torch's operations alone: sparse gradients and torch's Adagrad."""
    schema = case.schema()
    plan = case.plan(schema)
    modules = torch.nn.ModuleList(
        get_method(plan[s.name].method).embedding_cls(
            s.num_embeddings, s.embedding_dim, config=plan[s.name], sparse=True, name=s.name
        )
        for s in schema
    )
    shared: dict[str, torch.nn.Parameter] = {}
    for spec, module in zip(schema, modules, strict=True):
        module._native = None
        for table in module.program.tables:
            key = table_key(spec, table)
            own = shared.setdefault(key, module._parameters[table.name])
            module._parameters[table.name] = own
            own.detach().copy_(like.table(key))
    # Torch's own default; said aloud, it is not warned of.
    torch.sparse.check_sparse_tensor_invariants.disable()
    optimizer = torch.optim.Adagrad(modules.parameters(), lr=RATE)
    columns = [[i[:, j].contiguous() for j in range(len(case.sizes))] for i in ids]

    def forward(turn: int) -> Tensor:
        return torch.stack([m(c) for m, c in zip(modules, columns[turn], strict=True)], 1)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Contender(forward, step, same_rule=False)


class Factors(CompositionalConfig):
    """The factors of products, side by side."""

    def program(self, spec: rse.FeatureSpec) -> LookupProgram:
        whole = super().program(spec)
        apart = [replace(p, column=i * spec.embedding_dim) for i, p in enumerate(whole.probes)]
        return replace(whole, probes=tuple(apart), combine="sum")


def index_tbe(case: Case, ids: list[Tensor], like: EmbeddingCollection) -> Contender:
    """Rows computed in torch, then summed by FBGEMM's tables, which read the factors of products for torch."""
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


def compiled(case: Case, ids: list[Tensor], like: EmbeddingCollection) -> Contender:
    """What torch.compile makes of the lookup in torch; without training, whose dense gradients outweigh the rest."""
    schema = case.schema()
    coll = EmbeddingCollection(schema, case.plan(schema), backend="torch").requires_grad_(False)
    coll.load_state_dict(like.state_dict())
    run = torch.compile(coll, fullgraph=True, dynamic=False)
    return Contender(lambda turn: run(ids[turn]), trains=False)


PLAIN: dict[str, Callable[..., Contender]] = {"tbe": tbe, "fused_ebc": fused_ebc}
COMPOSED: dict[str, Callable[..., Contender]] = {"per_table": per_table, "index_tbe": index_tbe, "compile": compiled}


def build(case: Case, ids: list[Tensor], skip: set[str]) -> tuple[EmbeddingCollection, dict[str, Contender]]:
    """The native collection, and all contenders over the weights it starts with, by name."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    schema = case.schema()
    native = EmbeddingCollection(schema, case.plan(schema), RowwiseAdagrad(lr=RATE, eps=EPS), backend="native")
    out = {"native": Contender(lambda turn: native(ids[turn]))}
    if "torch" not in skip:
        out["torch"] = collection(case, "torch", ids, native)
    if case.method == "full" and "fbgemm" not in skip:
        out["fbgemm"] = collection(case, "fbgemm", ids, native)
    for name, make in (PLAIN if case.method == "full" else COMPOSED).items():
        if name in skip or (name == "index_tbe" and case.method == "robe"):
            continue
        out[name] = make(case, ids, native)
    return native, out
