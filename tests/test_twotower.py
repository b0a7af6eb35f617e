"""The two-tower model beside a plain torch model, and what every retrieval model promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import recsys_embed as rse
from recsys_embed import FeatureSpec, Plan, Schema
from recsys_embed.data import Batch
from recsys_embed.errors import ConfigError, UnknownNameError
from recsys_embed.exports.graph import check_graph, to_onnx
from recsys_embed.models import build_model
from recsys_embed.models.base import register
from recsys_embed.models.retrieval import RetrievalModel
from recsys_embed.models.twotower import TwoTowerParams
from recsys_embed.train.loss import loss_of
from recsys_embed.utils.types import BagIds

USERS, ITEMS, WIDTH = 60, 25, 6
SCHEMA = Schema(
    [
        FeatureSpec("user", USERS, WIDTH),
        FeatureSpec("item", ITEMS, WIDTH, table="item"),
        FeatureSpec("year", 5, WIDTH),
        FeatureSpec("genres", 7, WIDTH, pooling="mean"),
        FeatureSpec("history", ITEMS, WIDTH, pooling="mean", table="item"),
    ]
)
GENRES = [[i % 7, (i + 2) % 7][: 1 + i % 2] for i in range(ITEMS)]


def tower_model(plan: Plan | None = None, **changes: Any) -> RetrievalModel:
    options: dict[str, Any] = {
        "num_dense": 3, "hidden": (16,), "output_dim": 8, "item_features": ("year", "genres"),
        "item_lists": {"genres": 2}, "item_numeric": (1,), "seed": 3, **changes,
    }  # fmt: skip
    model = build_model("twotower", SCHEMA, plan or Plan.full(SCHEMA), **options)
    assert isinstance(model, RetrievalModel)
    if "genres" in options["item_features"]:
        lengths = torch.tensor([len(g) for g in GENRES])
        genres = (torch.tensor([g for gs in GENRES for g in gs]), F.pad(lengths.cumsum(0), (1, 0)))
        years = (torch.arange(ITEMS) % 5, torch.arange(ITEMS + 1))
        dense = torch.arange(ITEMS).float().unsqueeze(1) / ITEMS
        model.describe_items({"year": years, "genres": genres}, dense, torch.ones(ITEMS, dtype=torch.bool))  # type: ignore[operator]
    model.item_counts.copy_(torch.arange(ITEMS) % 4 + 1)
    return model


def rows(count: int = 32, seed: int = 0) -> tuple[Tensor, BagIds, Tensor]:
    """Numeric values, ids of all features, and the candidates."""
    g = torch.Generator().manual_seed(seed)
    user, item = torch.randint(USERS, (count,), generator=g), torch.randint(ITEMS, (count,), generator=g)
    history = [torch.randint(ITEMS, (n,), generator=g) for n in torch.randint(0, 4, (count,), generator=g).tolist()]
    lists = [
        [user[i : i + 1] for i in range(count)],
        [item[i : i + 1] for i in range(count)],
        [item[i : i + 1] % 5 for i in range(count)],
        [torch.tensor(GENRES[i]) for i in item.tolist()],
        history,
    ]
    flat = [one for feature in lists for one in feature]
    lengths = torch.tensor([0, *(len(one) for one in flat)])
    return torch.randn(count, 3, generator=g), BagIds(torch.cat(flat), lengths.cumsum(0)), item


class Plain(nn.Module):
    """The same model on nn.Embedding and nn.Linear, with every product written out."""

    def __init__(self, model: RetrievalModel) -> None:
        super().__init__()
        coll = model.vectors
        tables = {"user": USERS, "item": ITEMS, "year": 5, "genres": 7}
        self.tables = nn.ModuleDict({k: nn.Embedding(n, WIDTH) for k, n in tables.items()})
        for name, module in self.tables.items():
            module.weight.data.copy_(coll.table(f"{name}.weight"))
        self.numeric = nn.Parameter(model.numeric.detach().clone())
        self.user, self.item = (self.layers(t) for t in (model.user_tower, model.item_tower))

    @staticmethod
    def layers(tower: nn.Module) -> nn.Sequential:
        first, last = tower.net.first, tower.net.rest[-1]
        weight = torch.cat([first.weight, first.numeric_weight.flatten(1)], 1)
        made = nn.Sequential(nn.Linear(weight.shape[1], 16), nn.ReLU(), nn.Linear(16, 8))
        made[0].weight.data.copy_(weight), made[0].bias.data.copy_(first.bias)
        made[2].weight.data.copy_(last.weight), made[2].bias.data.copy_(last.bias)
        return made

    def users(self, dense: Tensor, user: Tensor, history: list[Tensor]) -> Tensor:
        means = [self.tables["item"](h).mean(0) if len(h) else torch.zeros(WIDTH) for h in history]
        numbers = (dense[:, [0, 2]].unsqueeze(2) * self.numeric[[0, 2]]).flatten(1)
        return self.user(torch.cat([self.tables["user"](user), torch.stack(means), numbers], 1))

    def items(self, item: Tensor) -> Tensor:
        genres = torch.stack([self.tables["genres"](torch.tensor(GENRES[i])).mean(0) for i in item.tolist()])
        number = (item.float() / ITEMS).unsqueeze(1) * self.numeric[1]
        return self.item(torch.cat([self.tables["item"](item), self.tables["year"](item % 5), genres, number], 1))


def unpack(ids: BagIds) -> tuple[Tensor, list[Tensor]]:
    count = (len(ids.offsets) - 1) // 5
    bags = ids.values.tensor_split(ids.offsets[1:-1])
    return ids.values[:count], list(bags[4 * count :])


def plain_loss(model: Plain, dense: Tensor, ids: BagIds, item: Tensor, counts: Tensor, drawn: Tensor) -> Tensor:
    """Sampled softmax with logQ, accidental hits left out, as products of plain tensors."""
    user, history = unpack(ids)
    every = torch.cat([item, drawn])
    scores = model.users(dense, user, history) @ model.items(every).T / 0.5
    expected = (len(item) - 1) * counts[every] / counts.sum() + len(drawn) / ITEMS
    own = scores.diagonal().unsqueeze(1)
    hits = item.unsqueeze(1) == every
    scores = (scores - expected.log()).masked_fill(hits, float("-inf"))
    return (torch.cat([own, scores], 1).logsumexp(1) - own.squeeze(1)).mean()


def test_training_is_that_of_a_plain_torch_model() -> None:
    """Tables by the fused optimizer in backward, from three lookups, beside dense SGD on plain tables."""
    model = tower_model(optimizer=rse.SGD(lr=0.1))
    plain = Plain(model)
    first, second = torch.optim.SGD(model.trainable(), lr=0.1), torch.optim.SGD(plain.parameters(), lr=0.1)
    args = rse.train.losses.loss_args("sampled_softmax", {"temperature": 0.5, "negatives": 9})  # type: ignore[attr-defined]
    for step in range(6):
        dense, ids, item = rows(seed=step)
        queries = model.queries(dense, ids)
        torch.manual_seed(step)
        got = rse.train.losses.LOSSES["sampled_softmax"].of_queries(model, queries, args).mean()  # type: ignore[attr-defined]
        torch.manual_seed(step)
        drawn = torch.randint(ITEMS, (9,))
        want = plain_loss(plain, dense, ids, item, model.item_counts.float(), drawn)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        for loss, optimizer in ((got, first), (want, second)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, table in plain.tables.items():
        torch.testing.assert_close(model.vectors.table(f"{name}.weight"), table.weight.detach(), rtol=1e-3, atol=1e-5)


def test_nothing_of_the_candidate_enters_the_user() -> None:
    model, (dense, ids, item) = tower_model(), rows()
    count, changed = len(item), ids.values.clone()
    starts = ids.offsets[count : 4 * count]
    changed[starts[0] : ids.offsets[4 * count]] = 3  # item, year and genres
    assert torch.equal(model.users(dense, ids), model.users(dense, BagIds(changed, ids.offsets)))
    logits = (model.users(dense, ids) * model.items(item)).sum(1)
    torch.testing.assert_close(model(dense, ids), logits)
    other = dense.clone()
    other[:, 1] += 1  # the item's number
    assert torch.equal(model.users(dense, ids), model.users(other, ids))


def test_rows_of_items_are_not_touched_by_users() -> None:
    """Adam moves rows whose gradient is zero, so those of the candidate must not be read."""
    model = tower_model(optimizer=rse.Adam(lr=0.1))
    dense, ids, _ = rows()
    before = {k: model.vectors.table(f"{k}.weight").clone() for k in ("year", "genres")}
    for _ in range(3):
        model.users(dense, ids).sum().backward()
    assert all(torch.equal(t, model.vectors.table(f"{k}.weight")) for k, t in before.items())


@pytest.mark.parametrize("normalise", [False, True])
def test_recommendations_are_those_of_a_sort(monkeypatch: pytest.MonkeyPatch, normalise: bool) -> None:
    model, (dense, ids, _) = tower_model(normalise=normalise), rows(9)
    model.in_catalogue[[4, 20]] = False
    scores = (model.users(dense, ids) @ model.items(torch.arange(ITEMS)).T).detach()
    if normalise:
        assert float(scores.abs().max()) <= 1 + 1e-5
    exclude = [[i, 2 * i, 24] for i in range(9)]
    padded = torch.tensor([[*row, -1] for row in exclude])
    for row, items in enumerate(exclude):
        scores[row, [*items, 4, 20]] = float("-inf")
    order = scores.argsort(1, descending=True)
    monkeypatch.setattr("recsys_embed.models.retrieval.BLOCK_ITEMS", 4)
    bags = BagIds(torch.tensor(exclude).flatten(), torch.arange(0, 28, 3))
    for given in (padded, bags):
        found, best = model.recommend(dense, ids, 7, given)
        assert torch.equal(found, order[:, :7])
        torch.testing.assert_close(best, scores.gather(1, order[:, :7]))
    found, best = model.recommend(dense, ids, 40, padded)
    assert found.shape == (9, 40)
    assert bool((found[:, 23:] == -1).all())
    assert bool(best[:, 23:].isneginf().all())
    for wrong in (padded.float(), padded[:3], [[1]]):
        with pytest.raises(ConfigError, match="`exclude` must be item ids"):
            model.recommend(dense, ids, 3, wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`k` must be an integer"):
        model.recommend(dense, ids, 0)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_served_file_finds_the_same_items(tmp_path: Path, precision: str) -> None:
    model, (dense, ids, _) = tower_model().eval(), rows()
    model.in_catalogue[7] = False
    rse.export(model, tmp_path / "m.rse", precision)
    served = rse.load(tmp_path / "m.rse")
    assert isinstance(served, RetrievalModel)
    tolerance = {"rtol": 0, "atol": 0 if precision == "fp32" else 0.02}
    every = torch.arange(ITEMS)
    torch.testing.assert_close(served.users(dense, ids), model.users(dense, ids), **tolerance)
    torch.testing.assert_close(served.items(every), model.items(every), **tolerance)
    torch.testing.assert_close(served(dense, ids), model(dense, ids), **tolerance)
    if precision == "fp32":
        assert torch.equal(served.recommend(dense, ids, 5)[0], model.recommend(dense, ids, 5)[0])


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "bpr", "logloss"])
@pytest.mark.parametrize("method", [m.name for m in rse.list_methods() if m.config_cls.plannable])
def test_every_method_learns(method: str, loss: Any) -> None:
    need = Plan.uniform(SCHEMA, method, budget=6000, full_below=1)
    model = tower_model(need, optimizer=rse.Adam(lr=0.02))
    optimizer = torch.optim.Adam(model.trainable(), lr=0.01)
    dense, ids, _ = rows(24)
    label = (torch.arange(24) % 3 > 0).float()
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        kept = label.bool()
        if loss == "logloss":
            value = F.binary_cross_entropy_with_logits(model(dense, ids), label)
        else:
            queries = model.queries(dense, ids)
            queries = type(queries)(*(part[kept] for part in queries))
            compute = rse.train.losses.LOSSES[loss].of_queries  # type: ignore[attr-defined]
            value = compute(model, queries, rse.train.losses.loss_args(loss, {})).mean()  # type: ignore[attr-defined]
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert sum(losses[-3:]) < sum(losses[:3])


def test_candidates_are_found_or_asked_for() -> None:
    def item(*features: FeatureSpec, **options: Any) -> str:
        schema = Schema(features)
        return build_model("twotower", schema, Plan.full(schema), num_dense=0, **options).item  # type: ignore[no-any-return]

    a, b = FeatureSpec("a", 5, 2), FeatureSpec("b", 5, 2)
    assert item(a, FeatureSpec("item", 5, 2)) == "item"
    shared = FeatureSpec("product", 5, 2, table="product"), FeatureSpec("last", 5, 2, table="product")
    assert item(a, *shared) == "product"
    assert item(a, b, item="b") == "b"
    with pytest.raises(ConfigError, match="`item`, one of a, b"):
        item(a, b)
    with pytest.raises(UnknownNameError, match="did you mean"):
        item(a, b, item="aa")
    with pytest.raises(ConfigError, match="raw 64-bit ids"):
        item(a, FeatureSpec("item", 5, 2, ids="raw"), item="item")
    with pytest.raises(ConfigError, match="unknown feature 'genre'"):
        item(a, FeatureSpec("item", 5, 2), item_features=("genre",))
    with pytest.raises(ConfigError, match="'a' is named already"):
        item(a, b, FeatureSpec("item", 5, 2), item_features=("a",), user_features=("a", "b"))
    with pytest.raises(ConfigError, match="`item_lists` of model 'twotower' has a, not in `item_features`: name"):
        item(a, b, FeatureSpec("item", 5, 2), item_lists={"a": 2})
    with pytest.raises(ConfigError, match="needs features or numeric columns of the user"):
        item(a, FeatureSpec("item", 5, 2), item_features=("a",))
    with pytest.raises(ConfigError, match="columns below 0"):
        item(a, FeatureSpec("item", 5, 2), item_numeric=(0,))


def test_recommending_leaves_frozen_modules_frozen() -> None:
    model = tower_model()
    dense, ids, _ = rows()
    model.item_tower.eval()  # type: ignore[operator]
    before = {name: module.training for name, module in model.named_modules()}
    assert {*before.values()} == {True, False}
    model.recommend(dense, ids, k=3)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_features_of_neither_tower_are_warned_of(recwarn: pytest.WarningsRecorder, tmp_path: Path) -> None:
    named = {"item_features": ("year",), "item_lists": {}, "user_features": ("user",)}
    model = tower_model(**named)
    (warning,) = recwarn
    assert "reads item, year, user, not genres, history; tables" in str(warning.message)
    # Files of it warn no more.
    recwarn.clear()
    rse.export(model, tmp_path / "model.rse")
    rse.load(tmp_path / "model.rse")
    tower_model()
    assert not recwarn.list


@pytest.mark.slow
def test_a_graph_of_a_model_with_lists(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = tower_model(hidden=())
    dense, ids, _ = rows(8)
    written = to_onnx(model, tmp_path / "m.onnx", (dense, ids))
    assert written.check is not None
    assert written.check.batches == (8, 24)
    check_graph(tmp_path / "m.onnx", model, rows(5, 1)[:2])


def test_models_of_ones_own_must_give_both_vectors() -> None:
    class Half(RetrievalModel):
        key = "half"
        params_cls = TwoTowerParams

        def __init__(self, spec: Any, params: Any) -> None:
            super().__init__(spec, None)

        def items(self, item_ids: Tensor) -> Tensor:
            return self.vectors.lookup(self.item, item_ids)

    with pytest.raises(ConfigError, match=r"`user_vectors\(dense, ids\)`, which returns \[B, K\], must be defined"):
        register(Half)


def test_losses_take_any_model_that_finds_items_and_no_other() -> None:
    schema = Schema([FeatureSpec("user", 5, 2), FeatureSpec("item", 5, 2)])
    batch = Batch(torch.zeros(3, 0), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3))
    with pytest.raises(ConfigError, match="needs a retrieval model"):
        loss_of(build_model("fm", schema, Plan.full(schema), num_dense=0), batch, loss="bpr")
