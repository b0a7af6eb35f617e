"""Ways to look up and train the same tables: this library's backends and what people use instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from contender import EPS, RATE, Contender, collection
from contenders_fbgemm import fused_ebc, index_tbe, tbe
from torch import Tensor
from workload import Case

from recsys_embed import EmbeddingCollection, RowwiseAdagrad
from recsys_embed.plan import table_key
from recsys_embed.registry import get_method


def _modules(case: Case, like: EmbeddingCollection) -> torch.nn.ModuleList:
    """A module per composed table, in torch's operations alone."""
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
    return modules


def per_table(case: Case, ids: list[Tensor], like: EmbeddingCollection) -> Contender:
    """A module per table as DLRM has them: sparse gradients and torch's Adagrad."""
    columns: list[list[tuple[Tensor, ...]]]
    columns = [[(i[:, j].contiguous(),) for j in range(len(case.sizes))] for i in ids]
    if case.method == "full":
        modules = torch.nn.ModuleList(
            torch.nn.EmbeddingBag.from_pretrained(
                like.table(f"{s.name}.weight").detach().clone(), freeze=False, mode="sum", sparse=True
            )
            for s in like.schema
        )
        columns = [[(c, torch.arange(len(c))) for (c,) in batch] for batch in columns]
    else:
        modules = _modules(case, like)
    # Torch's own default; said aloud, it is not warned of.
    torch.sparse.check_sparse_tensor_invariants.disable()
    optimizer = torch.optim.Adagrad(modules.parameters(), lr=RATE)

    def forward(turn: int) -> Tensor:
        return torch.stack([m(*c) for m, c in zip(modules, columns[turn], strict=True)], 1)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Contender(forward, step, same_rule=False)


def compiled(case: Case, ids: list[Tensor], like: EmbeddingCollection) -> Contender:
    """What torch.compile makes of the lookup in torch; without training, whose dense gradients outweigh the rest."""
    schema = case.schema()
    coll = EmbeddingCollection(schema, case.plan(schema), backend="torch").requires_grad_(False)
    coll.load_state_dict(like.state_dict())
    # Every case, batch and number of threads is a graph of the same code, and of more than eight torch makes none.
    torch._dynamo.config.recompile_limit = 256
    run = torch.compile(coll, fullgraph=True, dynamic=False)
    return Contender(lambda turn: run(ids[turn]), trains=False)


NO_BACKEND: dict[str, Callable[..., Contender]] = {"per_table": per_table, "compile": compiled}
PLAIN: dict[str, Callable[..., Contender]] = {"tbe": tbe, "fused_ebc": fused_ebc, **NO_BACKEND}
COMPOSED: dict[str, Callable[..., Contender]] = {"index_tbe": index_tbe, **NO_BACKEND}


def build(case: Case, ids: list[Tensor], skip: set[str]) -> tuple[EmbeddingCollection, dict[str, Contender]]:
    """The native collection, and all contenders over the weights it starts with, by name."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    schema = case.schema()
    native = EmbeddingCollection(schema, case.plan(schema), RowwiseAdagrad(lr=RATE, eps=EPS), backend="native")
    out = {"native": Contender(lambda turn: native(ids[turn]))}
    if "torch" not in skip:
        out["torch"] = collection(case, "torch", ids, native)
    for name, make in (PLAIN if case.method == "full" else COMPOSED).items():
        if name not in skip:
            out[name] = make(case, ids, native)
    return native, out
