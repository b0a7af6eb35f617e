"""DIN beside its formula in float64, row by row, and beside the bag-of-ids models of the other tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import recsys_embed as rse
from recsys_embed import FeatureSpec, Plan, Schema
from recsys_embed.errors import ConfigError, UnknownNameError
from recsys_embed.models import build_model
from recsys_embed.models.din import TargetAttention
from recsys_embed.utils.types import BagIds

ITEMS, WIDTH = 30, 6
SCHEMA = Schema(
    [
        FeatureSpec("user", 9, WIDTH),
        FeatureSpec("item", ITEMS, WIDTH, table="item"),
        FeatureSpec("tags", 7, WIDTH, pooling="mean"),
        FeatureSpec("history", ITEMS, WIDTH, table="item", padding_idx=0, pooling="mean"),
    ]
)
HISTORIES = [[3, 4, 3], [], [0, 9], [1], [2, 5, 8, 29]]


def ids() -> BagIds:
    rows = len(HISTORIES)
    tags = [[1], [2, 3], [], [4], [5, 6, 0]]
    lists = [[[i] for i in (0, 8, 3, 3, 1)], [[i] for i in (3, 7, 9, 29, 5)], tags, HISTORIES]
    lengths = [len(one) for feature in lists for one in feature]
    assert len(lengths) == rows * len(SCHEMA)
    values = torch.tensor([i for feature in lists for one in feature for i in one])
    return BagIds(values, torch.tensor([0, *lengths]).cumsum(0))


def din(plan: Plan | None = None, **changes: object) -> rse.models.CTRModel:  # type: ignore[name-defined]
    torch.manual_seed(0)
    options = {"num_dense": 2, "hidden": (8,), "attention": (5, 4), **changes}
    model = build_model("din", SCHEMA, plan or Plan.full(SCHEMA), **options)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.5)
    return model


def formula(model: torch.nn.Module, dense: Tensor, given: BagIds) -> Tensor:
    """Zhou et al., KDD 2018, equation 3 and figure 2, with one weight per position that is not normalised."""
    vectors = {name: model.vectors.table(f"{SCHEMA[name].table_name}.weight").double() for name in SCHEMA.names}
    bags = [piece.tolist() for piece in given.values.tensor_split(given.offsets[1:-1])]
    rows = len(bags) // len(SCHEMA)
    linear = list(model.attention["history"].weigh)
    out = []
    for b in range(rows):
        user, item, tags, history = (bags[f * rows + b] for f in range(4))
        target = vectors["item"][item[0]]
        mean = vectors["tags"][tags].mean(0) if tags else torch.zeros(WIDTH).double()
        interest = torch.zeros(WIDTH).double()
        for i in history:
            if i == 0:
                h = torch.zeros(WIDTH).double()
            else:
                h = vectors["item"][i]
            x = torch.cat([h, target, h - target, h * target])
            for layer in linear[:-1]:
                if isinstance(layer, torch.nn.Linear):
                    x = layer.weight.double() @ x + layer.bias.double()
                else:
                    x = torch.where(x > 0, x, layer.weight.double() * x)
            weight = linear[-1].weight.double() @ x + linear[-1].bias.double()
            interest = interest + weight * h
        flat = [vectors["user"][user[0]], target, mean, interest]
        flat += [value * v for value, v in zip(dense[b].double(), model.numeric.double(), strict=True)]
        x = torch.cat(flat)
        first, last = model.mlp.first, model.mlp.rest[-1]
        weight = torch.cat([first.weight, first.numeric_weight.flatten(1)], 1)
        hidden = F.relu(weight.double() @ x + first.bias.double())
        out.append(last.weight.double() @ hidden + last.bias.double())
    return torch.cat(out)


def test_logits_are_those_of_the_paper() -> None:
    model, dense = din(), torch.randn(5, 2)
    torch.testing.assert_close(model(dense, ids()), formula(model, dense, ids()).float(), rtol=1e-4, atol=1e-4)


def test_attention_is_that_of_deepctr() -> None:
    """Its layer takes padded histories, and puts the candidate before the history and the difference the other way."""
    sequence = pytest.importorskip("deepctr_torch.layers.sequence", exc_type=ImportError)
    torch.manual_seed(0)
    lengths, rows = torch.tensor([3, 0, 1, 7]), 4
    theirs = sequence.AttentionSequencePoolingLayer((5, 4), "prelu", embedding_dim=WIDTH)
    ours = TargetAttention(WIDTH, (5, 4))
    unit = theirs.local_att
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        t, h, difference, product = unit.dnn.linears[0].weight.chunk(4, 1)
        ours.weigh[0].weight.copy_(torch.cat([h, t, -difference, product], 1))
        ours.weigh[0].bias.copy_(unit.dnn.linears[0].bias)
        for mine, layer in (
            (ours.weigh[1], unit.dnn.activation_layers[0]),
            (ours.weigh[2], unit.dnn.linears[1]),
            (ours.weigh[3], unit.dnn.activation_layers[1]),
            (ours.weigh[4], unit.dense),
        ):
            mine.load_state_dict(layer.state_dict())
    targets, padded = torch.randn(rows, WIDTH), torch.randn(rows, 7, WIDTH)
    real = torch.arange(7) < lengths[:, None]
    got = ours(padded[real], torch.repeat_interleave(torch.arange(rows), lengths), targets)
    torch.testing.assert_close(got, theirs(targets[:, None], padded, lengths[:, None])[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["hash", "unified", "lowdim", "memcom"])
def test_candidates_and_histories_train_one_compressed_table(method: str) -> None:
    """Oracle: the same program on torch with dense gradients."""
    plan = Plan.uniform(SCHEMA, method, budget="2KiB", full_below=1)
    fused = din(plan, optimizer=rse.SGD(lr=0.05))
    plain = din(plan, backend="torch")
    plain.load_state_dict(fused.state_dict(), strict=False)
    dense = torch.randn(5, 2)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.05)
    rest = torch.optim.SGD(fused.trainable(), lr=0.05)
    for _ in range(3):
        for model, optimizer in ((fused, rest), (plain, sgd)):
            optimizer.zero_grad()
            model(dense, ids()).tanh().mean().backward()
            optimizer.step()
    torch.testing.assert_close(fused(dense, ids()), plain(dense, ids()), rtol=1e-4, atol=1e-5)


def test_what_is_no_history_is_refused() -> None:
    apart = Schema([FeatureSpec("item", 30, 4), FeatureSpec("history", 30, 4)])
    with pytest.raises(ConfigError, match="give both one `vocab`"):
        build_model("din", apart, Plan.full(apart), num_dense=0)
    with pytest.raises(ConfigError, match="must read one table"):
        din(histories={"history": "user"})
    with pytest.raises((ConfigError, UnknownNameError), match="'histry'"):
        din(histories={"histry": "item"})
    with pytest.raises(ConfigError, match="BagIds"):
        din()(torch.zeros(2, 2), torch.zeros(2, 4, dtype=torch.int64))
