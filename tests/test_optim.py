"""Fused updates against torch's optimizers and float64 formulas, under heavy duplicates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.kernels.deferred_steps import StepLog
from recsys_embed.kernels.fused_gather import apply_update
from recsys_embed.optim import SGD, Adagrad, Adam, FusedOptimizer, RowwiseAdagrad, list_rules, make_rule, sum_duplicates

RULES = (
    *(make_rule(name, lr=0.1) for name in list_rules()),
    Adagrad(lr=0.1, eps=0.01, initial_accumulator_value=0.5),
    Adam(lr=0.05, betas=(0.5, 0.9), eps=0.01),
    rse.FTRL(lr=0.1, l1=0.2, l2=0.1),
    rse.RowwiseRMSprop(lr=0.1, ar_alpha=0.5),
)
OF_TORCH = [r for r in RULES if type(r) in (SGD, Adagrad, Adam)]
ROWS, WIDTH = 40, 5


def zipf_rows(count: int, generator: torch.Generator, top: int = ROWS) -> Tensor:
    """Rows with many repeats of few, and some of the last rows never."""
    return (torch.rand(count, generator=generator).pow(3) * (top - 5)).long()


def batches(steps: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    sizes = [1, 64, 0, 7, 300, 33][:steps]
    return [(zipf_rows(n, generator), torch.randn(n, WIDTH, generator=generator)) for n in sizes]


def start() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def fresh_state(rule: FusedOptimizer, weight: Tensor) -> dict[str, Tensor]:
    state = {}
    for key, kind in rule.tensors.items():
        number = torch.int32 if kind == "step" else torch.float32
        state[key] = torch.empty(len(weight), weight.shape[1] if kind == "element" else 1, dtype=number)
        rule.reset_state_(key, state[key], weight)
    return state


def run_fused(rule: FusedOptimizer, lrs: list[float] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    weight = start()
    state = fresh_state(rule, weight)
    log = StepLog()
    for step, (rows, grad) in enumerate(batches(), start=1):
        log.advance(rule, (lrs or [rule.lr] * 9)[step - 1])
        apply_update(rule, weight, state, rows, grad, log)
    return weight, state


def torch_twin(rule: FusedOptimizer, weight: Tensor) -> tuple[torch.optim.Optimizer, bool]:
    """Torch's optimizer of the rule and whether it needs sparse gradients."""
    if isinstance(rule, SGD):
        return torch.optim.SGD([weight], lr=rule.lr), False
    if isinstance(rule, Adagrad):
        options = {"eps": rule.eps, "initial_accumulator_value": rule.initial_accumulator_value}
        return torch.optim.Adagrad([weight], lr=rule.lr, **options), False
    assert isinstance(rule, Adam)
    return torch.optim.SparseAdam([weight], lr=rule.lr, betas=rule.betas, eps=rule.eps), True


@pytest.mark.parametrize("rule", OF_TORCH, ids=repr)
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_rule_is_that_of_torch(rule: FusedOptimizer, scheduled: bool, sparse: bool) -> None:
    lrs = [0.1, 0.1, 0.05, 0.2, 0.0, 0.3] if scheduled else [rule.lr] * 6
    weight = start().double().requires_grad_(True)
    twin, only_sparse = torch_twin(rule, weight)
    if only_sparse and not sparse:
        pytest.skip("torch has this rule for sparse gradients alone: Adam on dense ones moves every row")
    for lr, (rows, grad) in zip(lrs, batches(), strict=True):
        twin.param_groups[0]["lr"] = lr
        weight.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), grad.double(), (ROWS, WIDTH), check_invariants=True)
        weight.grad = weight.grad if sparse else weight.grad.to_dense()
        with torch.sparse.check_sparse_tensor_invariants():
            twin.step()
    fused, state = run_fused(rule, lrs)
    torch.testing.assert_close(fused, weight.detach().float(), rtol=1e-5, atol=1e-6)
    theirs = twin.state[weight]
    for key, values in state.items():
        torch.testing.assert_close(values, theirs[key].float(), rtol=1e-5, atol=1e-6)


def test_rowwise_adagrad_is_its_formula() -> None:
    rule = RowwiseAdagrad(lr=0.1, eps=1e-3)
    weight, total = start().double(), torch.zeros(ROWS, dtype=torch.float64)
    for rows, grad in batches():
        for row in rows.unique().tolist():
            g = grad.double()[rows == row].sum(0)
            total[row] += (g * g).mean()
            weight[row] -= 0.1 * g / (total[row].sqrt() + 1e-3)
    fused, state = run_fused(rule)
    torch.testing.assert_close(fused, weight.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["sum"][:, 0], total.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rows_outside_the_batch_keep_their_bits(rule: FusedOptimizer) -> None:
    weight, state = run_fused(rule)
    touched = torch.cat([rows for rows, _ in batches()]).unique()
    rest = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, touched, False)
    assert rest.sum() >= 5
    assert torch.equal(weight[rest], start()[rest])
    assert not torch.equal(weight[touched], start()[touched])
    for key, values in state.items():
        assert torch.equal(values[rest], fresh_state(rule, start())[key][rest])


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_follow_float32(rule: FusedOptimizer, dtype: torch.dtype) -> None:
    rows, grad = torch.tensor([1, 3, 3, 1, 1]), torch.linspace(-1, 1, 5 * WIDTH).view(5, WIDTH)
    results = []
    for kind in (torch.float32, dtype):
        weight = start().to(dtype).to(kind)
        state = fresh_state(rule, weight)
        log = StepLog()
        log.advance(rule, rule.lr)
        apply_update(rule, weight, state, rows, grad.to(dtype).to(kind), log)
        assert weight.dtype == kind
        assert all(s.dtype == (torch.int32 if rule.tensors[k] == "step" else torch.float32) for k, s in state.items())
        results.append(weight)
    torch.testing.assert_close(results[1], results[0].to(dtype), rtol=2e-3, atol=2e-3)


@given(
    rows=st.lists(st.sampled_from([0, 1, 2, 3, 500, 2**31 - 2]), max_size=60),
    width=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_duplicates_are_summed(rows: list[int], width: int, seed: int) -> None:
    index = torch.tensor(rows, dtype=torch.int64)
    grad = torch.randn(len(rows), width, generator=torch.Generator().manual_seed(seed))
    found, sums = sum_duplicates(index, grad)
    assert found.tolist() == sorted(set(rows))
    assert found.dtype == torch.int64
    _, inverse = index.unique(return_inverse=True)
    right = torch.zeros(len(found), width, dtype=torch.float64).index_add_(0, inverse, grad.double())
    torch.testing.assert_close(sums.double(), right, rtol=1e-5, atol=1e-5)


def collection(rule: FusedOptimizer | None, **options: Any) -> EmbeddingCollection:
    schema = Schema([FeatureSpec("a", 30, 4), FeatureSpec("b", 500, 4, pooling="mean"), FeatureSpec("c", 50, 6)])
    plan = Plan({"a": Plan.full(schema)["a"], **{n: Plan.uniform(schema, "hash", num_buckets=20)[n] for n in "bc"}})
    return EmbeddingCollection(schema, plan, rule, **options)


def random_ids(batch: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, 3, generator=generator).pow(2) * torch.tensor([30, 500, 50])).long()


def step(coll: EmbeddingCollection, seed: int, batch: int = 50) -> None:
    out = coll(random_ids(batch, seed))
    target = torch.linspace(-1, 1, out.shape[-1])
    (out - target).square().sum().backward()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_bits_do_not_depend_on_threads(rule: FusedOptimizer) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            coll = collection(rule)
            for seed in range(3):
                step(coll, seed, batch=5000)
            results.append([p.detach().clone() for p in coll.parameters()])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("rule", [*OF_TORCH, RowwiseAdagrad(lr=0.1)], ids=repr)
def test_training_inside_backward_is_training_after_it(rule: FusedOptimizer) -> None:
    fused, plain = collection(rule), collection(None, sparse=isinstance(rule, Adam))
    twins = []
    if not isinstance(rule, RowwiseAdagrad):
        twins = [torch_twin(rule, p)[0] for p in plain.parameters()]
    squares = {name: torch.zeros(len(p)) for name, p in plain.named_parameters()}
    for seed in range(5):
        step(fused, seed)
        plain.zero_grad()
        step(plain, seed)
        for twin in twins:
            twin.step()
        if not twins:
            with torch.no_grad():
                for name, p in plain.named_parameters():
                    squares[name] += p.grad.square().mean(1)
                    p -= 0.1 * p.grad / (squares[name].sqrt() + 1e-8).unsqueeze(1)
    assert all(p.grad is None for p in fused.parameters())
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_an_empty_batch_changes_nothing() -> None:
    for rule in RULES:
        coll = collection(rule)
        before = [p.detach().clone() for p in coll.parameters()]
        coll(torch.zeros(0, 3, dtype=torch.int64)).sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(before, coll.parameters(), strict=True))


def test_evaluation_changes_nothing() -> None:
    coll = collection(SGD(lr=1.0))
    before = [p.detach().clone() for p in coll.parameters()]
    with torch.no_grad():
        coll(random_ids(5, 0))
    assert all(torch.equal(a, b) for a, b in zip(before, coll.parameters(), strict=True))
    out = coll.eval()(random_ids(5, 0))
    assert not out.requires_grad, "tables that step in backward are constants in eval()"
    assert all(torch.equal(a, b) for a, b in zip(before, coll.parameters(), strict=True))


def test_learning_rate_follows_a_schedule() -> None:
    coll = collection(SGD(lr=1.0))
    assert coll.lr == 1.0
    coll.lr = 0.0
    before = [p.detach().clone() for p in coll.parameters()]
    step(coll, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, coll.parameters(), strict=True))
    coll.lr = 0.5
    step(coll, 0)
    assert not all(torch.equal(a, b) for a, b in zip(before, coll.parameters(), strict=True))
    for bad in (-1.0, float("nan"), float("inf"), "0.1", None, True):
        with pytest.raises(ConfigError, match="`lr` must be a finite number >= 0"):
            coll.lr = bad  # type: ignore[assignment]
    assert coll.lr == 0.5
    with pytest.raises(ConfigError, match="no fused optimizer"):
        collection(None).lr = 0.1


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_state_resumes_bit_for_bit(rule: FusedOptimizer, tmp_path: Any) -> None:
    straight, first = collection(rule), collection(rule)
    for seed in range(4):
        step(straight, seed)
    for seed in range(2):
        step(first, seed)
    torch.save([first.state_dict(), first.optimizer_state_dict()], tmp_path / "state.pt")
    step(first, 9)  # what was saved does not move with the collection
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = collection(rule)
    second.load_state_dict(weights)
    second.load_optimizer_state_dict(state)
    for seed in range(2, 4):
        step(second, seed)
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_wrong_state_is_refused_before_anything_moves() -> None:
    coll = collection(Adagrad(lr=0.1))
    step(coll, 0)
    good = coll.optimizer_state_dict()
    good = {**good, "state": {k: v.clone() for k, v in good["state"].items()}}
    key = next(iter(good["state"]))
    wrong: list[Any] = [
        None,
        {},
        {**good, "rule": "SGD(lr=0.1)"},
        {k: v for k, v in good.items() if k != "state"},
        {**good, "state": {}},
        {**good, "state": {**good["state"], key: torch.zeros(3, 3)}},
        {**good, "state": {**good["state"], key: "text"}},
        {**good, "state": None},
        {**good, "steps": {"width4": 1}},
        {**good, "steps": dict.fromkeys(good["steps"], "x")},
        {**good, "lr": "fast"},
        {**good, "lr": float("nan")},
        collection(Adam()).optimizer_state_dict(),
        collection(None).optimizer_state_dict(),
    ]
    for saved in wrong:
        with pytest.raises(CheckpointError, match=r"optimizer state"):
            coll.load_optimizer_state_dict(saved)
        now = coll.optimizer_state_dict()
        assert now["steps"] == good["steps"]
        assert all(torch.equal(now["state"][k], v) for k, v in good["state"].items())


def test_options_out_of_range_are_refused() -> None:
    for build in (
        lambda: SGD(lr=-1),
        lambda: SGD(lr=float("nan")),
        lambda: Adagrad(eps=float("inf")),
        lambda: Adam(betas=(0.9, 1.0)),
        lambda: Adam(betas=(0.9,)),  # type: ignore[arg-type]
        lambda: Adam(betas=("a", 0.9)),  # type: ignore[arg-type]
        lambda: SGD(lr="0.1"),  # type: ignore[arg-type]
        lambda: SGD(lr=True),
    ):
        with pytest.raises(ConfigError, match="must be"):
            build()
    with pytest.raises(ConfigError, match=r"(?s)2 faults.*lr.*eps"):
        Adagrad(lr=-1, eps=-1)


def test_state_bytes_are_those_held() -> None:
    for rule in RULES:
        coll = collection(rule)
        held = sum(v.numel() * 4 for v in coll.optimizer_state_dict()["state"].values())
        assert coll.footprint().optimizer == held == coll.plan.footprint(coll.schema, rule).optimizer
        assert sum(rule.state_bytes(ROWS, WIDTH) for _ in range(1)) == 4 * sum(
            ROWS * WIDTH if kind == "element" else ROWS for kind in rule.tensors.values()
        )


def test_earlier_names_of_what_a_rule_overrides_still_work() -> None:
    with pytest.warns(DeprecationWarning, match="is now called") as told:

        class Halved(SGD):
            fades = False

            def pace(self, lr: float, step: int) -> tuple[float, float]:
                size, eps = super().pace(lr, step)
                return size / 2, eps

    assert [str(w.message).partition(";")[0] for w in told] == [
        "attribute of Halved 'fades' is now called 'decays_without_gradient'",
        "method of Halved 'pace' is now called 'size_and_epsilon'",
    ]
    assert Halved.decays_without_gradient is False
    assert Halved(rows="all").lazy is False
    with pytest.warns(DeprecationWarning, match="size_and_epsilon"):
        assert Halved().size_and_epsilon(0.5, 1) == (0.25, 0.0)
    with pytest.warns(DeprecationWarning, match="use 'decays_without_gradient'"):
        assert Adam().fades is True
    assert Adam().pace(0.5, 3) == Adam().size_and_epsilon(0.5, 3)
    with pytest.warns(DeprecationWarning, match="use 'catch_up_'"):
        EmbeddingCollection(Schema([FeatureSpec("a", 3, 2)]), optimizer=Adam()).settle_()
