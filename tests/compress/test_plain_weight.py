"""The plain table that a compressed module's `weight` is: one thing with no parameter, read as far as it is asked."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import recsys_embed as rse
from recsys_embed.registry import MethodInfo, list_methods
from recsys_embed.testing import example
from tests.tiers import slow_but

ROWS, WIDTH = 60, 4
PLANNED = [m for m in list_methods() if m.name != "full" and example(m).output_dim == 8]
IDS = torch.tensor([3, 5, -1, 3])
# Reads of a few rows, whose values are those of the whole table.
FEW: dict[str, Callable[[Tensor], Any]] = {
    "ids": lambda w: w[IDS],
    "one id": lambda w: w[7],
    "a list": lambda w: w[[1, 2]],
    "a slice": lambda w: w[3:6],
    "columns of a slice": lambda w: w[3:6, 1:3],
    "columns of ids": lambda w: w[IDS, 1:],
    "one element": lambda w: w[5, 3],
    "ids of two dimensions": lambda w: w[IDS.view(2, 2)],
    "index_select": lambda w: w.index_select(0, IDS.abs()),
    "F.embedding": lambda w: F.embedding(IDS.abs(), w),
    "an id of no dimension": lambda w: w[torch.tensor(5)],
    "vmap of ids": lambda w: torch.vmap(lambda i: w[i])(IDS),
    "vmap of F.embedding": lambda w: torch.vmap(lambda i: F.embedding(i, w))(IDS.abs().view(2, 2)),
}
WHOLE: dict[str, Callable[[Tensor], Any]] = {
    "product": lambda w: torch.ones(2, WIDTH) @ w.T,
    "a mask": lambda w: w[torch.arange(ROWS) % 2 == 0],
    "many ids": lambda w: w[torch.arange(100) % ROWS],
    "most of it": lambda w: w[1:],
    "None": lambda w: w[None],
    "norms": lambda w: w.norm(dim=1),
    "F.embedding with padding": lambda w: F.embedding(torch.tensor([0, 0, 3]), w, padding_idx=0),
}
NOTHING: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda w: w.shape,
    "dtype": lambda w: w.dtype,
    "device": lambda w: w.device,
    "size": lambda w: (w.size(), w.size(0), w.dim(), w.ndim, w.numel(), len(w)),
    "flags": lambda w: (w.requires_grad, w.is_leaf, w.is_floating_point(), w.is_cuda, w.is_meta, w.element_size()),
    "like": lambda w: (torch.zeros_like(w), w.new_zeros(3), w.new_ones(2, 2)),
}


def stood_in(method: MethodInfo, **options: Any) -> Any:
    model = nn.ModuleDict({"t": nn.Embedding(ROWS, WIDTH, **options)})
    spec = rse.Schema.from_model(model)["t"]
    need = max(ROWS * WIDTH * 2, method.config_cls.sized(spec, 1).footprint(spec, 4).serve)
    rse.compress_(model, {"t": method.config_cls.for_budget(spec, need)}, init="fresh")
    return model["t"]


@pytest.mark.parametrize("method", PLANNED, ids=lambda m: m.name)
def test_weight_is_computed_as_far_as_it_is_read(method: MethodInfo) -> None:
    module = stood_in(method)
    table = module.materialize()
    asked: list[int] = []
    vectors = module._vectors
    module._vectors = lambda ids, given=None: (asked.append(len(ids)), vectors(ids, given))[1]
    for kind, reads in (("few", FEW), ("all", WHOLE), ("none", NOTHING)):
        for name, read in reads.items():
            asked.clear()
            got, wanted = read(module.weight), read(table.clone().requires_grad_() + 0)
            if kind == "none":
                assert str(got) == str(wanted), name
            else:
                torch.testing.assert_close(got + 0, wanted, msg=name)
            most = {"few": 4, "all": ROWS, "none": 0}[kind]
            assert sum(asked) <= most, f"{name} computed {sum(asked)} rows"
    del module._vectors
    for name, read in {**FEW, **WHOLE}.items():
        ours = torch.autograd.grad(read(module.weight).square().sum(), list(module.parameters()), allow_unused=True)
        whole = module(torch.arange(ROWS))
        wanted = torch.autograd.grad(read(whole).square().sum(), list(module.parameters()), allow_unused=True)
        torch.testing.assert_close(ours, wanted, msg=name)
    for bad in (ROWS, torch.tensor([-ROWS - 1])):
        with pytest.raises(IndexError, match="out of bounds"):
            module.weight[bad]
    for reads in (lambda w, ids: F.embedding(ids, w), lambda w, ids: w.index_select(0, ids)):
        with pytest.raises(IndexError):
            reads(module.weight, torch.tensor([-1]))


@pytest.mark.parametrize("method", PLANNED, ids=lambda m: m.name)
def test_no_parameter_has_a_name_that_reads_as_something_else(method: MethodInfo) -> None:
    for module in (stood_in(method), example(method), example(method, mode="sum")):
        for name, p in module.named_parameters():
            assert getattr(module, name) is module.get_parameter(name) is p
        for table in module.program.tables:
            assert module.table(table.name) is module.get_parameter(module.parameter_name(table.name))


def test_states_and_pickles_of_modules_whose_parameter_was_called_weight_load() -> None:
    module = stood_in(rse.get_method("hash"))
    alone = rse.HashEmbedding(ROWS, WIDTH, config=module.config, name=module.spec.name, init=module.spec.init)
    wanted = module(IDS.abs())
    alone.load_state_dict(module.state_dict())
    assert "weight" in dict(alone.named_parameters())
    assert torch.equal(alone(IDS.abs()), wanted)
    for strict in (True, False):
        other = stood_in(rse.get_method("hash"))
        with torch.no_grad():
            other.stored_weight.zero_()
        other.load_state_dict(alone.state_dict(), strict=strict)
        assert torch.equal(other(IDS.abs()), wanted)
    written = copy.deepcopy(module)
    written._parameters = {"weight": written._parameters["stored_weight"]}
    del written.__dict__["_renamed"]
    old = pickle.loads(pickle.dumps(written))
    assert [*dict(old.named_parameters())] == ["stored_weight"]
    assert torch.equal(old(IDS.abs()), wanted)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).weight + 0, module.weight + 0)


def _add_to_a_row(w: Tensor) -> None:
    row = w[0]
    row += 1


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "a row": lambda w: w[5].zero_(),
    "a row by a tensor": lambda w: w[torch.tensor(5)].fill_(3),
    "a part of a row": lambda w: w[5, 1:3].fill_(3),
    "an initializer": lambda w: nn.init.normal_(w[5]),
    "an in-place operator": _add_to_a_row,
    "an array": lambda w: w.detach().numpy().__setitem__(3, 7),
    "np.asarray": lambda w: np.asarray(w.detach()).__setitem__(3, 7),
    "DLPack": lambda w: torch.from_dlpack(w.detach())[3].fill_(7),
    "a list": lambda w: torch._foreach_mul_([w], 2.0),
    "an option": lambda w: F.relu(w, inplace=True),
    "an option by position": lambda w: F.dropout(w, 0.5, True, True),
    "a norm's limit": lambda w: F.embedding(torch.tensor([1]), w, max_norm=0.1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_that_would_be_lost_are_refused(write: Callable[[Tensor], Any]) -> None:
    module = stood_in(rse.get_method("hash"))
    before, kept = module.materialize(), module.weight
    with pytest.raises((rse.RecsysEmbedError, ValueError), match=r"change nothing|read-only|weight \+ 0"):
        write(kept)
    assert torch.equal(module.materialize(), before)
    assert torch.equal(kept + 0, before)


def test_a_weight_that_is_kept_follows_its_parameters(tmp_path: Path) -> None:
    module = stood_in(rse.get_method("hash"))
    rse.export(nn.ModuleList([module]), tmp_path / "m", "int8")
    served = rse.load(tmp_path / "m", into=nn.ModuleList([copy.deepcopy(module)]))[0].weight  # type: ignore[index]
    torch.testing.assert_close(served + 0, module.materialize(), atol=0.05, rtol=0)
    assert not served._dense  # the file holds its rows in fewer bytes
    kept = module.weight
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(kept + 0, module.materialize())
            module.stored_weight.add_(1)
        module.stored_weight.data = torch.ones_like(module.stored_weight)
        assert torch.equal(kept + 0, module.materialize())


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.expand(ROWS, WIDTH)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils")
def test_what_cannot_read_the_plain_table_says_so() -> None:
    module = stood_in(rse.get_method("hash"))
    with pytest.raises(rse.RecsysEmbedError, match=r"weight \+ 0"):
        _Own.apply(module.weight).backward()
    _Own.apply(module.weight + 0).backward()
    assert float(module.stored_weight.grad.sum()) == ROWS * WIDTH
    for name, act in ACTS.items():
        named = "" if "pruning" in name else r"name a stored table instead \('stored_weight'\), .*"
        with pytest.raises(rse.RecsysEmbedError, match=named + "materialize_"):
            act(copy.deepcopy(module), "weight")
    with pytest.raises(rse.RecsysEmbedError, match="would change nothing"):
        module.weight = torch.zeros(ROWS, WIDTH)
    kept = module.weight
    kept.retain_grad()
    (kept * kept).sum().backward()
    torch.testing.assert_close(kept.grad, 2 * module.materialize())


ACTS: dict[str, Callable[[nn.Module, str], Any]] = {
    "l1 pruning": lambda m, n: prune.l1_unstructured(m, n, 0.5),
    "row pruning": lambda m, n: prune.ln_structured(m, n, 0.3, n=2, dim=0),
    "parametrized weight_norm": lambda m, n: weight_norm(m, n),
    "parametrized spectral_norm": lambda m, n: spectral_norm(m, n),
    "weight_norm": lambda m, n: nn.utils.weight_norm(m, n),
    "spectral_norm": lambda m, n: nn.utils.spectral_norm(m, n),
    "a parametrization": lambda m, n: parametrize.register_parametrization(m, n, nn.Tanh()),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils")
@pytest.mark.parametrize("act", slow_but(ACTS.values(), ACTS["weight_norm"], ACTS["a parametrization"]), ids=ACTS)
def test_utilities_that_recompute_a_parameter_change_what_is_looked_up(act: Callable[[nn.Module, str], Any]) -> None:
    """Oracle: torch's own module, and for other methods the same act on a bare parameter in the table's place."""
    for mode in (None, "sum"):
        ours = rse.FullEmbedding(100, 8, mode=mode)
        torchs = nn.Embedding(100, 8) if mode is None else nn.EmbeddingBag(100, 8, mode=mode)
        torchs.load_state_dict(ours.state_dict())
        for module in (ours, torchs):
            torch.manual_seed(1)
            act(module, "weight")
        ids = torch.tensor([[0, 4, 7], [1, 2, 99]])
        for _ in range(2):
            torch.manual_seed(2)
            out, wanted = ours(ids), (torch.manual_seed(2), torchs(ids))[1]
            assert torch.equal(out, wanted)
            grads = [
                torch.autograd.grad(o.square().sum(), list(m.parameters())) for o, m in ((out, ours), (wanted, torchs))
            ]
            torch.testing.assert_close(*grads)
    for method in PLANNED[list(ACTS.values()).index(act) % 3 :: 3]:  # every method, every act
        module = stood_in(method)
        name, values = next((n, p) for n, p in module.named_parameters() if p.dim() == 2 and min(p.shape) > 0)
        nn.init.normal_(values)
        bare = nn.Module()
        bare.register_parameter(name, nn.Parameter(values.detach().clone()))
        table = next(t.name for t in module.program.tables if module.parameter_name(t.name) == name)
        for m in (module, bare):
            torch.manual_seed(1)
            act(m, name)
        with torch.no_grad():
            torch.manual_seed(2)
            module(IDS.abs())
            torch.manual_seed(2)
            for hook in bare._forward_pre_hooks.values():
                hook(bare, ())
            module.eval(), bare.eval()
            torch.testing.assert_close(module.table(table), getattr(bare, name), msg=f"{method.name}.{name}")
            now, held = module(IDS.abs()), {n: module.table(n) for n in (t.name for t in module.program.tables)}
        fresh = stood_in(method).eval()
        named = {fresh.parameter_name(n): v.clone() for n, v in held.items()}
        torch.testing.assert_close(now, torch.func.functional_call(fresh, named, (IDS.abs(),)), msg=method.name)


def test_sparse_adam_is_refused_where_gradients_are_dense() -> None:
    model = nn.ModuleDict({"t": nn.Embedding(ROWS, WIDTH, sparse=True)})
    before, optimizer = model["t"], torch.optim.SparseAdam(model.parameters(), 0.1)
    with pytest.raises(rse.RecsysEmbedError, match=r"SparseAdam .*projection of method 'lowdim'"):
        rse.compress_(model, {"t": rse.LowdimConfig(dim=2)}, optimizer=optimizer)
    assert model["t"] is before
    rse.compress_(model, {"t": rse.HashConfig(num_buckets=9)}, optimizer=optimizer)
    model["t"](IDS.abs()).sum().backward()
    optimizer.step()
