"""Every model against an independent float64 formula, and what all models share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recsys_embed.errors import ConfigError, UnknownNameError
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.models import CTRModel, build_model, get_model, list_models
from recsys_embed.models.base import make_params
from recsys_embed.models.layers import MLP, CrossMatrix, CrossVector, InputLinear, PairDots, pair_sum
from recsys_embed.plan import Plan

SCHEMA = Schema([FeatureSpec(f"C{i}", n, 6) for i, n in enumerate((50, 20, 300, 7))])
MIXED = Schema([FeatureSpec("a", 50, 4), FeatureSpec("b", 20, 8), FeatureSpec("c", 9, 2)])
NUM_DENSE = 3
NAMES = [name for name in list_models() if not get_model(name).needs_history]  # others have a file of their own
HPARAMS = {name: ({} if name in ("lr", "fm") else {"hidden": (16, 8)}) for name in NAMES}
EQUAL = [n for n in NAMES if get_model(n).needs_equal_widths]


def build(name: str, schema: Schema = SCHEMA, **changes) -> CTRModel:
    options = {"num_dense": NUM_DENSE, "seed": 1, **HPARAMS[name], **changes}
    if name == "twotower":
        options = {"item": schema.names[-1], **options}
    plan = options.pop("plan", None) or Plan.full(schema)
    linear = options.pop("linear_plan", None)
    if name == "lr" and linear is None and "plan" not in changes:
        plan = Plan.full(schema.with_dim(1))
    return build_model(name, schema, plan, linear, **options)


def inputs(rows: int = 11, schema: Schema = SCHEMA, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(0, f.num_embeddings, (rows,), generator=g) for f in schema], 1)
    return torch.randn(rows, NUM_DENSE, generator=g), ids


def randomise(module: nn.Module, seed: int = 3) -> None:
    """Give every weight a value that matters, so that a forgotten zero-initialised term shows."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in [*module.parameters(), *module.buffers()]:
            if p.is_floating_point():
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
        if isinstance(module, CTRModel):
            n = module.num_dense
            module.standardise(torch.randn(n, generator=g), 0.5 + torch.rand(n, generator=g))


def standard(model: CTRModel, dense: Tensor) -> Tensor:
    """The numeric columns as the model's layers see them."""
    return (dense.double() - model.numeric_mean.double()) / model.numeric_std.double()


# --- independent float64 definitions, one sample at a time ---


def run_mlp(layers: list[nn.Linear], x: Tensor, last_is_plain: bool = True) -> Tensor:
    for i, layer in enumerate(layers):
        x = layer.weight.double() @ x + layer.bias.double()
        if i < len(layers) - 1 or not last_is_plain:
            x = x.clamp(min=0)
    return x


def linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def field_mlp(model: CTRModel, x: Tensor) -> Tensor:
    first = model.mlp.first
    weight = torch.cat([first.weight, first.numeric_weight.flatten(1)], 1).double()
    hidden = (weight @ x + first.bias.double()).clamp(min=0)
    return run_mlp(linears(model.mlp.rest), hidden)[0]


def tower_of(tower: nn.Module, x: Tensor) -> Tensor:
    first = tower.net.first
    weight = torch.cat([first.weight, first.numeric_weight.flatten(1)], 1).double()
    return run_mlp(linears(tower.net.rest), (weight @ x + first.bias.double()).clamp(min=0))


def sample_vectors(model: CTRModel, dense: Tensor, ids: Tensor) -> list[Tensor]:
    """Field vectors of one sample, categorical then numeric, float64."""
    cat = model.embedding(ids[None])[0].double()
    if not hasattr(model, "numeric"):
        return [*cat]
    return [*cat, *(v * w.double() for v, w in zip(dense.double(), model.numeric, strict=True))]


def first_order(model: CTRModel, dense: Tensor, ids: Tensor) -> Tensor:
    weights = model.linear(ids[None])[0, :, 0].double()
    numbers = sum(v * w for v, w in zip(dense.double(), model.linear_numeric.double(), strict=True))
    return model.bias.double()[0] + sum(weights) + numbers


def pairs(vectors: list[Tensor]) -> list[Tensor]:
    return [(a * b).sum() for a, b in itertools.combinations(vectors, 2)]


def expected(name: str, model: CTRModel, dense: Tensor, ids: Tensor) -> Tensor:
    vectors = sample_vectors(model, dense, ids) if model.embedding is not None else []
    flat = torch.cat(vectors) if vectors else torch.empty(0)
    if name == "lr":
        return first_order(model, dense, ids)
    if name == "fm":
        return first_order(model, dense, ids) + sum(pairs(vectors))
    if name == "dnn":
        return field_mlp(model, flat)
    if name == "widedeep":
        return first_order(model, dense, ids) + field_mlp(model, flat)
    if name == "deepfm":
        return first_order(model, dense, ids) + sum(pairs(vectors)) + field_mlp(model, flat)
    if name == "ipnn":
        return run_mlp(linears(model.mlp), torch.cat([flat, torch.stack(pairs(vectors))]))[0]
    if name == "twotower":
        places = len(ids) - 1
        user, item = torch.cat([*vectors[:places], *vectors[places + 1 :]]), vectors[places]
        return sum(tower_of(model.user_tower, user) * tower_of(model.item_tower, item))
    if name == "dlrm":
        number = run_mlp(linears(model.bottom), dense.double(), last_is_plain=False)
        dots = torch.stack(pairs([number, *vectors]))
        return run_mlp(linears(model.mlp), torch.cat([number, dots]))[0]
    x = flat
    if name == "dcn":
        for w, b in zip(model.cross.weight.double(), model.cross.bias.double(), strict=True):
            dot = sum(float(x[i]) * float(w[i]) for i in range(len(x)))
            x = torch.stack([flat[i] * dot + b[i] + x[i] for i in range(len(x))])
    if name == "dcnv2":
        for layer in model.cross.maps:
            w, b = layer.weight.double(), layer.bias.double()
            x = torch.stack([flat[i] * ((w[i] * x).sum() + b[i]) + x[i] for i in range(len(x))])
    deep = run_mlp(linears(model.mlp), flat, last_is_plain=False)
    return run_mlp([model.head], torch.cat([x, deep]))[0]


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_models_definition(name: str) -> None:
    model = build(name)
    randomise(model)
    dense, ids = inputs()
    with torch.no_grad():
        got = model(dense, ids)
        want = torch.stack([expected(name, model, d, i) for d, i in zip(standard(model, dense), ids, strict=True)])
    assert got.shape == (11,)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-4)


def test_columns_that_do_not_vary_are_centred_only() -> None:
    model = build("dnn")
    model.standardise(torch.full((3,), 2.0), torch.tensor([0.0, 4.0, 0.5]))
    assert model.numeric_std.tolist() == [1.0, 4.0, 0.5]
    dense, ids = inputs()
    with torch.no_grad():
        torch.testing.assert_close(model(dense, ids), model.logits((dense - 2) / model.numeric_std, ids))


def test_every_model_has_a_definition_here() -> None:
    clicks = {"lr", "fm", "dnn", "widedeep", "deepfm", "dcn", "dcnv2", "din", "dlrm", "ipnn"}
    assert set(list_models()) == clicks | {"twotower", "sasrec"}


def test_stacked_and_low_rank_dcnv2() -> None:
    model = build("dcnv2", structure="stacked", rank=2, cross_layers=2)
    randomise(model)
    dense, ids = inputs(5)
    with torch.no_grad():
        flat = model.flat_input(standard(model, dense).float(), ids).double()
        x = flat
        for down, up in model.cross.maps:
            x = flat * (x @ down.weight.double().T @ up.weight.double().T + up.bias.double()) + x
        want = torch.stack([run_mlp([*linears(model.mlp), model.head], row) for row in x])
        # run_mlp ends with a plain layer; here the MLP's last ReLU comes before the head, as in the definition.
        torch.testing.assert_close(model(dense, ids).double(), want.squeeze(1), rtol=2e-4, atol=2e-4)


def test_input_linear_is_a_linear_over_built_vectors_with_its_gradients() -> None:
    torch.manual_seed(0)
    layer = InputLinear(10, 3, 4, 7).double()
    cat, dense = torch.randn(6, 10).double().requires_grad_(), torch.randn(6, 3).double()
    vectors = torch.randn(3, 4).double().requires_grad_()
    weight = torch.cat([layer.weight, layer.numeric_weight.flatten(1)], 1)
    built = torch.cat([cat, (dense[:, :, None] * vectors).flatten(1)], 1)
    want = nn.functional.linear(built, weight, layer.bias)
    got = layer(cat, dense, vectors)
    torch.testing.assert_close(got, want)
    seed = torch.randn_like(want)
    sources = [cat, vectors, layer.weight, layer.numeric_weight, layer.bias]
    for a, b in zip(torch.autograd.grad(got, sources, seed), torch.autograd.grad(want, sources, seed), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_pair_sum_is_the_double_loop(n: int) -> None:
    torch.manual_seed(n)
    vectors, dense, numeric = torch.randn(4, 5, 3).double(), torch.randn(4, n).double(), torch.randn(n, 3).double()
    rows = torch.cat([vectors, dense[:, :, None] * numeric], 1)
    want = torch.stack([sum((r[i] * r[j]).sum() for i in range(len(r)) for j in range(i)) for r in rows])
    torch.testing.assert_close(pair_sum(vectors, dense, numeric), want)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (CrossVector(5, 2), (3, 5)),
        (CrossMatrix(5, 2), (3, 5)),
        (CrossMatrix(5, 2, 3), (3, 5)),
        (PairDots(4), (3, 4, 2)),
    ],
)
def test_layers_pass_gradcheck(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(layer.double(), torch.randn(shape).double().requires_grad_())


# --- what all models share ---


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bits_and_the_global_generator_is_left_alone(name: str) -> None:
    before = torch.get_rng_state()
    a, b, c = build(name), build(name), build(name, seed=2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x, b.state_dict()[k]) for k, x in a.state_dict().items())
    assert any(not torch.equal(x, c.state_dict()[k]) for k, x in a.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_dense_layers_start_alike_whatever_the_plan(name: str) -> None:
    schema = SCHEMA.with_dim(1) if name == "lr" else SCHEMA
    a, b = build(name), build(name, plan=Plan.uniform(schema, "hash", budget=1500))
    dense = [k for k in a.state_dict() if not k.startswith(("embedding.", "linear."))]
    assert dense
    assert all(torch.equal(a.state_dict()[k], b.state_dict()[k]) for k in dense)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_widths_work_or_are_refused_with_the_way_out(name: str) -> None:
    if name in EQUAL:
        with pytest.raises(ConfigError, match="one width"):
            build(name, MIXED)
        return
    model = build(name, MIXED)
    dense, ids = inputs(5, MIXED)
    assert model(dense, ids).shape == (5,)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "dlrm"])
def test_no_numeric_columns(name: str) -> None:
    model = build(name, num_dense=0)
    logits = model(torch.zeros(4, 0), inputs(4)[1])
    logits.sum().backward()
    assert logits.shape == (4,)


@pytest.mark.parametrize("name", NAMES)
def test_every_trainable_weight_gets_a_gradient(name: str) -> None:
    model = build(name)
    randomise(model)
    dense, ids = inputs(64)
    model(dense, ids).square().sum().backward()
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad and p.numel()}
    assert [k for k, p in trained.items() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", NAMES)
def test_export_gives_the_same_logits_for_another_batch_size(name: str) -> None:
    model = build(name).eval()
    batch = torch.export.Dim("batch", min=2, max=1000)
    program = torch.export.export(model, inputs(11), dynamic_shapes=({0: batch}, {0: batch}))
    other = inputs(23, seed=5)
    torch.testing.assert_close(program.module()(*other), model(*other))


def test_errors_name_the_nearest_or_the_rule() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'deepfm'"):
        build_model("deepmf", SCHEMA, Plan.full(SCHEMA))
    with pytest.raises(UnknownNameError, match="did you mean 'dropout'"):
        build("dnn", dropuot=0.1)
    with pytest.raises(ConfigError, match=r"(?s)hidden.*dropout"):
        build("dnn", hidden=(), dropout=1.5)
    with pytest.raises(ConfigError, match="no first-order weights"):
        build("dnn", linear_plan=Plan.full(SCHEMA.with_dim(1)))
    with pytest.raises(ConfigError, match="num_dense"):
        build("dlrm", num_dense=0)
    with pytest.raises(ConfigError, match="num_dense"):
        build("fm", num_dense=-1)


def test_mlp_layers_in_order() -> None:
    kinds = [type(m).__name__ for m in MLP(4, (3, 2), 1, dropout=0.1, batch_norm=True)]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 2 + ["Linear"]


def test_footprint_adds_both_collections() -> None:
    model = build("deepfm")
    rows = sum(f.num_embeddings for f in SCHEMA)
    assert model.footprint().weights == 4 * rows * (6 + 1)


def test_a_model_without_num_dense_has_criteos_and_says_so() -> None:
    with pytest.warns(DeprecationWarning, match="num_dense=data.num_dense"):
        model = build_model("fm", SCHEMA, Plan.full(SCHEMA))
    assert model.num_dense == 13


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("lr", "fm", "twotower")])
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"hidden": ["8"]}, "`hidden` must be a non-empty list of integers >= 1; got "),
        ({"hidden": 8}, "`hidden` must be a non-empty list of integers >= 1; got 8"),
        ({"dropout": "0.1"}, r"`dropout` must be a finite number in \[0, 1\); got '0.1'"),
        ({"batch_norm": 1}, "`batch_norm` must be true or false; got 1"),
    ],
)
def test_hyperparameters_of_another_type_are_named(name: str, wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=rf"{sentence}.*\(model '{name}'\)"):
        build(name, **wrong)


def test_hyperparameters_of_any_dataclass_are_checked() -> None:
    @dataclass(frozen=True)
    class Params:
        heads: int = 2

    class Attention(CTRModel):
        key = "attention"
        params_cls = Params

    assert make_params(Attention, {"heads": 4}) == Params(4)
    with pytest.raises(ConfigError, match=r"`heads` must be an integer; got '2' \(model 'attention'\)"):
        make_params(Attention, {"heads": "2"})
