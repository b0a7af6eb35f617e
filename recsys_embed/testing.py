"""The contract every method, backend and model keeps, shipped so that third parties can run it on theirs.

Each check is a function that raises AssertionError with what it expected and got; ``check_embedding``,
``check_backend`` and ``check_model`` run all checks of their kind.
"""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.method_checks import faults_of
from recsys_embed.errors import BackendError, BudgetError, CheckpointError, RecsysEmbedError
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.kernels import reference
from recsys_embed.optim import SGD, Adam
from recsys_embed.plan import Plan
from recsys_embed.planning.costs import Costs
from recsys_embed.registry import MethodInfo, config_from_dict, get_method, list_methods
from recsys_embed.report.memory import memory_report

ROWS, WIDTH = 403, 8
IDS = torch.tensor([[0, 402, 7], [7, 31, 400]])


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, ``torch.empty`` returns NaN, so that reading memory nobody wrote shows."""
    flags: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), flags.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    flags.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        flags.fill_uninitialized_memory = before[1]


@contextmanager
def refused(error: type[Exception], *words: str) -> Iterator[None]:
    """Inside, ``error`` must be raised with all ``words`` in its text."""
    try:
        yield
    except error as e:
        text = str(e)
    else:
        raise AssertionError(f"expected {error.__name__} naming {', '.join(words)}; nothing was raised")
    absent = [w for w in words if w not in text]
    if absent:
        raise AssertionError(f"the error must name {', '.join(absent)}; got {text}")


def example(method: MethodInfo, rows: int = ROWS, width: int = WIDTH, **options: Any) -> CompressedEmbedding:
    """A module of the method at half the bytes of a plain table, or as near as the method allows."""
    spec = FeatureSpec("embedding", rows, width, unseen=options.get("unseen"))
    itemsize = (options.get("dtype") or torch.get_default_dtype()).itemsize
    whole = rows * width * itemsize
    need = method.config_cls.sized(spec, 1).footprint(spec, itemsize).serve
    with poisoned_memory():
        return method.embedding_cls(rows, width, budget=max(whole // 2, need), **options)


def _ids(module: CompressedEmbedding) -> Tensor:
    return IDS % module.num_embeddings


def names_follow_the_key(method: MethodInfo) -> None:
    key = method.name.title().replace("_", "")
    assert method.config_cls.method == method.name
    for cls, suffix in ((method.embedding_cls, "Embedding"), (method.config_cls, "Config")):
        assert cls.__name__ == key + suffix, f"expected class {key + suffix}, got {cls.__name__}"
        assert ">>>" in (cls.__doc__ or ""), f"{cls.__name__} needs a docstring with an example that runs"
    assert method.paper, "a method names its source"


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
    assert torch.equal(shared(seen), shared.materialize()[seen]), "seen ids keep their own vectors"
    rows.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in shared.parameters()), "the shared vector must learn"
    held = {k: v for k, v in shared.state_dict().items() if not k.endswith("_extra_state")}
    assert shared.footprint().serve == sum(v.nbytes for v in held.values()), "the footprint must count its row"
    nothing = example(method, unseen="zero")
    out = nothing(ids)
    assert not out[: len(unseen)].any(), "unseen ids must give zeros"
    assert torch.equal(out[len(unseen) :], plain(seen)), "seen ids must not feel the policy"
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


def same_seed_same_bits(method: MethodInfo) -> None:
    first, again, other = example(method), example(method), example(method, seed=1)
    for a, b, name in zip(first.parameters(), again.parameters(), dict(first.named_parameters()), strict=True):
        assert torch.equal(a, b), f"{name} differs between two builds of one seed"
        assert not torch.isnan(a).any(), f"{name} holds memory nobody wrote"
    assert not torch.equal(first.materialize(), other.materialize()), "another seed must give other weights"


def starts_with_the_law_of_a_plain_table(method: MethodInfo) -> None:
    for init, std in (("normal:1", 1.0), ("uniform:0.3", 0.3 / 3**0.5)):
        tables = [example(method, 2003, 16, init=init, seed=s).materialize() for s in range(4)]
        values = torch.stack(tables).double()
        values = values[values != 0]  # what a method has pruned follows no law
        assert abs(values.mean()) < 0.2 * std, f"init {init}: mean {values.mean():.4f}, expected about 0"
        assert 0.75 * std < values.std() < 1.25 * std, f"init {init}: std {values.std():.4f}, expected about {std:.4f}"


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
    if module.config.computes:
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


def state_round_trips_and_refuses_others(method: MethodInfo) -> None:
    module = example(method)
    other = example(method, init="normal:0.1")
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(_ids(module)), module(_ids(module)))
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(_ids(module)), module(_ids(module)))
    if method.name == "full":
        return  # a plain table means the same under every seed
    with refused(CheckpointError, "seed"):
        example(method, seed=1).load_state_dict(module.state_dict())


def footprint_is_what_is_stored(method: MethodInfo) -> None:
    module = example(method)
    stated = module.footprint()
    held = sum(p.numel() * p.element_size() for p in module.parameters())
    state = {k: v for k, v in module.state_dict().items() if not k.endswith("_extra_state")}
    stored = sum(v.numel() * v.element_size() for v in state.values())
    assert stated.weights == held, f"footprint states {stated.weights} bytes of weights; parameters hold {held}"
    assert stated.serve == stored, f"footprint states {stated.serve} bytes to serve; the state dict holds {stored}"


def budgets_are_kept(method: MethodInfo) -> None:
    spec = FeatureSpec("embedding", 5000, 16)
    last, met = 0, 0
    for divisor in (1000, 100, 20, 4, 2, 1):
        budget = 5000 * 16 * 4 // divisor
        try:
            config = method.config_cls.for_budget(spec, budget)
        except BudgetError:
            with refused(BudgetError, "needs at least", "available", "Ways out"):
                method.config_cls.for_budget(spec, budget)
            if met:
                raise AssertionError("a larger budget must not be harder to meet") from None
            continue
        size, met = config.footprint(spec).serve, met + 1
        assert last <= size <= budget, f"budget {budget}: sized {size} after {last}"
        last = size
    assert met, "no budget up to the plain table's bytes can be met"
    half = max(5000 * 16 * 4 // 2, method.config_cls.sized(spec, 1).footprint(spec).serve)
    fitted = method.config_cls.for_budget(spec, half)
    for dtype in (torch.float64, torch.bfloat16):
        # Index arrays take the same bytes beside elements of any type.
        budget = fitted.footprint(spec, dtype.itemsize).serve
        module = method.embedding_cls(5000, 16, budget=budget, dtype=dtype)
        assert module.footprint().serve <= budget, f"budget {budget} at {dtype}: sized {module.footprint().serve}"
        assert module.config == fitted, f"a budget must count elements of {dtype}"


def config_is_data(method: MethodInfo) -> None:
    config = example(method).config
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(copy.deepcopy(config))
    with refused(RecsysEmbedError, "sede", "seed"):
        method.config_cls.from_params({"sede": 1})


def options_are_given_by_keyword(method: MethodInfo) -> None:
    faults = faults_of(method.embedding_cls)
    assert not faults, "; ".join(faults)
    config = example(method).config
    options = {name: value for name, value in config.to_dict().items() if name != "method"}
    assert method.embedding_cls(ROWS, WIDTH, **options).config == config, "an option given by keyword is lost"
    uniform = Plan.uniform(Schema([FeatureSpec("embedding", ROWS, WIDTH)]), method.name, **options)
    assert uniform["embedding"] == config, "an option given by keyword to a plan is lost"


def names_of_earlier_versions_are_read(method: MethodInfo) -> None:
    cls, config = method.config_cls, example(method).config
    now = config.to_dict()
    renamed = {old: new for old, new in cls.renamed_options.items() if new in now}
    before = {next((old for old, new in renamed.items() if new == name), name): v for name, v in now.items()}
    assert config_from_dict(before) == config, "a configuration saved under earlier names must be read"
    for old, new in renamed.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert (
                cls(**{old if name == new else name: getattr(config, name) for name in now if name != "method"})
                == config
            )
            assert getattr(config, old) == getattr(config, new)
        assert [w.category for w in caught] == [DeprecationWarning] * 2, f"`{old}` must warn; got {caught}"


def what_is_planned_is_declared(method: MethodInfo) -> None:
    cls, spec = method.config_cls, FeatureSpec("embedding", ROWS, WIDTH)
    if cls.width_option is not None:
        for size, width in ((3, 2), (3, 5), (7, 2)):
            config = cls.sized(spec, size, **{cls.width_option: width})
            assert getattr(config, cls.width_option) == width, f"`{cls.width_option}` must be free of the size"
    if cls.order_option is not None:
        ranked, counted = (cls.sized(spec, 3, **{cls.order_option: order}) for order in ("ids", "counts"))
        assert not ranked.footprint(spec).index, "ids in order of frequency need no stored set"
        if ranked.program(spec).indexes:
            assert counted.footprint(spec).index, "the footprint must count the stored set of ids"
    last = 0
    for size in range(1, min(cls.max_size(spec), 64) + 1):
        need = cls.sized(spec, size).footprint(spec).serve
        assert need >= last, f"size {size} takes {need} bytes, fewer than the {last} of the size before"
        last = need


def survives_the_meta_device(method: MethodInfo) -> None:
    options: dict[str, Any] = {"budget": example(method).footprint().serve}
    built = method.embedding_cls(ROWS, WIDTH, **options)
    lazy = method.embedding_cls(ROWS, WIDTH, device="meta", **options)
    assert all(p.is_meta for p in lazy.parameters())
    lazy.to_empty(device="cpu")
    lazy.reset_parameters()
    assert torch.equal(lazy(_ids(lazy)), built(_ids(built)))


def compiles_and_exports_whole(method: MethodInfo) -> None:
    module = example(method)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(_ids(module)), module(_ids(module)))
    dynamic = {"input": {0: torch.export.Dim("batch")}, "offsets": None, "per_sample_weights": None}
    exported = torch.export.export(module, (torch.arange(7), None, None), dynamic_shapes=dynamic)
    ids = torch.arange(11)
    torch.testing.assert_close(exported.module()(ids, None, None), module(ids))


def fits_a_trained_table(method: MethodInfo) -> None:
    module = example(method, 200, 8)
    target = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, 8)
    fitted = method.embedding_cls.from_dense(target, config=module.config)
    target = target.repeat(1, module.output_dim // 8)
    error = (fitted.materialize() - target).square().mean() / target.square().mean()
    assert error < 0.95, f"the fit must beat predicting zero; relative squared error {error:.3f}"


def runs_in_a_collection(method: MethodInfo) -> None:
    schema = Schema([FeatureSpec("a", ROWS, WIDTH), FeatureSpec("b", 50, WIDTH), FeatureSpec("c", 999, WIDTH)])
    need = {s.name: method.config_cls.sized(s, 1).footprint(s).serve for s in schema}
    plan = Plan({s.name: method.config_cls.for_budget(s, max(need[s.name], s.num_embeddings * 16)) for s in schema})
    try:
        collection = EmbeddingCollection(schema, plan)
    except RecsysEmbedError:  # features that share a table must agree in its size
        plan = Plan.uniform(schema, method.name, budget=max(sum(need.values()), 1452 * 16))
        collection = EmbeddingCollection(schema, plan)
    ids = torch.tensor([[402, 49, 998], [0, 0, 0]])
    out = collection(ids)
    vectors = sum(plan[s.name].program(s).vectors for s in schema)
    assert out.shape == (2, vectors, WIDTH), f"a collection must give (2, {vectors}, {WIDTH}); got {tuple(out.shape)}"
    torch.testing.assert_close(out, EmbeddingCollection(schema, plan, backend="reference")(ids))
    torch.testing.assert_close(collection(ids.T.reshape(-1), torch.arange(7)), out)
    with poisoned_memory():
        fused = EmbeddingCollection(schema, plan, optimizer=SGD(lr=0.1))
    out.square().sum().backward()
    fused(ids).square().sum().backward()
    for name, p in collection.named_parameters():
        after = fused.get_parameter(name)
        expected = p - 0.1 * p.grad if p.grad is not None and not after.requires_grad else p
        torch.testing.assert_close(after, expected, msg=f"{name}: a fused step must equal a plain one")
        if after.requires_grad:
            torch.testing.assert_close(after.grad, p.grad)


def _mixed(method: MethodInfo, width: int) -> tuple[Schema, Plan]:
    """The method beside plain tables of a width."""
    schema = Schema(
        [FeatureSpec("plain", 50, width), FeatureSpec("embedding", ROWS, WIDTH), FeatureSpec("last", 9, width)]
    )
    plain = Plan.full(schema)
    return schema, Plan({**plain.configs, "embedding": example(method).config})


def stands_beside_others_in_a_collection(method: MethodInfo) -> None:
    ids = torch.tensor([[49, 402, 8], [0, 0, 0], [3, 7, 1]])
    for width in (WIDTH, WIDTH + 4):
        schema, plan = _mixed(method, width)
        for backend in ("auto", "torch", "reference"):
            collection = EmbeddingCollection(schema, plan, backend=backend)
            module = method.embedding_cls(
                ROWS, WIDTH, config=plan["embedding"], init=schema["embedding"].init, mode="sum"
            )
            own = module(ids[:, 1:2])
            plain, last = (collection.table(f"{n}.weight")[ids[:, i]] for n, i in (("plain", 0), ("last", 2)))
            wanted = torch.cat([plain, own, last], 1)
            for out in (collection(ids), collection(ids.T.reshape(-1), torch.arange(10))):
                where = f"beside plain tables of width {width}, backend {backend!r}"
                assert out.numel() == wanted.numel(), f"{where}: expected {wanted.shape[1]} columns, got {out.shape}"
                torch.testing.assert_close(out.flatten(1), wanted, msg=f"{where}: other vectors than alone")


def training_bytes_agree(method: MethodInfo) -> None:
    schema, plan = _mixed(method, WIDTH)
    for optimizer in (SGD(lr=0.1), Adam(lr=0.1)):
        collection = EmbeddingCollection(schema, plan, optimizer)
        collection(torch.tensor([[49, 402, 8]])).square().sum().backward()
        held = collection.footprint().train
        dense = sum(p.nbytes for p in collection.parameters() if p.requires_grad)
        state = [v for k, v in collection.named_buffers() if k.startswith(collection.storages)]
        index = sum(i.nbytes for s in schema for i in plan[s.name].program(s).indexes)
        allocated = sum(t.nbytes for t in [*collection.parameters(), *state]) + dense + index
        said = {
            "the collection": held,
            "the plan's arithmetic": Costs(optimizer, train=True).plan(plan, schema),
            "the plan's report": memory_report(plan, schema=schema, optimizer=optimizer).total("train"),
            "the collection's report": memory_report(collection).total("train"),
        }
        wrong = {who: n for who, n in said.items() if n != allocated}
        assert not wrong, f"{type(optimizer).__name__} trains on {allocated} bytes; {wrong}"


EMBEDDING_CHECKS: tuple[Callable[[MethodInfo], None], ...] = (
    names_follow_the_key,
    shapes_are_those_of_torch,
    bags_pool_the_vectors_of_their_ids,
    padding_is_zero_and_learns_nothing,
    ids_out_of_range_raise_unless_hashed,
    unseen_ids_follow_their_policy,
    same_seed_same_bits,
    starts_with_the_law_of_a_plain_table,
    gradients_are_right,
    equals_its_program,
    state_round_trips_and_refuses_others,
    footprint_is_what_is_stored,
    budgets_are_kept,
    config_is_data,
    options_are_given_by_keyword,
    names_of_earlier_versions_are_read,
    what_is_planned_is_declared,
    survives_the_meta_device,
    compiles_and_exports_whole,
    fits_a_trained_table,
    runs_in_a_collection,
    stands_beside_others_in_a_collection,
    training_bytes_agree,
)


def check_embedding(method: str | MethodInfo) -> None:
    """Run the whole contract of a registered method.

    Raises:
        AssertionError: names the broken clause.

    >>> check_embedding("hash")
    """
    info = get_method(method) if isinstance(method, str) else method
    for check in EMBEDDING_CHECKS:
        check(info)


def check_backend(backend: str, device: str = "cpu") -> None:
    """Compare a backend with the reference over every method, odd batch sizes, poolings and dtypes.

    What a backend refuses with a :class:`BackendError` is left out; plain float32 tables it must run.

    Raises:
        AssertionError: names the method and case that differ.

    >>> check_backend("torch")
    """
    for info in list_methods():
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
            schema = Schema(
                [
                    FeatureSpec("f0", 1, 6),
                    FeatureSpec("f1", 301, 6, pooling="mean"),
                    FeatureSpec("f2", 97, 6, pooling="max"),
                ]
            )
            need = sum(info.config_cls.sized(s, 1).footprint(s).serve for s in schema)
            plan = Plan.uniform(schema, info.name, budget=max(need, 399 * 6 * 2), full_below=1)
            with poisoned_memory():
                try:
                    ours = EmbeddingCollection(schema, plan, backend=backend, device=device, dtype=dtype)
                except BackendError:
                    if info.name == "full" and dtype == torch.float32:
                        raise
                    continue
                oracle = EmbeddingCollection(schema, plan, backend="reference", device=device, dtype=dtype)
            sizes = torch.tensor([s.num_embeddings for s in schema], device=device)
            generator = torch.Generator(device).manual_seed(0)
            for batch in (1, 3, 65):
                where = f"method {info.name!r}, {dtype}, batch {batch}"
                ids = (torch.rand(batch, 3, generator=generator, device=device) * sizes).long()
                lengths = torch.randint(0, 4, (3 * batch,), generator=generator, device=device)
                offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
                owner = torch.repeat_interleave(torch.arange(3, device=device), lengths.view(3, batch).sum(1))
                values = (torch.rand(len(owner), generator=generator, device=device) * sizes[owner]).long()
                for arguments in ((ids,), (values, offsets)):
                    got, wanted = ours(*arguments), oracle(*arguments)
                    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, msg=f"{where}: output")
                    seen = torch.autograd.grad(got.square().sum(), list(ours.parameters()))
                    right = torch.autograd.grad(wanted.square().sum(), list(oracle.parameters()))
                    for a, b in zip(seen, right, strict=True):
                        torch.testing.assert_close(
                            a, b, rtol=100 * tolerance, atol=100 * tolerance, msg=f"{where}: grad"
                        )


def check_model(model: str) -> None:
    """Run the contract of a registered click model over every method: shape, seeding, learning, state.

    Raises:
        AssertionError: names the method and clause.
    """
    from recsys_embed.models import build_model, get_model

    schema = Schema([FeatureSpec("a", 50, 4), FeatureSpec("b", 300, 4)])
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(64, 3, generator=generator)
    ids = torch.stack([torch.randint(0, s.num_embeddings, (64,), generator=generator) for s in schema], 1)
    label = (ids[:, 0] % 2).float()
    for info in list_methods():
        need = sum(info.config_cls.sized(s, 1).footprint(s).serve for s in schema)
        plan = Plan.uniform(schema, info.name, budget=max(need, 350 * 4 * 4), full_below=1)
        given = plan if get_model(model).uses_vectors else Plan.full(schema.with_dim(1))
        net, twin = (build_model(model, schema, given, num_dense=3, optimizer=SGD(lr=0.1), seed=7) for _ in range(2))
        where = f"model {model!r}, method {info.name!r}"
        first = net(dense, ids)
        assert first.shape == (64,), f"{where}: logits must be [64]; got {tuple(first.shape)}"
        assert torch.equal(first, twin(dense, ids)), f"{where}: same seed, other bits"
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(net(dense, ids), label)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        # Not the last: steps this long make small models overshoot once they fit.
        assert min(losses) < losses[0], f"{where}: loss never fell below {min(losses):.4f} from {losses[0]:.4f}"
        twin.load_state_dict(net.state_dict())
        net.eval(), twin.eval()
        assert torch.equal(net(dense, ids), twin(dense, ids)), f"{where}: state does not restore the model"


__all__ = [name for name, value in list(globals().items()) if inspect.isfunction(value) and name.startswith("check_")]
__all__ += ["EMBEDDING_CHECKS", "poisoned_memory"]
