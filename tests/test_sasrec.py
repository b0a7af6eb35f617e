"""SASRec beside torch's own encoder layers, one history at a time and unpadded, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import recsys_embed as rse
from recsys_embed import FeatureSpec, Plan, Schema
from recsys_embed.data import Batch, convert_table, open_dataset
from recsys_embed.data.list_ids import ListIds
from recsys_embed.errors import ConfigError
from recsys_embed.exports import to_onnx, to_torch_export
from recsys_embed.models import build_model
from recsys_embed.train import TrainConfig, run_training
from recsys_embed.train.catalogue import learn_items
from recsys_embed.train.loop import Trainer
from recsys_embed.utils.types import BagIds

ITEMS, WIDTH, LONGEST, PADDING = 30, 8, 6, 4
ITEM = FeatureSpec("item", ITEMS, WIDTH, table="item", padding_idx=PADDING)
SCHEMA = Schema([ITEM, FeatureSpec("seen", ITEMS, WIDTH, table="item", padding_idx=PADDING)])
HISTORIES = [[3, 7, 3], [], [9], [2, PADDING, 5, 8, 29, 1, 2, 3, 20], [PADDING], [1, 0, 2, 6, 5, 9]]


def bags(histories: Sequence[Sequence[int]], candidates: Sequence[int] | None = None) -> BagIds:
    candidates = range(10, 10 + len(histories)) if candidates is None else candidates
    values = torch.tensor([*candidates, *(i for history in histories for i in history)])
    return BagIds(values, torch.tensor([0, *[1] * len(histories), *map(len, histories)]).cumsum(0))


def sasrec(plan: Plan | None = None, schema: Schema = SCHEMA, **changes: Any) -> Any:
    torch.manual_seed(0)
    options = {"num_dense": 0, "max_length": LONGEST, "heads": 2, "inner": 5, "dropout": 0.0, **changes}
    model = build_model("sasrec", schema, plan or Plan.full(schema), **options)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.5)
    return model.eval()


def states(model: Any, history: Sequence[int]) -> Tensor:
    """Normed states ``[L, width]`` by torch's own layer, which knows neither bags nor padding."""
    read = [i for i in history if i != PADDING][-LONGEST:]
    x = (model.vectors.table("item.weight")[read] + model.positions[: len(read)]).double()[None]
    for block in model.blocks:
        layer = (
            nn.TransformerEncoderLayer(WIDTH, block.heads, 5, 0.0, batch_first=True, norm_first=True).double().eval()
        )
        theirs = {
            "self_attn.in_proj_weight": block.queries_keys_values.weight,
            "self_attn.in_proj_bias": block.queries_keys_values.bias,
            "self_attn.out_proj.weight": block.out.weight,
            "self_attn.out_proj.bias": block.out.bias,
            "linear1.weight": block.network[0].weight,
            "linear1.bias": block.network[0].bias,
            "linear2.weight": block.network[3].weight,
            "linear2.bias": block.network[3].bias,
            "norm1.weight": block.attention_norm.weight,
            "norm1.bias": block.attention_norm.bias,
            "norm2.weight": block.network_norm.weight,
            "norm2.bias": block.network_norm.bias,
        }
        layer.load_state_dict({name: value.double() for name, value in theirs.items()})
        causal = nn.Transformer.generate_square_subsequent_mask(len(read), dtype=torch.float64)
        x = layer(x, src_mask=causal, is_causal=True)
    norm = model.last_norm
    return F.layer_norm(x[0], [WIDTH], norm.weight.double(), norm.bias.double())


def users(model: Any, histories: Sequence[Sequence[int]]) -> Tensor:
    """The last state of each; that of nothing is the bias of the last norm."""
    return torch.stack([states(model, h)[-1] if {*h} - {PADDING} else model.last_norm.bias.double() for h in histories])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=2 * LONGEST), min_size=1, max_size=5))
def test_users_and_scores_are_those_of_torchs_encoder(histories: list[list[int]]) -> None:
    model = sasrec()
    ids, want = bags(histories), users(model, histories)
    torch.testing.assert_close(model.users(torch.zeros(len(histories), 0), ids).double(), want, rtol=1e-4, atol=1e-4)
    items = model.vectors.table("item.weight").double()[ids.values[: len(histories)]]
    scores = model(torch.zeros(len(histories), 0), ids)
    torch.testing.assert_close(scores.double(), (want * items).sum(1), rtol=1e-4, atol=1e-3)


def test_every_position_is_the_state_of_a_shorter_history_and_tells_the_next_item() -> None:
    model = sasrec(every_position=True)
    dense, ids = torch.zeros(len(HISTORIES), 0), bags(HISTORIES)
    got, want = model.queries(dense, ids), []
    for row, history in enumerate(HISTORIES):
        read = [i for i in history if i != PADDING][-LONGEST:]
        vectors = states(model, history) if read else model.last_norm.bias.double()[None]
        want += [(row, target, v) for target, v in zip([*read[1:], 10 + row], vectors, strict=True)]
    order = torch.argsort(got.rows, stable=True)
    assert got.rows[order].tolist() == [row for row, _, _ in want]
    assert got.targets[order].tolist() == [target for _, target, _ in want]
    torch.testing.assert_close(got.vectors[order].double(), torch.stack([v for *_, v in want]), rtol=1e-4, atol=1e-4)
    last = sasrec().queries(dense, ids)
    assert torch.equal(last.vectors, model.users(dense, ids))
    assert last.targets.tolist() == ids.values[: len(HISTORIES)].tolist()


def test_items_of_histories_are_learned_where_they_are_trained() -> None:
    """The catalogue and its frequencies are those of the targets of positive rows."""
    seen = ListIds.of([(torch.tensor([3, 7, PADDING, 3, 9, 20, 21]), torch.tensor([0, 4, 5, 5, 7]))])
    candidates, label = torch.tensor([[10], [11], [11], [12]]), torch.tensor([1.0, 1, 1, 0])
    batch = Batch(torch.zeros(4, 0), candidates, label, {}, seen)

    class Rows:
        def batches(self, *_: object, **__: object) -> list[Batch]:
            return [batch]

    for every, wanted in ((False, {10: 1, 11: 2, 12: 0}), (True, {7: 1, 3: 1, 10: 1, 11: 2, 12: 0, 21: 0})):
        model = sasrec(every_position=every)
        learn_items(model, Rows())  # type: ignore[arg-type]
        assert model.in_catalogue.nonzero().flatten().tolist() == sorted(wanted)
        assert model.item_counts.nonzero().flatten().tolist() == sorted(i for i, n in wanted.items() if n)
        assert all(int(model.item_counts[i]) == n for i, n in wanted.items())


def test_nothing_later_enters_a_state_bit_for_bit() -> None:
    model = sasrec(every_position=True)
    dense = torch.zeros(2, 0)
    before = model.queries(dense, bags([[1, 2, 3, 5], [7, 8, 9, 2]])).vectors
    after = model.queries(dense, bags([[1, 2, 6, 0], [7, 8, 9, 3]], [17, 18])).vectors
    same = (before == after).all(1)
    assert same.tolist() == [True, True, False, False, True, True, True, False]


@pytest.mark.parametrize("method", [m.name for m in rse.list_methods()])
def test_candidates_and_histories_train_one_table_of_any_method(method: str) -> None:
    """Oracle: the same program on torch with dense gradients."""
    plan = Plan.full(SCHEMA) if method == "full" else Plan.uniform(SCHEMA, method, budget="900B", full_below=1)
    fused = sasrec(plan, optimizer=rse.SGD(lr=0.05), every_position=True).train()
    plain = sasrec(plan, backend="torch", every_position=True).train()
    plain.load_state_dict(fused.state_dict(), strict=False)
    dense, ids = torch.zeros(len(HISTORIES), 0), bags(HISTORIES)
    optimizers = [torch.optim.SGD(m.trainable(), lr=0.05) for m in (fused, plain)]
    for _ in range(3):
        for model, optimizer in zip((fused, plain), optimizers, strict=True):
            optimizer.zero_grad()
            queries = model.queries(dense, ids)
            scores = queries.vectors @ model.items(torch.arange(ITEMS)).T
            F.cross_entropy(scores, queries.targets).backward()
            optimizer.step()
    torch.testing.assert_close(fused(dense, ids), plain(dense, ids), rtol=1e-4, atol=1e-4)


def test_a_single_id_per_row_is_a_history_of_one() -> None:
    model = sasrec()
    ids = torch.tensor([[3, 7], [5, PADDING]])
    torch.testing.assert_close(
        model(torch.zeros(2, 0), ids), model(torch.zeros(2, 0), bags([[7], []], [3, 5])), rtol=0, atol=0
    )


def test_what_is_no_history_is_refused(tmp_path: Path) -> None:
    apart = Schema([FeatureSpec("item", 30, 4), FeatureSpec("seen", 30, 4)])
    with pytest.raises(ConfigError, match="give both one `vocab`"):
        sasrec(schema=apart)
    with pytest.raises(ConfigError, match="'sen'"):
        sasrec(history="sen")
    three = Schema([*SCHEMA, FeatureSpec("bought", ITEMS, WIDTH, table="item", padding_idx=PADDING)])
    with pytest.raises(ConfigError, match="item, seen, bought"):
        sasrec(schema=three)
    with pytest.warns(UserWarning, match="not bought; tables that these alone have stay"):
        made = sasrec(schema=three, item="item", history="seen")
    assert made.history == "seen"
    # Files of it warn no more, which would fail here.
    rse.export(made, tmp_path / "model.safetensors")
    assert rse.load(tmp_path / "model.safetensors").history == "seen"
    with pytest.raises(ConfigError, match="divide the width 8"):
        sasrec(heads=3)


def test_a_served_file_gives_the_same_users_items_and_scores(tmp_path: Path) -> None:
    model = sasrec(Plan.uniform(SCHEMA, "unified", budget="500B", full_below=1))
    dense, ids = torch.zeros(len(HISTORIES), 0), bags(HISTORIES)
    rse.export(model, tmp_path / "model.safetensors")
    served = rse.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(served(dense, ids), model(dense, ids))
        assert torch.equal(served.users(dense, ids), model.users(dense, ids))
        assert torch.equal(served.items(torch.arange(ITEMS)), model.items(torch.arange(ITEMS)))


@pytest.mark.parametrize("histories", [HISTORIES, [[]], [[], []], [[1] * 20], [[PADDING] * 9, [2]]])
def test_users_of_a_graph_are_those_of_the_model(histories: list[list[int]]) -> None:
    for schema in (SCHEMA, Schema([FeatureSpec(f.name, ITEMS, WIDTH, table="item") for f in SCHEMA])):
        model, ids = sasrec(schema=schema), bags(histories)
        with torch.no_grad():
            wanted = model.users(torch.zeros(len(histories), 0), ids)
            torch.testing.assert_close(model._users_of_graph(ids), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "int8"])
def test_a_graph_scores_ragged_histories(precision: Any, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    model = sasrec(Plan.uniform(SCHEMA, "unified", budget="500B", full_below=1))
    if precision is not None:
        rse.export(model, tmp_path / "model.safetensors", precision)
        model = rse.load(tmp_path / "model.safetensors")
    example = torch.zeros(len(HISTORIES), 0), bags(HISTORIES)
    assert to_onnx(model, tmp_path / "m.onnx", example).check is not None
    program = to_torch_export(model, tmp_path / "m.pt2", example)
    assert program.check is not None
    assert program.check.max_difference < 1e-5
    session = ort.InferenceSession(str(tmp_path / "m.onnx"))
    names = [value.name for value in session.get_inputs()]
    for histories in (HISTORIES, [[]], [[], []], [[1] * 20], [[PADDING] * 9, [2]], [[7]] * 40):
        ids, dense = bags(histories, [3] * len(histories)), torch.zeros(len(histories), 0)
        given = zip(names, (dense, ids.values, ids.offsets), strict=True)
        (found,) = session.run(None, {name: part.numpy() for name, part in given})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(dense, ids), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Users that go from item to item, mostly by a rule: what comes next is told by the last of the history."""
    rng, rows = np.random.default_rng(0), []
    for user in range(60):
        walk = [int(rng.integers(0, 20))]
        for _ in range(14):
            walk.append((7 * walk[-1] + 1) % 20 if rng.random() < 0.9 else int(rng.integers(0, 20)))
        rows += [{"user": user, "item": walk[k], "seen": walk[:k]} for k in range(1, len(walk))]
    columns = {
        "user": {"kind": "group"},
        "item": {"kind": "categorical", "vocab": "item"},
        "seen": {"kind": "sequence", "vocab": "item", "max_length": 10},
    }
    folder = tmp_path_factory.mktemp("walks") / "data"
    convert_table(pl.DataFrame(rows), folder, {"columns": columns, "split": {"kind": "last", "column": "user"}})
    return open_dataset(folder)


CONFIG = TrainConfig(
    model="sasrec",
    model_args={"max_length": 8, "dropout": 0.1, "heads": 2, "every_position": True},
    loss="softmax",
    embedding_dim=16,
    batch_size=64,
    epochs=5,
    learning_rate=5e-3,
    exclude_seen=False,
    checkpoint_every=1,
    threads=1,
)


def test_a_killed_run_goes_on_bit_for_bit(walks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.replace(epochs=1, method="hash", ratio=2.0)
    whole = run_training(config, walks, folder=tmp_path / "whole", show_progress=False)
    steps, take = [], Trainer._step

    def killed(self: Trainer, batch: Any) -> float:
        if len(steps) == 5:
            raise KeyError("killed")
        steps.append(batch)
        return take(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", killed)
        with pytest.raises(KeyError, match="killed"):
            run_training(config, walks, folder=tmp_path / "rest", show_progress=False)
    rest = run_training(config, walks, folder=tmp_path / "rest", resume=True, show_progress=False)
    assert rest.result.steps == whole.result.steps > 5
    assert rest.result.test == whole.result.test
    for (name, mine), known in zip(rest.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(mine, known), name


def test_it_finds_the_next_item_of_most(walks: Any) -> None:
    test = run_training(CONFIG, walks, show_progress=False).result.test
    assert test is not None
    assert test.ndcg is not None
    assert test.ndcg[10] > 0.45  # by chance 0.23
