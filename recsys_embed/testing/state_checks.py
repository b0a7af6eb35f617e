"""What a method must keep: names, seeds, options, states, bytes and budgets."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.method_checks import faults_of
from recsys_embed.errors import BudgetError, CheckpointError, RecsysEmbedError
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.plan import Plan
from recsys_embed.registry import MethodInfo, config_from_dict
from recsys_embed.testing.helpers import ROWS, WIDTH, example, example_ids, refused


def names_follow_the_key(method: MethodInfo) -> None:
    key = method.name.title().replace("_", "")
    assert method.config_cls.method == method.name
    for cls, suffix in ((method.embedding_cls, "Embedding"), (method.config_cls, "Config")):
        assert cls.__name__ == key + suffix, f"expected class {key + suffix}, got {cls.__name__}"
        assert ">>>" in (cls.__doc__ or ""), f"{cls.__name__} needs a docstring with an example that runs"
    assert method.paper, "a method names its source"


def same_seed_same_bits(method: MethodInfo) -> None:
    first, again, other = example(method), example(method), example(method, seed=1)
    for a, b, name in zip(first.parameters(), again.parameters(), dict(first.named_parameters()), strict=True):
        assert torch.equal(a, b), f"{name} differs between two builds of one seed"
        assert not torch.isnan(a).any(), f"{name} holds memory nobody wrote"
    assert not torch.equal(first.materialize(), other.materialize()), "another seed must give other weights"


def draws_by_torchs_generator_unless_seeded(method: MethodInfo) -> None:
    """As nn.Embedding: modules differ, ``torch.manual_seed`` repeats them, and a copy that is drawn anew differs."""

    def built(seed: int) -> CompressedEmbedding:
        torch.manual_seed(seed)
        return example(method, seed=None)

    def equal(a: CompressedEmbedding, b: CompressedEmbedding) -> bool:
        return torch.equal(a.materialize(), b.materialize())

    with torch.random.fork_rng(devices=[]):
        first, again = built(5), example(method, seed=None)
        assert not equal(first, again), "two modules built without a seed must start differently"
        assert equal(first, built(5)), "torch.manual_seed must repeat the initial weights"
        lazy = example(method, seed=None, device="meta").to_empty(device="cpu")
        for module in (lazy, copy.deepcopy(again)):
            torch.manual_seed(5)
            module.reset_parameters()
            assert equal(module, first), "reset_parameters must draw as building does"
            module.reset_parameters()
            assert not equal(module, first), "reset_parameters must draw anew"
        again.load_state_dict(first.state_dict())
        assert equal(again, first), "modules that were drawn differently must read the same hashes"
        state = torch.get_rng_state()
        fixed = example(method, seed=3)
        assert torch.equal(state, torch.get_rng_state()), "a module of a seed must leave torch's generator alone"
        was = fixed.materialize()
        fixed.reset_parameters()
        assert torch.equal(fixed.materialize(), was), "a module of a seed must be drawn as it was built"


def starts_with_the_distribution_of_a_full_table(method: MethodInfo) -> None:
    for init, std in (("normal:1", 1.0), ("uniform:0.3", 0.3 / 3**0.5)):
        seeds = (0, 1, None, None)
        tables = [example(method, 2003, 16, init=init, seed=s).materialize() for s in seeds]
        values = torch.stack(tables).double()
        values = values[values != 0]  # what a method has pruned follows no distribution
        assert abs(values.mean()) < 0.2 * std, f"init {init}: mean {values.mean():.4f}, expected about 0"
        assert 0.75 * std < values.std() < 1.25 * std, f"init {init}: std {values.std():.4f}, expected about {std:.4f}"


def state_round_trips_and_refuses_others(method: MethodInfo) -> None:
    module = example(method)
    other = example(method, init="normal:0.1")
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(example_ids(module)), module(example_ids(module)))
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(example_ids(module)), module(example_ids(module)))
    if method.name == "full":
        return  # a full table means the same under every seed
    with refused(CheckpointError, "seed"):
        example(method, seed=1).load_state_dict(module.state_dict())


def footprint_is_what_is_stored(method: MethodInfo) -> None:
    module = example(method)
    stated = module.footprint()
    held = sum(p.nbytes for p in module.parameters())
    state = {k: v for k, v in module.state_dict().items() if not k.endswith("_extra_state")}
    stored = sum(v.numel() * v.element_size() for v in state.values())
    # Rows train unrounded, whatever they are served at.
    weights, serve = stated.weights + stated.unrounded, stated.serve + stated.unrounded
    assert weights == held, f"footprint states {weights} bytes of weights; parameters hold {held}"
    assert serve == stored, f"footprint states {serve} bytes before rounding; the state dict holds {stored}"


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
    assert met, "no budget up to the full table's bytes can be met"
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
    options: dict[str, Any] = {"budget": example(method).footprint().serve, "seed": 0}
    built = method.embedding_cls(ROWS, WIDTH, **options)
    lazy = method.embedding_cls(ROWS, WIDTH, device="meta", **options)
    assert all(p.is_meta for p in lazy.parameters())
    lazy.to_empty(device="cpu")
    lazy.reset_parameters()
    assert torch.equal(lazy(example_ids(lazy)), built(example_ids(built)))


def fits_a_trained_table(method: MethodInfo) -> None:
    module = example(method, 200, 8)
    target = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, 8)
    fitted = method.embedding_cls.from_dense(target, config=module.config)
    target = target.repeat(1, module.output_dim // 8)
    error = (fitted.materialize() - target).square().mean() / target.square().mean()
    assert error < 0.95, f"the fit must beat predicting zero; relative squared error {error:.3f}"


def integers_survive_averages_casts_and_moves(method: MethodInfo) -> None:
    counts = torch.rand(ROWS, generator=torch.Generator().manual_seed(0)) + 0.1
    options: dict[str, Any] = {}
    if method.config_cls.order_option is not None:
        options[method.config_cls.order_option] = "counts"
    module = example(method, unseen="oov", **options).assign_(counts)
    ids = torch.cat([torch.arange(ROWS), torch.tensor([-5, 10**6])])
    expected = module(ids).detach()
    averages: dict[str, nn.Module] = {}
    for name, rule in (("EMA", get_ema_multi_avg_fn(0.999)), ("SWA", None)):
        averaged = AveragedModel(module, multi_avg_fn=rule, use_buffers=True)
        for _ in range(3):
            averaged.update_parameters(module)
        averages[name] = averaged.module
    by_hand, states = copy.deepcopy(module), (module.state_dict().values(), module.buffers())
    for mine, theirs in zip((by_hand.state_dict().values(), by_hand.buffers()), states, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            a.copy_(0.999 * a.float() + 0.001 * b.float())
    averages["an average over state dict and buffers by hand"] = by_hand
    for name, mean in averages.items():
        torch.testing.assert_close(mean(ids), expected, msg=f"{name} of equal weights must be these weights")
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 5e-2)):
        cast = copy.deepcopy(module).to(dtype)(ids)
        assert cast.dtype == dtype
        torch.testing.assert_close(cast.float(), expected, rtol=tolerance, atol=tolerance)
    lazily = copy.deepcopy(module).to("meta")
    with torch.device("meta"):
        built = example(method, unseen="oov", **options)
    for moved in (lazily, built):
        moved.load_state_dict(module.state_dict(), assign=True)
        assert torch.equal(moved(ids), expected), "load_state_dict(assign=True) must fill a module without memory"
        assert torch.equal(moved.to("cpu")(ids), expected)
        assert moved.unseen_counts()["embedding"].unseen == 4
    with torch.device("meta"):
        built = example(method, unseen="oov", **options)
    for key, value in module.state_dict().items():  # one by one, as Accelerate does
        path, _, name = key.rpartition(".")
        holder = built.get_submodule(path)
        assert name in holder._parameters or name in holder._buffers, f"{key} must be found by its name"
        if name in holder._buffers:
            holder._buffers[name] = value
        else:
            holder._parameters[name] = nn.Parameter(value)
    assert torch.equal(built(ids), expected), "a module filled tensor by tensor must look up as its source"
    if method.name != "full":
        other = example(method, unseen="oov", seed=1, **options).get_extra_state()
        with refused(CheckpointError, "seed"):
            built._buffers["_extra_state"] = other
    raw = example(method)
    if method.config_cls.accepts_raw:
        with torch.device("meta"):
            built = example(method)
        built.load_state_dict(raw.state_dict(), assign=True)
        assert torch.equal(built(["a", "b"]), raw(["a", "b"])), "ids given as strings must go where the tables are"
        assert torch.equal(built(np.array([1, 2])), raw(np.array([1, 2])))


def counts_leave_recomputed_activations_out(method: MethodInfo) -> None:
    module = example(method, unseen="oov")
    for reentrant in (False, True):
        module.reset_unseen_counts()
        scale = torch.ones(1, requires_grad=True)

        def run(x: Tensor) -> Tensor:
            return module(torch.tensor([1, ROWS + 3])) * x

        checkpoint(run, scale, use_reentrant=reentrant).sum().backward()
        counted = module.unseen_counts()
        assert counted == {"embedding": (1, 2)}, f"a recomputed lookup was counted: {counted}"
