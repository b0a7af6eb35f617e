"""What a method's module must do when it is called: shapes, bags, padding, unseen ids, gradients, compilation."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import CheckpointError
from recsys_embed.kernels import reference
from recsys_embed.registry import MethodInfo
from recsys_embed.testing.helpers import ROWS, example, example_ids, refused


def shapes_are_those_of_torch(method: MethodInfo) -> None:
    module = example(method)
    for shape in ((), (0,), (5,), (2, 3), (2, 0, 3)):
        for dtype in (torch.int64, torch.int32):
            out = module(torch.zeros(shape, dtype=dtype))
            assert out.shape == (*shape, module.output_dim), f"ids {shape} {dtype}: got {tuple(out.shape)}"
            assert out.dtype == torch.float32
    strided = torch.arange(20)[::3]
    assert torch.equal(module(strided), module(strided.contiguous()))


def bags_pool_the_vectors_of_their_ids(method: MethodInfo) -> None:
    for mode in ("sum", "mean", "max"):
        module = example(method, mode=mode).double()
        plain = example(method).double()
        ids, offsets = torch.tensor([3, 3, 402, 7, 0]), torch.tensor([0, 2, 2, 5])
        vectors = plain(ids)
        empty = torch.zeros(module.output_dim, dtype=torch.float64)
        bags = [vectors[0:2], vectors[2:2], vectors[2:5], vectors[5:5]]
        pooled = [getattr(b, mode)(0) if len(b) and mode != "max" else (b.max(0)[0] if len(b) else empty) for b in bags]
        torch.testing.assert_close(module(ids, offsets), torch.stack(pooled))
        torch.testing.assert_close(module(ids.view(1, 5)), module(ids, torch.tensor([0])))
    module = example(method, mode="sum").double()
    weights = torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    out = module(ids, torch.tensor([0, 2]), weights)
    torch.testing.assert_close(out[0], (vectors[:2] * weights[:2, None]).sum(0))
    (grad,) = torch.autograd.grad(out.sum(), weights)
    torch.testing.assert_close(grad, vectors.sum(1).detach())


def padding_is_zero_and_learns_nothing(method: MethodInfo) -> None:
    if method.name == "full":
        return  # torch's own padding semantics: the row is stored, starts at zero and gets no gradient
    module = example(method, padding_idx=7)
    out = module(torch.tensor([7]))
    assert not out.any(), f"the padding id must give zeros; got {out}"
    out.sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is None or not p.grad.any(), f"padding reached the gradient of {name}"
    bag = example(method, padding_idx=7, mode="mean")
    torch.testing.assert_close(bag(torch.tensor([[3, 7]])), bag(torch.tensor([[3]])))


def ids_out_of_range_raise_unless_hashed(method: MethodInfo) -> None:
    module = example(method)
    for bad in (-1, ROWS, 2**40):
        ids = torch.tensor([0, bad])
        if method.config_cls.accepts_raw:
            assert torch.isfinite(module(ids)).all()
        else:
            with refused(IndexError, str(ROWS)):
                module(ids)


def unseen_ids_follow_their_policy(method: MethodInfo) -> None:
    seen, unseen = torch.tensor([0, 402, 7]), torch.tensor([-1, ROWS, ROWS + 1, 2**31, 2**63 - 1, -(2**63)])
    ids, hashes = torch.cat([unseen, seen]), method.config_cls.accepts_raw
    with refused(IndexError, str(ROWS), "'embedding'"):
        example(method, unseen="raise")(ids)
    plain = example(method)
    # Products of matrices may differ in their last bits with the number of rows.
    same = torch.equal if plain.program.head is None else partial(torch.allclose, atol=1e-6)
    hashed = example(method, unseen="hash")
    inside = {tuple(v) for v in hashed.materialize().tolist()}
    assert torch.equal(hashed(seen), plain(seen)), "seen ids must not feel the policy"
    if hashes:
        assert torch.equal(hashed(unseen), plain(unseen)), "a hashing method hashes unseen ids like any other"
    else:
        rows = hashed(unseen)
        assert all(tuple(v) in inside for v in rows.tolist()), "unseen ids must read rows of ids in range"
        assert len(rows.unique(dim=0)) > 1, "unseen ids must spread over the rows"
    shared = example(method, unseen="oov")
    rows = shared(unseen)
    assert (rows == rows[0]).all(), "all unseen ids must have one vector"
    assert shared.materialize().shape == (ROWS, shared.output_dim), "the id of unseen ones is not one of the table"
    assert same(shared(seen), shared.materialize()[seen]), "seen ids keep their own vectors"
    rows.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in shared.parameters()), "the shared vector must learn"
    held = {k: v for k, v in shared.state_dict().items() if not k.endswith("_extra_state")}
    counted = shared.footprint()
    trained = counted.serve + counted.unrounded
    assert trained == sum(v.nbytes for v in held.values()), "the footprint must count its row"
    nothing = example(method, unseen="zero")
    out = nothing(ids)
    assert not out[: len(unseen)].any(), "unseen ids must give zeros"
    assert same(out[len(unseen) :], plain(seen)), "seen ids must not feel the policy"
    out[: len(unseen)].sum().backward()
    for name, p in nothing.named_parameters():
        assert p.grad is None or not p.grad.any(), f"unseen ids reached the gradient of {name}"
    for mode in ("sum", "mean", "max"):
        bag = example(method, unseen="zero", mode=mode)
        torch.testing.assert_close(bag(ids.view(1, -1)), bag(seen.view(1, -1)), msg=f"{mode}: bags must skip them")
        assert not bag(unseen.view(1, -1)).any(), f"{mode}: a bag of nothing else gives zeros"
    for module in (hashed, shared, nothing):
        module.reset_unseen_counts()
        module.eval()(ids if module.mode is None else ids.view(1, -1))
        assert module.unseen_counts() == {"embedding": (len(unseen), len(ids))}, module.unseen_counts()
        example(method, unseen=module.spec.unseen, seed=0).load_state_dict(module.state_dict())
    if method.name != "full":
        with refused(CheckpointError, "unseen", "oov"):
            plain.load_state_dict(shared.state_dict())


def gradients_are_right(method: MethodInfo) -> None:
    module = example(method, 23, 4).double()
    names, values = zip(*module.named_parameters(), strict=True)

    def run(*parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        out: Tensor = torch.func.functional_call(module, named, (torch.tensor([0, 22, 7, 7]),))
        return out

    assert torch.autograd.gradcheck(run, tuple(v.detach().clone().requires_grad_(True) for v in values))


def equals_its_program(method: MethodInfo) -> None:
    module = example(method)
    if type(module).lookup is not CompressedEmbedding.lookup:
        return
    assert not module.program.faults()
    ids = torch.arange(ROWS)
    tables = {t.name: module.table(t.name) for t in module.program.tables}
    index = module.kernel.index
    expected = reference.lookup(module.program, tables, ids, index)
    torch.testing.assert_close(module(ids), expected)
    torch.testing.assert_close(module.materialize(), expected)
    bound = {t.name: t.rows for t in module.program.tables}
    for row_lookup in module.program.row_lookups:
        rows = index.rows(0, row_lookup.transform, ids)
        assert -1 <= int(rows.min()) <= int(rows.max()) < bound[row_lookup.table], (
            f"rows of {row_lookup.table} leave the table"
        )


def compiles_and_exports_whole(method: MethodInfo) -> None:
    module = example(method)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(example_ids(module)), module(example_ids(module)))
    dynamic = {"input": {0: torch.export.Dim("batch")}, "offsets": None, "per_sample_weights": None}
    exported = torch.export.export(module, (torch.arange(7), None, None), dynamic_shapes=dynamic)
    ids = torch.arange(11)
    torch.testing.assert_close(exported.module()(ids, None, None), module(ids))
