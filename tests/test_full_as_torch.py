"""FullEmbedding against torch's own nn.Embedding and nn.EmbeddingBag: same numbers, same gradients, same errors."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recsys_embed.errors import ConfigError
from recsys_embed.methods.full import FullEmbedding

ROWS, WIDTH = 11, 3
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
IDS = {
    "0-d": torch.tensor(4),
    "1-d": torch.tensor([0, 10, 4, 4, 7]),
    "2-d": torch.tensor([[0, 10, 4], [4, 4, 1]]),
    "3-d": torch.arange(12).view(2, 3, 2) % ROWS,
    "4-d": torch.arange(16).view(2, 2, 2, 2) % ROWS,
    "strided": torch.arange(24).view(6, 4)[::2, 1::2] % ROWS,
    "transposed": torch.arange(6).view(2, 3).t(),
    "empty": torch.zeros(0, dtype=torch.int64),
    "empty 2-d": torch.zeros(2, 0, dtype=torch.int64),
    "no rows": torch.zeros(0, 3, dtype=torch.int64),
}
BAGS = {
    "plain": (torch.tensor([0, 10, 4, 4, 7]), torch.tensor([0, 2])),
    "empty bags": (torch.tensor([0, 10, 4, 4, 7]), torch.tensor([0, 0, 3, 3, 5])),
    "one long bag": (torch.arange(50) % ROWS, torch.tensor([0])),
    "no ids": (torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0, 0])),
    "only padding": (torch.tensor([4, 4, 4, 1]), torch.tensor([0, 3])),
}
# What torch itself refuses raises there first; the comparison is then that ours raises too.
TORCH_ERRORS = (RuntimeError, ValueError, NotImplementedError, IndexError)


def pair(mode: str | None, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, FullEmbedding]:
    """Torch's module and ours with the same weights."""
    bag_only = options.pop("include_last_offset", False)
    if mode is None:
        theirs: nn.Module = nn.Embedding(ROWS, WIDTH, dtype=dtype, **options)
        ours = FullEmbedding(ROWS, WIDTH, dtype=dtype, **options)
    else:
        theirs = nn.EmbeddingBag(ROWS, WIDTH, mode=mode, include_last_offset=bag_only, dtype=dtype, **options)
        ours = FullEmbedding(ROWS, WIDTH, mode=mode, include_last_offset=bag_only, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(ROWS, WIDTH, generator=generator))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def run(module: nn.Module, args: tuple[Any, ...], weights: Tensor | None) -> list[Tensor | None]:
    """Output, gradient of the table, gradient of the per-sample weights, table afterwards."""
    module.zero_grad()
    weights = None if weights is None else weights.clone().requires_grad_(True)
    extra = () if weights is None else (weights,)
    out = module(*args, *extra)
    factor = torch.arange(1, out.numel() + 1, dtype=torch.float64).view(out.shape).to(out.dtype) / 7
    (out * factor).sum().backward()
    grad = module.weight.grad
    return [out.detach(), grad, None if weights is None else weights.grad, module.weight.detach().clone()]


def same(theirs: Tensor | None, ours: Tensor | None) -> None:
    assert (theirs is None) == (ours is None)
    if theirs is None or ours is None:
        return
    assert (theirs.dtype, theirs.shape, theirs.layout) == (ours.dtype, ours.shape, ours.layout)
    if theirs.is_sparse:
        theirs, ours = theirs.coalesce(), ours.coalesce()
        assert torch.equal(theirs.indices(), ours.indices())
        theirs, ours = theirs.values(), ours.values()
    assert torch.equal(theirs, ours), (theirs - ours).abs().max()


def compare(mode: str | None, args: tuple[Any, ...], weights: Tensor | None = None, **options: Any) -> None:
    theirs, ours = pair(mode, **options)
    refused: type[Exception] | None = None
    try:
        expected = run(theirs, args, weights)
    except TORCH_ERRORS as e:
        refused = type(e)
    if refused is not None:
        with pytest.raises((ConfigError, refused)):
            run(ours, args, weights)
        return
    for a, b in zip(expected, run(ours, args, weights), strict=True):
        same(a, b)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("padding", [None, 0, 4, -1, -ROWS])
@pytest.mark.parametrize("sparse", [False, True])
def test_embedding(ids: Tensor, padding: int | None, sparse: bool) -> None:
    for dtype in (torch.int64, torch.int32):
        compare(None, (ids.to(dtype),), padding_idx=padding, sparse=sparse)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 4, -1])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("bags", BAGS.values(), ids=BAGS)
def test_bags_with_offsets(
    bags: tuple[Tensor, Tensor], mode: str, padding: int | None, sparse: bool, last: bool
) -> None:
    ids, offsets = bags
    if last:
        offsets = torch.cat([offsets, torch.tensor([ids.numel()])])
    options = {"padding_idx": padding, "sparse": sparse, "include_last_offset": last}
    for dtype, offset_dtype in itertools.product((torch.int64, torch.int32), repeat=2):
        compare(mode, (ids.to(dtype), offsets.to(offset_dtype)), **options)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 4, -1])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("ids", ["2-d", "strided", "transposed", "empty 2-d", "no rows"])
def test_bags_of_equal_length(ids: str, mode: str, padding: int | None, last: bool) -> None:
    compare(mode, (IDS[ids],), padding_idx=padding, include_last_offset=last)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 4])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("bags", BAGS.values(), ids=BAGS)
def test_per_sample_weights_and_their_gradient(
    bags: tuple[Tensor, Tensor], mode: str, padding: int | None, sparse: bool
) -> None:
    ids, offsets = bags
    weights = torch.linspace(-2, 3, ids.numel()) if ids.numel() else torch.zeros(0)
    compare(mode, (ids, offsets), weights, padding_idx=padding, sparse=sparse)
    if mode == "sum" and ids.numel():
        table = IDS["2-d"]
        compare(mode, (table, None), torch.linspace(0.5, 3, table.numel()).view(table.shape), padding_idx=padding)


@pytest.mark.parametrize("mode", [None, "sum", "mean", "max"])
@pytest.mark.parametrize("norm", [1.0, 2.0, float("inf")])
def test_max_norm_renormalises_the_rows_in_place(mode: str | None, norm: float) -> None:
    compare(mode, (IDS["2-d"],), max_norm=0.7, norm_type=norm)


@pytest.mark.parametrize("mode", [None, "sum", "mean", "max"])
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_scaled_by_frequency(mode: str | None, sparse: bool) -> None:
    compare(mode, (IDS["2-d"],), scale_grad_by_freq=True, sparse=sparse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [None, "sum", "mean", "max"])
def test_dtypes(mode: str | None, dtype: torch.dtype) -> None:
    for sparse in (False, True):
        compare(mode, (IDS["2-d"],), dtype=dtype, sparse=sparse)
    if mode == "sum":
        compare(mode, BAGS["empty bags"], torch.linspace(-1, 1, 5).to(dtype), dtype=dtype)


@pytest.mark.parametrize("mode", [None, "sum"])
def test_the_first_weights_follow_the_law_of_torch(mode: str | None) -> None:
    ours = FullEmbedding(4000, 16, padding_idx=-1, mode=mode)
    assert abs(ours.weight.std().item() - 1) < 0.02
    assert abs(ours.weight.mean().item()) < 0.02
    assert not ours.weight[-1].any(), "the padding row starts at zero"


@pytest.mark.parametrize("mode", [None, "sum"])
def test_meta_device(mode: str | None) -> None:
    ours = FullEmbedding(2**31 - 1, 64, mode=mode, device="meta")
    assert ours(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == ((2, 3, 64) if mode is None else (2, 64))
    small = FullEmbedding(5, 2, mode=mode, device="meta", padding_idx=1, seed=0).to_empty(device="cpu")
    small.reset_parameters()
    assert torch.equal(small.weight, FullEmbedding(5, 2, mode=mode, padding_idx=1, seed=0).weight)


@pytest.mark.parametrize("mode", [None, "mean"])
def test_state_dict_goes_both_ways(mode: str | None) -> None:
    theirs, ours = pair(mode)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight"]
    with torch.no_grad():
        ours.weight.mul_(2)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.weight, ours.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict({"weight": torch.zeros(ROWS + 1, WIDTH)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ours.load_state_dict({**theirs.state_dict(), "extra": torch.zeros(1)})


def test_inside_a_model_the_keys_do_not_change() -> None:
    theirs = nn.ModuleDict({"user": nn.Embedding(ROWS, WIDTH), "item": nn.EmbeddingBag(5, 2)})
    ours = nn.ModuleDict({"user": FullEmbedding(ROWS, WIDTH), "item": FullEmbedding(5, 2, mode="mean")})
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours["item"].weight, theirs["item"].weight)


@pytest.mark.parametrize("freeze", [True, False])
def test_from_pretrained(freeze: bool) -> None:
    weight = torch.randn(ROWS, WIDTH)
    theirs = nn.Embedding.from_pretrained(weight, freeze=freeze, padding_idx=-2, sparse=True)
    ours = FullEmbedding.from_pretrained(weight, freeze=freeze, padding_idx=-2, sparse=True)
    assert ours.weight.requires_grad == theirs.weight.requires_grad == (not freeze)
    assert ours.weight.data_ptr() == weight.data_ptr(), "shares the tensor, as torch does"
    assert (ours.padding_idx, ours.sparse) == (theirs.padding_idx, theirs.sparse)
    assert torch.equal(ours(IDS["2-d"]), theirs(IDS["2-d"]))
    assert torch.equal(ours.materialize(), weight)
    bag = FullEmbedding.from_pretrained(weight.half(), mode="max")
    assert torch.equal(bag(IDS["2-d"]), nn.EmbeddingBag.from_pretrained(weight.half(), mode="max")(IDS["2-d"]))
    with pytest.raises(ConfigError, match=r"\[num_embeddings, dim\]"):
        FullEmbedding.from_pretrained(torch.zeros(3))


@pytest.mark.parametrize("mode", [None, "sum"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(mode: str | None, how: Any) -> None:
    _, ours = pair(mode, padding_idx=2)
    twin = how(ours)
    assert torch.equal(twin(IDS["2-d"]), ours(IDS["2-d"]))
    with torch.no_grad():
        twin.weight.add_(1)
    assert not torch.equal(twin.weight, ours.weight)
    assert twin.extra_repr() == ours.extra_repr()


@pytest.mark.parametrize("bad", [-1, ROWS, 2**40, -(2**63)])
@pytest.mark.parametrize("mode", [None, "sum"])
def test_ids_out_of_range_raise_index_error(mode: str | None, bad: int) -> None:
    theirs, ours = pair(mode)
    ids = torch.tensor([[0, bad]])
    with pytest.raises((IndexError, RuntimeError)):
        theirs(ids)
    with pytest.raises(IndexError, match=rf"\[0, {ROWS}\).*from -?\d+ to \d+"):
        ours(ids)


def test_wrong_calls_raise_where_torch_raises() -> None:
    wrong: list[tuple[str | None, tuple[Any, ...]]] = [
        (None, (torch.zeros(3),)),
        (None, ([1, 2],)),
        ("sum", (torch.zeros(2, 2),)),
        ("sum", (torch.tensor([1]),)),
        ("sum", (torch.tensor(1),)),
        ("sum", (torch.zeros(1, 1, 1, dtype=torch.int64),)),
        ("sum", (torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0]))),
        ("sum", (torch.tensor([1, 2]), torch.tensor([1]))),
        ("sum", (torch.tensor([1, 2]), torch.tensor([0, 3]))),
        ("sum", (torch.tensor([1, 2]), torch.tensor([[0]]))),
        ("mean", (torch.tensor([[1, 2]]), None, torch.ones(1, 2))),
        ("sum", (torch.tensor([[1, 2]]), None, torch.ones(2))),
        ("sum", (torch.tensor([[1, 2]]), None, torch.ones(1, 2, dtype=torch.float64))),
    ]
    for mode, args in wrong:
        theirs, ours = pair(mode)
        with pytest.raises((TypeError, *TORCH_ERRORS)):
            theirs(*args)
        with pytest.raises((TypeError, *TORCH_ERRORS)):
            ours(*args)
    for padding in (ROWS, -ROWS - 1):
        with pytest.raises(ConfigError, match="padding_idx"):
            FullEmbedding(ROWS, WIDTH, padding_idx=padding)
    with pytest.raises(ConfigError, match="offsets must rise"):  # torch reads memory nobody wrote
        pair("sum")[1](torch.tensor([1, 2, 3]), torch.tensor([0, 2, 1]))
    with pytest.raises(ConfigError, match="mode="):
        pair(None)[1](torch.tensor([1]), torch.tensor([0]))


@pytest.mark.parametrize("mode", [None, "sum", "mean", "max"])
def test_compiles_whole(mode: str | None) -> None:
    _, ours = pair(mode, padding_idx=4)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for ids in (IDS["2-d"], torch.tensor([[1, 2]])):
        expected = run(ours, (ids,), None)
        ours.zero_grad()
        out = compiled(ids)
        assert torch.equal(out, expected[0])
    if mode is not None:
        args = BAGS["empty bags"]
        assert torch.equal(compiled(*args), ours(*args))


@pytest.mark.parametrize("mode", [None, "sum"])
def test_exports_with_a_dynamic_batch(mode: str | None) -> None:
    _, ours = pair(mode)
    batch = torch.export.Dim("batch", min=2, max=1024)
    program = torch.export.export(ours, (IDS["2-d"],), dynamic_shapes=({0: batch},))
    ids = torch.randint(0, ROWS, (17, 3))
    assert torch.equal(program.module()(ids), ours(ids))


def test_options_and_attributes_of_torch() -> None:
    for key in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"):
        assert getattr(pair(None, padding_idx=-3)[1], key) == getattr(pair(None, padding_idx=-3)[0], key), key
    positional = FullEmbedding(ROWS, WIDTH, 3, 0.5, 1.0, True, True)
    theirs = nn.Embedding(ROWS, WIDTH, 3, 0.5, 1.0, True, True)
    for key in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"):
        assert getattr(positional, key) == getattr(theirs, key), key
