"""What every drop-in shares, over the registry: torch's calls, padding, state, precision, fitting."""

from __future__ import annotations

import copy
import json
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed.core import hashing
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import BudgetError, CheckpointError, ConfigError, RecsysEmbedError, UnknownNameError
from recsys_embed.registry import list_methods
from recsys_embed.testing import example

ROWS, WIDTH = 61, 4
# Each registered method at half its bytes, and options that take other paths through the base class.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "hash sign": ("hash", {"num_buckets": 7, "sign": True}),
    "hash mod": ("hash", {"num_buckets": 7, "hash": "mod"}),
    "multihash mean": ("multihash", {"num_buckets": 9, "combine": "mean"}),
    "multihash concat": ("multihash", {"num_buckets": 9, "combine": "concat", "separate": True}),
    "multihash weights": ("multihash", {"num_buckets": 9, "weights": "flat", "num_weights": 20}),
    "multihash head": ("multihash", {"num_buckets": 9, "num_frequent": 5}),
    "unified sum": ("unified", {"num_buckets": 9, "combine": "sum"}),
    "unified projected": ("unified", {"num_buckets": 9, "num_hashes": 3, "dim": 2}),
    "compositional sum": ("compositional", {"num_collisions": 5, "combine": "sum"}),
    "compositional feature": ("compositional", {"num_collisions": 5, "combine": "feature"}),
    "compositional path": ("compositional", {"num_collisions": 30, "combine": "path", "hidden": 2}),
    "memcom bias": ("memcom", {"num_buckets": 7, "bias": True, "hash": "splitmix64"}),
    "robe blocks": ("robe", {"num_elements": 50, "block_size": 3, "wrap": False, "sign": True}),
    "robe elements": ("robe", {"num_elements": 50, "block_size": 1}),
    "adaptive counts": ("adaptive", {"num_frequent": 9, "num_buckets": 7, "order": "counts"}),
    "freqcut counts": ("freqcut", {"num_frequent": 20, "order": "counts"}),
    "mixeddim blocks": ("mixeddim", {"dims": (4, 2, 1), "blocks": (5, 20)}),
    "mixeddim counts": ("mixeddim", {"dims": (3, 1), "blocks": (30,), "order": "counts"}),
    "compositional three": ("compositional", {"moduli": (4, 4, 4), "partition": "generalized"}),
}
NAMES = [m.name for m in list_methods()] + list(OPTIONS)
COMPRESSED = [n for n in NAMES if n != "full"]
RAW = [n for n in NAMES if rse.get_method(OPTIONS[n][0] if n in OPTIONS else n).config_cls.accepts_raw]


def build(key: str, rows: int = ROWS, width: int = WIDTH, **options: Any) -> CompressedEmbedding:
    if key in OPTIONS:
        method, params = OPTIONS[key]
        return rse.make_embedding(method, rows, width, **{"seed": 0, **params, **options})
    return example(rse.get_method(key), rows, width, **options)


def loss(out: Tensor) -> Tensor:
    return (out * torch.arange(1, out.numel() + 1).view(out.shape).to(out)).sum()


@pytest.mark.crossed
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 3, -1])
def test_bags_are_pooled_vectors_of_their_ids(name: str, mode: str, padding: int | None) -> None:
    bag = build(name, mode=mode, padding_idx=padding, dtype=torch.float64)
    plain = build(name, padding_idx=padding, dtype=torch.float64)
    plain.load_state_dict(bag.state_dict())
    ids = torch.tensor([3, 60, 60, 7, 3, 0, 9, 3, 3])
    offsets = torch.tensor([0, 0, 3, 4, 7, 9])
    pad = None if padding is None else padding % ROWS
    expected = []
    for start, stop in zip(offsets.tolist(), [*offsets.tolist()[1:], 9], strict=True):
        kept = [i for i in ids[start:stop].tolist() if i != pad]
        vectors = plain(torch.tensor(kept, dtype=torch.int64))
        if not kept:
            expected.append(torch.zeros(bag.output_dim, dtype=torch.float64))
        else:
            expected.append(vectors.max(0).values if mode == "max" else getattr(vectors, mode)(0))
    wanted = torch.stack(expected)
    out = bag(ids, offsets)
    torch.testing.assert_close(out, wanted)
    grads = torch.autograd.grad(loss(out), list(bag.parameters()), allow_unused=True)
    rights = torch.autograd.grad(loss(wanted), list(plain.parameters()), allow_unused=True)
    for grad, right in zip(grads, rights, strict=True):
        assert (grad is None) == (right is None)
        if grad is not None:
            torch.testing.assert_close(grad, right)
    torch.testing.assert_close(bag(ids.int(), offsets.int()), wanted)
    closed = build(name, mode=mode, padding_idx=padding, dtype=torch.float64, include_last_offset=True)
    torch.testing.assert_close(closed(ids, torch.cat([offsets, torch.tensor([9])])), wanted)
    square = ids.view(3, 3)
    torch.testing.assert_close(bag(square), bag(ids, torch.tensor([0, 3, 6])))
    torch.testing.assert_close(closed(square), bag(square))


@pytest.mark.crossed
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", [None, 3])
def test_per_sample_weights_and_their_gradient(name: str, padding: int | None) -> None:
    bag = build(name, mode="sum", padding_idx=padding, dtype=torch.float64)
    plain = build(name, padding_idx=padding, dtype=torch.float64)
    ids, offsets = torch.tensor([3, 60, 60, 7, 3]), torch.tensor([0, 2, 2])
    weights = torch.tensor([0.5, -2.0, 3.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    vectors = plain(ids)
    if padding is not None:
        vectors = vectors * (ids != padding).unsqueeze(1)
    rows = vectors * weights.unsqueeze(1)
    wanted = torch.stack([rows[:2].sum(0), rows[2:2].sum(0), rows[2:].sum(0)])
    out = bag(ids, offsets, weights)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(loss(out), weights)[0], torch.autograd.grad(loss(wanted), weights)[0]
    )
    with pytest.raises(ValueError, match=r"shape.*\(?\[?5"):
        bag(ids.view(1, 5), None, weights)


@pytest.mark.crossed
@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("padding", [0, 7, -1, -ROWS])
def test_padding_is_zero_and_learns_nothing(name: str, padding: int) -> None:
    module = build(name, padding_idx=padding)
    assert module.padding_idx == padding % ROWS
    out = module(torch.tensor([[padding % ROWS, 5]]))
    assert not out[0, 0].any()
    assert out[0, 1].any()
    out[0, 0].sum().backward()
    for key, p in module.named_parameters():
        assert p.grad is None or not p.grad.any(), key
    assert not module.materialize()[padding % ROWS].any()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_in_float64(name: str) -> None:
    module = build(name, dtype=torch.float64)
    keys, values = zip(*module.named_parameters(), strict=True)
    ids = torch.tensor([[0, 60], [7, 7]])

    def run(*parameters: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(module, dict(zip(keys, parameters, strict=True)), (ids,))
        return out

    assert torch.autograd.gradcheck(run, tuple(v.detach().clone().requires_grad_(True) for v in values))


@pytest.mark.parametrize("name", NAMES)
def test_sparse_and_dense_gradients_agree(name: str) -> None:
    ids = torch.tensor([0, 60, 7, 7])
    dense, sparse = build(name), build(name, sparse=True)
    for module in (dense, sparse):
        loss(module(ids)).backward()
    read_by_row = {p.table for p in dense.program.row_lookups}
    for (key, a), b in zip(dense.named_parameters(), sparse.parameters(), strict=True):
        assert b.grad.is_sparse == (key in read_by_row or b.grad.is_sparse), key
        torch.testing.assert_close(b.grad.to_dense() if b.grad.is_sparse else b.grad, a.grad)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_strides_and_whole_table(name: str) -> None:
    module = build(name)
    whole = module.materialize()
    assert whole.shape == (ROWS, module.output_dim)
    assert not whole.requires_grad
    for ids in (
        torch.tensor(5),
        torch.arange(ROWS),
        torch.arange(60).view(5, 12).t()[::2, ::3],
        torch.tensor([[4]]).expand(3, 5),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(2, 0, 3, dtype=torch.int32),
    ):
        torch.testing.assert_close(module(ids), whole[ids.long()])
        assert torch.equal(module(ids.int()), module(ids))
    whole.zero_()
    assert module(torch.arange(ROWS)).any(), "a copy: writing to it does not reach the module"


@pytest.mark.parametrize("name", NAMES)
def test_the_bits_depend_on_seed_and_name_alone(name: str) -> None:
    first = build(name)
    torch.manual_seed(123)
    again = build(name)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        parallel = build(name)
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(first.parameters(), again.parameters(), parallel.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    ids = torch.arange(ROWS)
    assert not torch.equal(build(name, name="other")(ids), first(ids)), "another name, other weights or rows"
    before = torch.random.get_rng_state()
    build(name)
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator is not touched"


@pytest.mark.parametrize("name", NAMES)
def test_hashes_survive_changes_of_precision_and_device(name: str) -> None:
    ids = torch.arange(ROWS)
    module = build(name)
    reference = module(ids)
    torch.testing.assert_close(copy.deepcopy(module).double()(ids), reference.double(), rtol=1e-5, atol=1e-6)
    low = copy.deepcopy(module).half()
    assert low(ids).dtype == torch.float16
    torch.testing.assert_close(low(ids).float(), reference, rtol=0.02, atol=0.02)
    assert torch.equal(copy.deepcopy(module).to("cpu")(ids), reference)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(ids), reference)
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert torch.equal(module(ids), reference), "a copy is independent"


@pytest.mark.crossed
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [None, "sum"])
def test_through_the_meta_device(name: str, mode: str | None) -> None:
    direct, lazy = build(name, mode=mode), build(name, mode=mode, device="meta")
    assert all(p.is_meta for p in lazy.parameters())
    assert lazy(torch.zeros(2, 3, dtype=torch.int64, device="meta")).is_meta
    with torch.device("meta"):
        inside = build(name, mode=mode)
    for module in (lazy, inside):
        module.to_empty(device="cpu").reset_parameters()
        for (key, a), b in zip(direct.named_parameters(), module.parameters(), strict=True):
            assert torch.equal(a, b), key
        ids = torch.tensor([[0, 60, 7]])
        assert torch.equal(module(ids), direct(ids))


@pytest.mark.parametrize("name", COMPRESSED)
def test_state_of_another_configuration_is_refused_before_any_weight_moves(name: str) -> None:
    module = build(name)
    for options, what in (({"name": "other"}, "spec.name"), ({"rows": ROWS + 1}, "spec.num_embeddings")):
        other = build(name, **options)
        before = [p.detach().clone() for p in other.parameters()]
        with pytest.raises(CheckpointError, match=what):
            other.load_state_dict(module.state_dict())
        for a, b in zip(before, other.parameters(), strict=True):
            assert torch.equal(a, b)
    again = build(name, init="normal:0.5", mode="sum")
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.materialize(), module.materialize())
    model = nn.Sequential(build(name))
    with pytest.raises(CheckpointError, match="state of 0 "):
        model.load_state_dict(nn.Sequential(build(name, name="other")).state_dict())


@pytest.mark.parametrize(
    "damage",
    [
        torch.zeros(0, dtype=torch.uint8),
        torch.tensor([255, 254], dtype=torch.uint8),
        torch.frombuffer(bytearray(b"[1, 2]"), dtype=torch.uint8),
        torch.frombuffer(bytearray(b"null"), dtype=torch.uint8),
        torch.frombuffer(bytearray(b"[" * 100_000), dtype=torch.uint8),
        torch.frombuffer(bytearray(b'{"spec": 1, "config": [1e999]}'), dtype=torch.uint8),
        torch.zeros(3),
        torch.zeros(3, dtype=torch.uint8, device="meta"),
        "text",
        None,
    ],
    ids=repr,
)
def test_damaged_configurations_in_a_state_dict_are_refused(damage: Any) -> None:
    module = build("hash")
    state = {**module.state_dict(), "_extra_state": damage}
    with pytest.raises(CheckpointError):
        build("hash").load_state_dict(state)


def test_state_dicts_pass_through_torch_save_and_safe_load(tmp_path: Any) -> None:
    module = build("hash")
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other = build("hash", init="normal:0.1")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.weight, module.weight)
    saved = json.loads(bytes(module.state_dict()["_extra_state"].numpy()))
    assert saved["config"]["method"] == "hash"


@pytest.mark.parametrize("name", RAW)
@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8))
def test_hashing_methods_take_any_int64(name: str, ids: list[int]) -> None:
    module = build(name)
    out = module(torch.tensor(ids + ids))
    assert torch.isfinite(out).all()
    assert torch.equal(out[: len(ids)], out[len(ids) :])
    # The last bits of torch's products depend on the number of rows.
    same = torch.equal if module.program.row_lookups else partial(torch.allclose, atol=1e-6)
    for i, value in enumerate(ids):
        assert same(module(torch.tensor(value)), out[i]), "a vector does not depend on its neighbours"


@pytest.mark.crossed
@pytest.mark.parametrize("name", [n for n in NAMES if n not in RAW])
@pytest.mark.parametrize("bad", [-1, ROWS, 2**40, -(2**63)])
def test_index_methods_refuse_ids_out_of_range(name: str, bad: int) -> None:
    for module in (build(name), build(name, mode="sum")):
        ids = torch.tensor([[0, bad]])
        with pytest.raises(IndexError, match=rf"\[0, {ROWS}\); got values from"):
            module(ids)


# -- from_dense -------------------------------------------------------------------------------------------------------


@pytest.mark.crossed
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [None, "sum"])
def test_what_a_method_can_represent_is_recovered(name: str, mode: str | None) -> None:
    if name in ("compositional path", "multihash weights"):
        pytest.skip("not linear in its parameters, so recovery is approximate at best")
    source = build(name, dtype=torch.float64)
    if source.output_dim != WIDTH:
        pytest.skip("emits several vectors per id, one target cannot give them apart")
    if source.program.combine == "mul":
        pytest.skip("a product has many factorisations and alternating least squares may stop at another")
    target = source.materialize()
    kept = {"config": source.config, "mode": mode, "sparse": mode is None}
    fitted = type(source).from_dense(target, **kept)
    assert fitted.weight.dtype == torch.float64 if hasattr(fitted, "weight") else True
    error = (fitted.materialize() - target).norm() / target.norm()
    assert error < 0.05, f"{error:.2e}"


@pytest.mark.parametrize("zipf", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("sign", [False, True])
def test_hash_fits_the_weighted_mean_of_each_bucket(zipf: float, sign: bool) -> None:
    rows, buckets = 3000, 50
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(rows, 4, generator=generator)
    counts = 1e6 * torch.arange(1, rows + 1, dtype=torch.float64) ** -zipf
    fitted = rse.HashEmbedding.from_dense(target, counts=counts, num_buckets=buckets, sign=sign)
    ids = torch.arange(rows)
    row = hashing.hash_rows(ids, hashing.salt(0, "embedding", "row", 0), buckets)
    signs = hashing.hash_signs(ids, hashing.salt(0, "embedding", "sign", 0)) if sign else torch.ones(rows)
    weighted = target.double() * (counts * signs).unsqueeze(1)
    total = torch.zeros(buckets, dtype=torch.float64).index_add_(0, row, counts)
    means = torch.zeros(buckets, 4, dtype=torch.float64).index_add_(0, row, weighted) / total.unsqueeze(1)
    torch.testing.assert_close(fitted.weight.detach().double(), means, rtol=1e-3, atol=1e-4)


def test_a_half_precision_table_is_fitted_in_float32() -> None:
    target = 30 * torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    best = rse.HashEmbedding.from_dense(target, num_buckets=20).weight
    for dtype in (torch.float16, torch.bfloat16):
        fitted = rse.HashEmbedding.from_dense(target.to(dtype), num_buckets=20)
        assert fitted.weight.dtype == dtype
        torch.testing.assert_close(fitted.weight.float(), best, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("name", COMPRESSED)
def test_from_dense_checks_what_it_is_given(name: str) -> None:
    cls, config = type(build(name)), build(name).config
    good = torch.randn(ROWS, WIDTH)
    bad: list[tuple[Tensor, dict[str, Any], str]] = [
        (torch.zeros(3), {}, "num_embeddings, embedding_dim"),
        (torch.zeros(ROWS, WIDTH, dtype=torch.int64), {}, "floating"),
        (torch.full((ROWS, WIDTH), float("nan")), {}, "finite"),
        (good, {"counts": torch.ones(ROWS - 1)}, "counts"),
        (good, {"counts": torch.full((ROWS,), float("nan"))}, "counts"),
        (good, {"counts": -torch.ones(ROWS)}, "counts"),
        (good, {"counts": ["x"] * ROWS}, "arrays of numbers"),
    ]
    for weight, options, what in bad:
        with pytest.raises(ConfigError, match=what):
            cls.from_dense(weight, config=config, **options)
    counts = torch.arange(ROWS) + 1.0
    wanted = cls.from_dense(good, counts=counts, config=config).state_dict()
    for weight, held in ((good.numpy(), counts.numpy()), (good, counts.tolist())):
        found = cls.from_dense(weight, counts=held, config=config).state_dict()  # type: ignore[arg-type]
        assert all(torch.equal(found[key], value) for key, value in wanted.items())


# -- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPRESSED)
def test_options_of_torch_that_are_not_supported_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)max_norm.*scale_grad_by_freq"):
        build(name, max_norm=1.0, scale_grad_by_freq=True)
    with pytest.raises(ConfigError, match="mode"):
        build(name, mode="median")
    with pytest.raises(ConfigError, match="padding_idx"):
        build(name, padding_idx=ROWS)


@pytest.mark.parametrize("method", [m.name for m in list_methods()])
def test_wrong_arguments_say_what_is_wrong(method: str) -> None:
    cases: list[tuple[type[RecsysEmbedError], dict[str, Any], str]] = [
        (UnknownNameError, {"sede": 3, "budget": "1MiB"}, "did you mean 'seed'"),
        (ConfigError, {"seed": "1", "budget": "1MiB"}, "`seed` must be an integer"),
        (ConfigError, {"budget": "1 potato"}, "byte size"),
        (ConfigError, {"budget": "1MiB", "config": build(method).config}, "got both"),
        (ConfigError, {"config": {"method": method}}, "Config"),
        (BudgetError, {"budget": 1}, "needs at least .* available .*Ways out: 1"),
        (ConfigError, {"budget": "1MiB", "init": "normal"}, "init"),
        (ConfigError, {"budget": "1MiB", "name": "a.b"}, "name"),
    ]
    for kind, options, text in cases:
        with pytest.raises(kind, match=text):
            rse.make_embedding(method, 1000, 8, **options)
    for rows, width in ((0, 8), (-1, 8), (2**31, 8), (10, 0), (10.5, 8), (True, 8), ("10", 8), (None, 8)):
        with pytest.raises(ConfigError, match=r"num_embeddings|embedding_dim"):
            rse.make_embedding(method, rows, width, budget="1MiB")


def test_calls_that_do_not_fit_say_so() -> None:
    plain, bag = build("hash"), build("hash", mode="sum")
    ids = torch.tensor([1, 2, 3])
    for call, text in (
        (lambda: plain([1, 2]), "got list"),
        (lambda: plain(torch.tensor([1.0])), "float32"),
        (lambda: plain(torch.tensor([True])), "bool"),
        (lambda: plain(ids, torch.tensor([0])), "mode="),
        (lambda: bag(ids), "2-D `ids`"),
        (lambda: bag(ids.view(1, 1, 3)), "3-D ids"),
        (lambda: bag(ids.view(1, 3), torch.tensor([0])), "no `offsets`"),
        (lambda: bag(ids, torch.tensor([0.0])), "float32"),
        (lambda: bag(ids, [0]), "list"),
        (lambda: bag(ids, torch.tensor([1])), "rise from 0"),
        (lambda: bag(ids, torch.tensor([0, 2, 1])), "falling"),
        (lambda: bag(ids, torch.tensor([0, 4])), "number of ids, 3"),
        (lambda: bag(ids, torch.tensor([[0]])), "1-D"),
    ):
        with pytest.raises(ConfigError, match=text):
            call()
    with pytest.raises(UnknownNameError, match="did you mean 'hash'"):
        rse.make_embedding("hsh", 10, 4)
    with pytest.raises(ConfigError, match="taken"):
        rse.make_embedding("unified", 10, 4, num_buckets=5, table="forward")


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("name", ["full", "hash"])
def test_no_bags_give_no_vectors(name: str, mode: str) -> None:
    module = rse.make_embedding(name, ROWS, WIDTH, mode=mode, **({} if name == "full" else {"num_buckets": 7}))
    none = torch.empty(0, dtype=torch.long)
    assert module(torch.tensor([1, 2]), none).shape == module(none, none).shape == (0, WIDTH)


@pytest.mark.parametrize("name", ["hash", "compositional path"])
def test_pooling_compiles_whole_with_a_dynamic_batch(name: str) -> None:
    torch._dynamo.reset()
    module = build(name, mode="sum", padding_idx=3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 3), (5, 4)):
        ids = torch.arange(shape[0] * shape[1]).view(shape)
        torch.testing.assert_close(compiled(ids), module(ids))


def test_a_plain_tables_state_points_to_from_dense() -> None:
    with pytest.raises(RuntimeError, match=r"HashEmbedding\.from_dense\(weight"):
        rse.make_embedding("hash", 100, 4, num_buckets=9).load_state_dict(torch.nn.Embedding(100, 4).state_dict())


def test_misspelt_constructor_options_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'budget'"):
        rse.make_embedding("hash", 100, 4, budgt="1KiB")


def test_a_torch_optimizer_is_refused_with_the_way_to_use_it() -> None:
    schema = rse.Schema([rse.FeatureSpec("a", 10, 4)])
    with pytest.raises(ConfigError, match="optimizer=None"):
        rse.EmbeddingCollection(schema, optimizer=torch.optim.Adam)
