"""Losses over items beside their formulas in float64, written out row by row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recsys_embed import FeatureSpec, Plan, Schema
from recsys_embed.data import Batch
from recsys_embed.errors import ConfigError
from recsys_embed.models import build_model
from recsys_embed.models.retrieval import Queries, RetrievalModel
from recsys_embed.train import TrainConfig, run_training
from recsys_embed.train.loss import loss_of
from recsys_embed.train.losses import loss_args
from recsys_embed.train.retrieval_losses import Positives, cross_entropy, expected_negatives, warn_of_large

from .events import ARGS, Events

V, K = 12, 5
SCHEMA = Schema([FeatureSpec("user", 50, 4), FeatureSpec("item", V, 4)])


def planted(seed: int = 0, missing: tuple[int, ...] = ()) -> tuple[RetrievalModel, Tensor]:
    """A model of items with frequencies, some of which cannot be found, and its items' vectors in float64."""
    torch.manual_seed(seed)
    model = build_model("twotower", SCHEMA, Plan.full(SCHEMA), num_dense=0, hidden=(6,), output_dim=K)
    assert isinstance(model, RetrievalModel)
    model.item_counts.copy_(torch.randint(1, 40, (V,)))
    model.in_catalogue[list(missing)] = False
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.7)
    return model, model.items(torch.arange(V)).detach().double()


def queries(targets: list[int]) -> Queries:
    return Queries(torch.randn(len(targets), K), torch.tensor(targets), torch.arange(len(targets)))


def of(name: str, model: RetrievalModel, asked: Queries, **args: object) -> Tensor:
    from recsys_embed.train.losses import LOSSES

    compute = LOSSES[name].of_queries  # type: ignore[index]
    assert compute is not None
    return compute(model, asked, loss_args(name, args))  # type: ignore[arg-type]


def test_softmax_is_the_formula() -> None:
    model, items = planted(missing=(3, 11))
    asked = queries([0, 5, 5, 7])
    got = of("softmax", model, asked, temperature=0.5)
    for query, target, loss in zip(asked.vectors.double(), asked.targets.tolist(), got.tolist(), strict=True):
        scores = [float(query @ items[j]) / 0.5 for j in range(V) if j not in (3, 11)]
        wanted = math.log(sum(math.exp(s) for s in scores)) - float(query @ items[target]) / 0.5
        assert loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("negatives", [0, 6])
@pytest.mark.parametrize(
    "args", [{}, {"logq": False}, {"correct_positive": True}], ids=["logq", "no logq", "positive too"]
)
def test_sampled_softmax_is_the_formula(negatives: int, args: dict[str, bool]) -> None:
    """Item 5 is chosen twice, so that it is an accidental hit in the batch; uniform draws hit as well."""
    model, items = planted(missing=(3,))
    asked, temperature = queries([0, 5, 5, 7, 2]), 0.7
    torch.manual_seed(3)
    drawn = torch.randint(V, (negatives,)).tolist()
    torch.manual_seed(3)
    got = of("sampled_softmax", model, asked, negatives=negatives, temperature=temperature, **args)
    targets, counts = asked.targets.tolist(), (model.item_counts * model.in_catalogue).tolist()

    def expected(item: int) -> float:
        if not args.get("logq", True):
            return 1.0
        return (len(targets) - 1) * counts[item] / sum(counts) + negatives / V

    for i, (query, loss) in enumerate(zip(asked.vectors.double(), got.tolist(), strict=True)):

        def score(item: int, query: Tensor = query) -> float:
            return float(query @ items[item]) / temperature

        own = score(targets[i])
        if args.get("correct_positive"):
            own -= math.log(expected(targets[i]))
        others = [j for k, j in enumerate(targets) if k != i] + drawn
        total = math.exp(own) + sum(math.exp(score(j)) / expected(j) for j in others if j != targets[i] and j != 3)
        assert loss == pytest.approx(math.log(total) - own, rel=1e-4)


def test_expected_negatives_are_shares_of_the_chosen_items_of_the_catalogue() -> None:
    """Ids that nobody chose, and rows of items that cannot be found, take no share."""
    model, _ = planted(missing=(3,))
    model.item_counts.zero_()
    model.item_counts[torch.tensor([0, 3, 5])] = torch.tensor([30, 1000, 10])
    got = expected_negatives(model, torch.tensor([0, 5, 7]), 9, 6)
    assert got.tolist() == pytest.approx([8 * 30 / 40 + 6 / V, 8 * 10 / 40 + 6 / V, 8 / 40 + 6 / V], rel=1e-12)


@pytest.mark.parametrize("negatives", [0, 4])
def test_sampled_sums_estimate_those_of_the_catalogue(negatives: int) -> None:
    """Positives of the batch drawn by their frequencies: the mean of exp(loss) is that of the full softmax."""
    model, items = planted(seed=1)
    torch.manual_seed(5)
    weights, query = model.item_counts.double(), torch.randn(1, K) * 0.5
    full = float((query.double() @ (items - items[4]).T).exp().sum())
    found = []
    for _ in range(1000):
        others = torch.multinomial(weights, 8, replacement=True)
        targets = torch.cat([torch.tensor([4]), others])
        asked = Queries(query.expand(9, K), targets, torch.arange(9))
        found.append(of("sampled_softmax", model, asked, negatives=negatives)[0].double().exp())
    values = torch.stack(found).detach()
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - full) < 4 * error
    assert error < 0.06 * full, "else the test would pass whatever the mean is"


def test_bpr_is_the_formula_and_never_draws_the_positive() -> None:
    model, items = planted(missing=(3, 4))
    asked = queries([0, 11, 5] * 20)
    torch.manual_seed(4)
    drawn = torch.randint(V - 1, (60, 3))
    torch.manual_seed(4)
    got = of("bpr", model, asked, negatives=3)
    for query, target, row, loss in zip(
        asked.vectors.double(), asked.targets.tolist(), drawn.tolist(), got.tolist(), strict=True
    ):
        others = [j + (j >= target) for j in row]
        assert target not in others
        margins = [float(query @ (items[target] - items[j])) for j in others if j not in (3, 4)]
        wanted = [math.log1p(math.exp(-m)) for m in margins]
        assert loss == pytest.approx(sum(wanted) / max(1, len(wanted)), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "bpr"])
def test_only_positive_rows_of_known_items_count_by_their_weights(loss: str) -> None:
    model, _ = planted(missing=(9,))
    ids = torch.tensor([[1, 2], [3, 9], [4, 7], [5, 8], [6, 2]])
    label, weight = torch.tensor([1.0, 1, 0, 1, 1]), torch.tensor([2.0, 5, 5, 0.5, 0])
    batch = Batch(torch.zeros(5, 0), ids, label, {"weight": weight})
    kept = torch.tensor([0, 3, 4])
    torch.manual_seed(2)
    rows = of(loss, model, model.queries(batch.dense[kept], ids[kept]))
    for reduction, wanted in (("mean", (rows * weight[kept]).mean()), ("sum", (rows * weight[kept]).sum())):
        torch.manual_seed(2)
        torch.testing.assert_close(loss_of(model, batch, reduction, loss), wanted)  # type: ignore[arg-type]
    unlabelled = Batch(torch.zeros(3, 0), ids[kept], torch.full((3,), float("nan")), {"weight": weight[kept]})
    torch.manual_seed(2)
    torch.testing.assert_close(loss_of(model, unlabelled, "mean", loss), (rows * weight[kept]).mean())  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "bpr"])
def test_batches_without_positives_move_nothing(loss: str) -> None:
    model, _ = planted()
    batch = Batch(torch.zeros(2, 0), torch.tensor([[1, 2], [3, 4]]), torch.zeros(2))
    value = loss_of(model, batch, loss=loss)  # type: ignore[arg-type]
    value.backward()
    assert float(value.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_what_cannot_be_trained_is_refused_before_any_step() -> None:
    for loss in ("softmax", "sampled_softmax", "bpr"):
        with pytest.raises(ConfigError, match=r"'deepfm' scores rows"):
            run_training(TrainConfig(model="deepfm", loss=loss), Events())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'negatives'"):
        TrainConfig(model="twotower", loss="bpr", loss_args={"negative": 2})
    with pytest.raises(ConfigError, match="`temperature` must be a finite number > 0"):
        TrainConfig(model="twotower", loss="softmax", loss_args={"temperature": 0})
    with pytest.raises(ConfigError, match="'temperature'"):
        TrainConfig(loss_args={"temperature": 1.0})
    with pytest.raises(ConfigError, match=r"features year, genres are the same in all training rows of an item"):
        run_training(TrainConfig(model="twotower", loss="bpr"), Events())
    with pytest.raises(ConfigError, match=r"set the hyperparameter `item_lists` to \{'genres': 2\}"):
        run_training(TrainConfig(model="twotower", model_args={**ARGS, "item_lists": {}}), Events())


def test_a_softmax_over_very_many_items_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = planted()
    found = 4 * 4 * K * V
    monkeypatch.setattr("recsys_embed.train.retrieval_losses.MANY_BYTES", found)
    warn_of_large(model)
    monkeypatch.setattr("recsys_embed.train.retrieval_losses.MANY_BYTES", found - 1)
    with pytest.warns(UserWarning, match="the vectors of all 12 items and their gradients at every step, 960 B"):
        warn_of_large(model)


def test_settings_of_losses_are_named_only_where_they_are_set() -> None:
    known = TrainConfig().to_dict()
    assert not {"loss", "loss_args", "top_k", "exclude_seen"} & known.keys()
    config = TrainConfig(model="twotower", loss="bpr", loss_args={"negatives": 2}, top_k=(5,), exclude_seen=False)
    assert TrainConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("held", [1 << 26, 24, 1], ids=["held", "in blocks", "item by item"])
@pytest.mark.parametrize("items", [[0, 5, 5, 7, 2, 5], [3] * 6], ids=["some equal", "all equal"])
def test_gradients_are_those_of_torchs_cross_entropy(
    items: list[int], held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys_embed.train.retrieval_losses.HELD_SCORES", held)
    torch.manual_seed(0)
    targets, ids = torch.tensor(items), torch.tensor([*items, 5, 1, 3])
    users, vectors = torch.randn(6, 4).double().requires_grad_(), torch.randn(9, 4).double().requires_grad_()
    bias, own = torch.randn(9).double(), torch.randn(6).double()
    bias[7] = float("-inf")
    rows, weights = torch.arange(6), torch.rand(6).double()
    for positives in (None, Positives(targets, ids, own)):
        got = cross_entropy(users, vectors, rows, bias, positives)
        scores = users @ vectors.T + bias
        if positives is not None:
            hits = targets.unsqueeze(1) == ids
            hits[rows, rows] = False
            keep = torch.eye(6, 9).bool()
            scores = torch.where(keep, (users @ vectors.T)[:, :6].diagonal().unsqueeze(1) + own.unsqueeze(1), scores)
            scores = scores.masked_fill(hits, float("-inf"))
        want = torch.nn.functional.cross_entropy(scores, rows, reduction="none")
        torch.testing.assert_close(got, want)
        found = torch.autograd.grad((got * weights).sum(), (users, vectors))
        torch.testing.assert_close(found, torch.autograd.grad((want * weights).sum(), (users, vectors)))
