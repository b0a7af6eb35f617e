"""What torch's own tools must make of a method's module: the same as of nn.Embedding and nn.EmbeddingBag."""

from __future__ import annotations

import io
import warnings
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_embed.errors import RecsysEmbedError
from recsys_embed.registry import MethodInfo
from recsys_embed.testing.helpers import ROWS, example

FAR = torch.tensor([1, ROWS + 7, 402])


class _Ranker(nn.Module):
    def __init__(self, vectors: nn.Module) -> None:
        super().__init__()
        self.vectors = vectors

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.vectors(ids).relu()
        return out


def one_node_for_torch_fx(method: MethodInfo) -> None:
    for mode in (None, "mean"):
        model = _Ranker(example(method, mode=mode))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.fx.symbolic_trace(model)
        calls = [n.target for n in traced.graph.nodes if n.op == "call_module"]
        assert calls == ["vectors"], f"a traced model must call the module as a whole; got {calls}"
        for ids in (torch.tensor([[3, 402, 7]]), torch.tensor([[1], [2]])):
            assert torch.equal(traced(ids), model(ids))


def traced_by_torch_jit_as_called(method: MethodInfo) -> None:
    for mode, unseen in product((None, "sum", "max"), (None, "raise", "hash", "oov", "zero")):
        where = f"mode {mode}, unseen {unseen}"
        module = example(method, mode=mode, unseen=unseen, padding_idx=5).eval()
        given: tuple[Tensor, ...] = (torch.tensor([1, 2, 5]),)
        asked: list[tuple[Tensor, ...]] = [(torch.tensor([[5], [9]]),), (torch.tensor([402] * 9),), (FAR,)]
        if mode is not None:
            given = (*given, torch.tensor([0, 2]))
            asked = [(ids[0].reshape(-1), torch.tensor([0, 0, 1])) for ids in asked]
        traced = _reloaded(module, given)
        assert module.unseen_counts()["embedding"].looked_up == 0, "ids that a module is traced with are not looked up"
        for call in asked:
            try:
                wanted = module(*call)
            except RecsysEmbedError:
                assert _refuses(traced, call), f"{where}: the traced module takes ids that the module refuses"
            else:
                torch.testing.assert_close(traced(*call), wanted, msg=where)
        if mode is not None:
            falling = (torch.tensor([1, 2, 3]), torch.tensor([0, 2, 1]))
            assert _refuses(traced, falling), f"{where}: the traced module takes offsets that fall"


def _reloaded(module: nn.Module, given: tuple[Tensor, ...]) -> Any:
    """The traced module, written and read."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(module, given, check_trace=False), file)
        file.seek(0)
        return torch.jit.load(file)


def _refuses(traced: Any, call: tuple[Tensor, ...]) -> bool:
    try:
        traced(*call)
    except (RuntimeError, IndexError):
        return True
    return False


def takes_jagged_nested_ids(method: MethodInfo) -> None:
    ids = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([402])], layout=torch.jagged)
    values, offsets = torch.tensor([1, 2, 402]), torch.tensor([0, 2, 3])
    module = example(method)
    out = module(ids)
    assert out.is_nested
    assert torch.equal(out.values(), module(values))
    for mode, include in product(("sum", "mean", "max"), (False, True)):
        bag = example(method, mode=mode, include_last_offset=include)
        torch.testing.assert_close(bag(ids), bag(values, offsets if include else offsets[:-1]))


def keeps_its_type_under_autocast(method: MethodInfo) -> None:
    for mode in (None, "sum", "mean"):
        module, ids = example(method, mode=mode), torch.tensor([[3, 402], [7, 0]])
        wanted = module(ids)
        with torch.autocast("cpu", torch.bfloat16):
            out = module(ids)
            scores = F.linear(out, torch.ones(3, out.shape[-1]))
        assert out.dtype == wanted.dtype, f"autocast must leave lookups alone; got {out.dtype}"
        assert torch.equal(out, wanted), "autocast must leave lookups alone"
        assert scores.dtype == torch.bfloat16


def replicas_answer_alike(method: MethodInfo) -> None:
    """What torch.nn.DataParallel does, without a second device: tensors of a copy are set as plain attributes."""
    module, ids = example(method), torch.tensor([[3, 402], [7, 0]])
    made = {id(m): m._replicate_for_data_parallel() for m in module.modules()}
    for m in module.modules():
        for name, child in m._modules.items():
            setattr(made[id(m)], name, None if child is None else made[id(child)])
        for name, p in m._parameters.items():
            setattr(made[id(m)], name, None if p is None else p.clone())
    replica = made[id(module)]
    out = replica(ids)
    assert torch.equal(out, module(ids))
    out.sum().backward()
    assert any(p.grad is not None for p in module.parameters()), "gradients of a replica must reach the parameters"


def works_under_function_transforms(method: MethodInfo) -> None:
    """Per-sample gradients by torch.func, as Opacus computes them, are those of one sample at a time."""
    for mode in (None, "mean"):
        module = example(method, 50, 4, mode=mode).double()
        values = {n: p.detach() for n, p in module.named_parameters()}
        ids = torch.tensor([[3, 3], [7, 49], [0, 1]])

        def loss(tables: dict[str, Tensor], row: Tensor, module: nn.Module = module) -> Tensor:
            out: Tensor = torch.func.functional_call(module, tables, (row.unsqueeze(0),))
            return out.square().sum()

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # torch's own bags give it, too
            each = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, ids)
        for i, row in enumerate(ids):
            module.zero_grad()
            module(row.unsqueeze(0)).square().sum().backward()
            for name, p in module.named_parameters():
                wanted = torch.zeros_like(p) if p.grad is None else p.grad
                torch.testing.assert_close(each[name][i], wanted, msg=f"per-sample gradient of {name}, mode {mode}")


def sparse_gradients_are_announced(method: MethodInfo) -> None:
    for mode in (None, "sum"):
        module = example(method, sparse=True, mode=mode)
        module(torch.tensor([[3, 402], [7, 0]])).sum().backward()
        sparse = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.is_sparse}
        announced = {id(p) for p in module.sparse_parameters()}
        stated = {n for n, p in module.named_parameters() if id(p) in announced}
        assert sparse == stated, (
            f"sparse gradients are of {sorted(sparse)}; `sparse_parameters` states {sorted(stated)}"
        )
