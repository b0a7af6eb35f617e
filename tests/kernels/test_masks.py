"""Masks in the compiled kernels: the layers in float64 are the oracle; lookups mask as the layer after them would."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.errors import ConfigError, IdRangeError
from recsys_embed.kernels.native import library as native_library
from recsys_embed.kernels.native import masks
from recsys_embed.search import DnisLayer, OptembedLayer

LIBRARY = native_library.library()
pytestmark = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"native kernels: {LIBRARY}")
SIZES = (7, 40, 300)
KINDS = ("field", "field oov", "row", "row norm2", "rows only", "dims only", "norm2 oov", "blocks", "many blocks")


def layer_of(kind: str, width: int, seed: int = 0) -> Any:
    """A layer over fields of ``SIZES`` ids, its parameters such that some rows are pruned."""
    g = torch.Generator().manual_seed(seed)
    if "blocks" in kind:
        count = 400 if "many" in kind else 9
        blocks = [torch.randint(0, count, (n,), generator=g) for n in SIZES]
        blocks[0][0] = count - 1
        layer: Any = DnisLayer(blocks, width)
        nn.init.uniform_(layer.alpha, generator=g)
        return layer
    rows: Any = "none" if kind == "dims only" else "row" if "row " in f"{kind} " and kind != "rows only" else "field"
    norm = 2 if "norm2" in kind else 1
    layer = OptembedLayer(3, width, rows=rows, dims=kind != "rows only", norm=norm, oov="oov" in kind, sizes=SIZES)
    if layer.thresholds is not None:
        nn.init.uniform_(layer.thresholds, 0.2, 0.8 * width if norm == 1 else math.sqrt(width), generator=g)
    if layer.oov is not None:
        nn.init.uniform_(layer.oov, -1, 1, generator=g)
    return layer


def batch_of(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors ``[B, 3, D]``, their ids and gradients of what becomes of them."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(0, n, (rows,), generator=g) for n in SIZES], 1)
    return torch.randn(rows, 3, width, generator=g), ids, torch.randn(rows, 3, width, generator=g)


def ran(layer: nn.Module, vectors: Tensor, ids: Tensor, upstream: Tensor) -> list[Tensor]:
    """Masked vectors and the gradients of vectors and parameters."""
    torch.manual_seed(3)
    given = vectors.clone().requires_grad_()
    out = layer(given, ids)
    out.backward(upstream)
    found = [out.detach(), given.grad, *(p.grad for p in layer.parameters())]
    layer.zero_grad()
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 5, 513]),
    width=st.sampled_from([1, 3, 8, 16, 20, 32, 64]),
    seed=st.integers(0, 2**30),
    training=st.booleans(),
)
def test_values_and_gradients_are_those_of_float64(kind: str, rows: int, width: int, seed: int, training: bool) -> None:
    layer = layer_of(kind, width, seed).train(training)
    if not training and "blocks" not in kind:
        layer.widths = torch.tensor([width, 1, (width + 1) // 2])
    vectors, ids, upstream = batch_of(rows, width, seed)
    assert masks.mask_vectors(layer.mask_parameters(ids), ids, vectors) is not None, "the kernels are what is tested"
    got = ran(layer, vectors, ids, upstream)
    wanted = ran(layer.double(), vectors.double(), ids, upstream.double())
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-4 * math.sqrt(1 + rows / 64))


@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_on_no_thread_and_no_instruction_set(kind: str) -> None:
    found = native_library.loaded()
    layer, (vectors, ids, upstream) = layer_of(kind, 16), batch_of(5000, 16)
    before, results = torch.get_num_threads(), []
    try:
        for variant in native_library.VARIANTS:
            if found.handle.rse_select(variant.encode()) is None:
                continue
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(ran(layer, vectors, ids, upstream))
    finally:
        torch.set_num_threads(before)
        found.handle.rse_select(found.variant.encode())
    assert len(results) >= 3
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def collection_of(width: int, method: str = "full", optimizer: Any = None) -> EmbeddingCollection:
    schema = Schema([FeatureSpec(f"C{i}", n, width, init="normal:1") for i, n in enumerate(SIZES)])
    plan = Plan.full(schema) if method == "full" else Plan.uniform(schema, method, budget=16_000, full_below=1)
    return EmbeddingCollection(schema, plan, optimizer=optimizer, backend="native")


class Apart:
    """A layer that no lookup knows how to apply: a collection has to call it."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def mask_parameters(self, ids: Tensor) -> Any:
        parameters: masks.MaskParameters = self.layer.mask_parameters(ids)
        object.__setattr__(parameters, "fits", lambda ids, shape: False)
        return parameters

    def through(self, parameters: Any, vectors: Tensor, ids: Tensor) -> Tensor:
        object.__delattr__(parameters, "fits")
        out: Tensor = self.layer.through(parameters, vectors, ids)
        return out


@pytest.mark.crossed(2)
@pytest.mark.parametrize("optimizer", [None, rse.Adagrad(lr=0.1), rse.Adam(lr=0.1, weight_decay=0.01, rows="all")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["full", "hash", "compositional"])
def test_a_lookup_masks_as_the_layer_after_it(
    kind: str, method: str, optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for inside in (True, False):
        coll, layer = collection_of(16, method, optimizer), layer_of(kind, 16)
        if inside:
            monkeypatch.setattr(layer, "through", None)  # nobody may call it
        torch.manual_seed(1)
        for step in range(3):
            _, ids, upstream = batch_of(700, 16, step)
            out = coll(ids, mask=layer if inside else Apart(layer))
            out.backward(upstream)
        grads = [p.grad for p in (*coll.parameters(), *layer.parameters()) if p.grad is not None]
        with torch.no_grad():
            after = coll.eval()(ids, mask=layer.eval() if inside else Apart(layer.eval()))
        found.append([out.detach(), after, *grads, *(t for _, t in sorted(coll.state_dict().items()))])
    assert any(p.grad is not None for p in layer.parameters()) or kind == "dims only"
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_a_layer_wants_alone_moves_no_table() -> None:
    coll, layer = collection_of(8, "full", rse.Adam(lr=0.1)), layer_of("blocks", 8)
    _, ids, upstream = batch_of(64, 8)
    before = {name: t.clone() for name, t in coll.state_dict().items()}
    (grad,) = torch.autograd.grad((coll(ids, mask=layer) * upstream).sum(), [layer.alpha])
    with torch.no_grad():
        vectors = coll(ids)
    (wanted,) = torch.autograd.grad((layer.double()(vectors.double(), ids) * upstream).sum(), [layer.alpha])
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(t, before[name]) for name, t in coll.state_dict().items())


@pytest.mark.parametrize("kind", ["row", "blocks"])
@pytest.mark.parametrize("bad", [-1, 40, 2**31 - 1, 2**62, -(2**62)])
def test_ids_without_parameters_are_refused_before_memory_is_read(kind: str, bad: int) -> None:
    layer, (vectors, ids, _) = layer_of(kind, 16), batch_of(300, 16)
    ids[211, 1] = bad
    with pytest.raises(IdRangeError, match="mask"):
        layer(vectors, ids)
    with pytest.raises(IdRangeError, match="C1"):
        collection_of(16)(ids, mask=layer)
    hashed = collection_of(16, "hash")
    with pytest.raises(IdRangeError):
        hashed(ids, mask=layer)


def test_ids_of_any_layout() -> None:
    layer, (vectors, ids, _) = layer_of("row", 16), batch_of(300, 16)
    coll = collection_of(16)
    wanted = layer.eval()(vectors, ids), coll(ids, mask=layer)
    for form in (ids.int(), ids.t().contiguous().t(), ids.int().repeat(1, 2)[:, :3], ids.flip(0).flip(0)):
        assert torch.equal(layer(vectors, form), wanted[0])
        assert torch.equal(coll(form, mask=layer), wanted[1])
    scattered = vectors.transpose(0, 1).contiguous().transpose(0, 1)
    assert not scattered.is_contiguous()
    assert torch.equal(layer(scattered, ids), wanted[0])


def replaced(kind: str, name: str, shape: tuple[int, ...]) -> Any:
    """A layer whose parameter has become another."""
    layer = layer_of(kind, 8).eval()
    setattr(layer, name, nn.Parameter(torch.ones(shape)))
    return layer


DISAGREEING = {
    "alpha of fewer columns": lambda: replaced("blocks", "alpha", (9, 1)),
    "alpha of more columns": lambda: replaced("blocks", "alpha", (9, 16)),
    "alpha as a vector": lambda: replaced("blocks", "alpha", (9,)),
    "blocks of fewer fields": lambda: DnisLayer([torch.zeros(n) for n in SIZES[:2]], 8),
    "blocks of more fields": lambda: DnisLayer([torch.zeros(n) for n in (*SIZES, 5)], 8),
    "one threshold": lambda: replaced("field", "thresholds", (1,)),
    "thresholds of fewer fields": lambda: replaced("field", "thresholds", (2,)),
    "thresholds of fewer ids": lambda: replaced("row", "thresholds", (20,)),
    "fallback vectors of fewer columns": lambda: replaced("field oov", "oov", (3, 2)),
    "fallback vectors of fewer fields": lambda: replaced("field oov", "oov", (1, 8)),
    "a layer of more columns": lambda: layer_of("dims only", 16),
    "a layer of fewer fields": lambda: OptembedLayer(2, 8, oov=True),
}


@pytest.mark.parametrize("case", DISAGREEING)
def test_parameters_that_do_not_fit_are_left_to_torch(case: str) -> None:
    layer = DISAGREEING[case]()
    vectors, ids, _ = batch_of(50, 8)
    assert masks.mask_vectors(layer.mask_parameters(ids), ids, vectors) is None
    try:
        wanted = layer.double()(vectors.double(), ids).float()
    except (RuntimeError, IndexError) as error:
        with pytest.raises(type(error)):
            layer.float()(vectors, ids)
        with pytest.raises(type(error)):
            collection_of(8)(ids, mask=layer)
    else:
        torch.testing.assert_close(layer.float()(vectors, ids), wanted)


@pytest.mark.parametrize("kind", ["field", "row", "blocks"])
def test_vectors_of_other_shapes_than_ids_are_left_to_torch(kind: str) -> None:
    layer, (vectors, ids, _) = layer_of(kind, 8), batch_of(50, 8)
    layer.eval()
    parameters = layer.mask_parameters(ids)
    for shape in ((50, 3, 4), (50, 3, 16), (50, 2, 8), (50, 24), (5, 3, 8), (500, 3, 8)):
        assert masks.mask_vectors(parameters, ids, torch.ones(shape)) is None
    alone = torch.cat([layer(v.unsqueeze(0), i.unsqueeze(0)) for v, i in zip(vectors, ids, strict=True)])
    assert torch.equal(layer(vectors, ids), alone)
    assert torch.equal(layer(vectors, ids[:1]), layer(vectors, ids[:1].expand(50, 3)))
    assert torch.equal(layer(vectors[0], ids[0]), alone[0])
    none = OptembedLayer(0, 8)
    assert none(torch.ones(4, 0, 8), torch.zeros(4, 0, dtype=torch.int64)).shape == (4, 0, 8)


@pytest.mark.parametrize(
    "widths",
    [torch.tensor([3, 1, 2], dtype=torch.int32), torch.tensor([3.0, 1.0, 2.0]), torch.tensor(3), torch.tensor([2]),
     torch.tensor([[3, 1, 2]]), torch.tensor([-3, 0, 99])],
)  # fmt: skip
def test_widths_of_any_form_are_read_as_torch_reads_them(widths: Tensor) -> None:
    layer, (vectors, ids, _) = layer_of("dims only", 8), batch_of(50, 8)
    layer.eval().widths = widths
    wanted = vectors * layer.columns(widths)
    assert torch.equal(layer(vectors, ids), wanted)
    coll = collection_of(8)
    assert torch.equal(coll(ids, mask=layer), coll(ids) * layer.columns(widths))


def test_masks_are_for_one_vector_of_one_width_per_feature() -> None:
    coll = EmbeddingCollection(Schema([FeatureSpec("C0", 7, 4), FeatureSpec("C1", 7, 12)]), backend="native")
    with pytest.raises(ConfigError, match=r"one width; got \[4, 12\]"):
        coll(torch.zeros(5, 2, dtype=torch.int64), mask=OptembedLayer(2, 8))


def test_gradients_do_not_depend_on_the_default_type() -> None:
    layer, batch = layer_of("row", 16).eval(), batch_of(5000, 16)
    wanted = ran(layer, *batch)
    try:
        torch.set_default_dtype(torch.float16)
        found = ran(layer, *batch)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", ["row", "blocks"])
@pytest.mark.parametrize("bad", [-5, 2**40])
def test_ids_that_others_overwrite_before_backward_are_refused(kind: str, bad: int) -> None:
    layer, (vectors, ids, upstream) = layer_of(kind, 16), batch_of(300, 16)
    memory = ids.numpy()  # as loaders have it: no version tells of a change
    for out in (
        layer(vectors.clone().requires_grad_(), torch.from_numpy(memory)),
        collection_of(16)(torch.from_numpy(memory), mask=layer),
    ):
        kept = memory[200, 1]
        memory[200, 1] = bad
        with pytest.raises(RuntimeError, match="ids changed"):
            out.backward(upstream)
        memory[200, 1] = kept


def test_widths_that_moved_in_between_are_noticed() -> None:
    layer, (vectors, ids, upstream) = layer_of("dims only", 8).eval(), batch_of(16, 8)
    layer.widths = torch.tensor([3, 1, 2])
    out = layer(vectors.requires_grad_(), ids)
    layer.widths.fill_(8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(upstream)


def test_a_norm_that_is_no_number_is_seen_in_the_loss() -> None:
    layer = layer_of("field", 8)
    vectors, ids, upstream = batch_of(4, 8)
    vectors[2, 1, 0] = math.nan
    out, grad, _ = ran(layer.eval(), vectors, ids, upstream)
    assert out[2, 1, 0].isnan()
    assert not out[[0, 1, 3]].isnan().any()
    assert not grad[[0, 1, 3]].isnan().any()


def test_bags_have_no_mask() -> None:
    with pytest.raises(ConfigError, match="bags"):
        collection_of(8)(torch.arange(6), torch.arange(7), mask=layer_of("field", 8))


def test_thresholds_that_moved_in_between_are_noticed() -> None:
    layer, coll = layer_of("field", 8), collection_of(8)
    _, ids, upstream = batch_of(16, 8)
    out = coll(ids, mask=layer)
    with torch.no_grad():
        layer.thresholds.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(upstream)
