"""Searches over lists, sequences and shared tables: masks act on the rows and columns of a table, before pooling."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recsys_embed import FeatureSpec, Schema
from recsys_embed.models import build_model
from recsys_embed.plan import Plan
from recsys_embed.search import (
    CandidateEvaluator,
    DnisLayer,
    OptembedLayer,
    OptembedSearch,
    OptembedSettings,
    PepSearch,
    PepSettings,
    Supernet,
    get_search,
    run_search,
)
from recsys_embed.search.folder import SearchFolder
from recsys_embed.search.layers import PepLayer, table_numbers
from recsys_embed.search.retrain import build_retrained, planned
from recsys_embed.train import TrainConfig, evaluate
from recsys_embed.train.evaluation import logits_of
from recsys_embed.typing import BagIds
from tests.tiers import slow_but
from tests.train.events import ARGS, Events
from tests.train.test_losses import Ratings

WIDTH = 4
SCHEMA = Schema(
    [
        FeatureSpec("user", 11, WIDTH),
        FeatureSpec("item", 9, WIDTH, table="things"),
        FeatureSpec("tags", 7, WIDTH, pooling="mean"),
        FeatureSpec("seen", 9, WIDTH, pooling="mean", table="things", padding_idx=0),
        FeatureSpec("liked", 9, WIDTH, table="things"),
        FeatureSpec("best", 7, WIDTH, pooling="max", table="tags"),
    ]
).with_init("normal:0.3")
TABLES = {"user": 0, "things": 1, "tags": 2}
BATCH = 6


def bags_of(seed: int) -> BagIds:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (len(SCHEMA), BATCH), generator=g)
    lengths[:2] = 1
    values = [torch.randint(0, s.num_embeddings, (int(n),), generator=g)
              for s, n in zip(SCHEMA, lengths.sum(1), strict=True)]  # fmt: skip
    values[SCHEMA.names.index("seen")][::2] = 0  # padding
    return BagIds(torch.cat(values), F.pad(lengths.reshape(-1).cumsum(0), (1, 0)))


def step_of(u: Tensor) -> Tensor:
    """1 where u > 0 with the estimator of OptEmbed as its slope: an independent way to write it."""
    far = u.detach().abs()
    slope = torch.where(far <= 0.4, 2 - 4 * far, (far <= 1).to(u.dtype) * 0.4)
    return (u.detach() > 0).to(u.dtype) + slope * (u - u.detach())


def optembed_table(layer: OptembedLayer, table: Tensor, number: int, start: int, leaves: dict[str, Tensor]) -> Tensor:
    norms = table.abs().sum(1) if layer.norm == 1 else table.square().sum(1).sqrt()
    at = leaves["thresholds"][number] if layer.rows == "field" else leaves["thresholds"][start : start + len(table)]
    keep = step_of(norms - at).unsqueeze(1)
    out = keep * table + ((1 - keep) * leaves["oov"][number] if layer.oov is not None else 0)
    columns = torch.arange(WIDTH) < (WIDTH if layer.widths is None else int(layer.widths[number]))
    return out * columns


def dnis_table(layer: DnisLayer, table: Tensor, number: int, start: int, leaves: dict[str, Tensor]) -> Tensor:
    return table * leaves["alpha"][layer.block[start : start + len(table)].long()]


def pep_table(layer: PepLayer, table: Tensor, number: int, start: int, leaves: dict[str, Tensor]) -> Tensor:
    if layer.few is not None:
        raw = leaves["few"][number if len(layer.few) > 1 else 0]
    else:
        raw = leaves[f"many.width{layer.many.output_dim}"][start : start + len(table)]
    return table.sign() * (table.abs() - raw.sigmoid()).clamp_min(0)


def dnis() -> DnisLayer:
    blocks = [torch.arange(11) % 2, 2 + torch.arange(9) % 3, 5 + torch.arange(7) % 2]
    return DnisLayer(blocks, WIDTH, table_numbers(SCHEMA))


def optembed(**options: Any) -> OptembedLayer:
    return OptembedLayer(3, WIDTH, sizes=[11, 9, 7], field_of=table_numbers(SCHEMA), **options)


LAYERS = {
    "optembed": (optembed, optembed_table),
    "optembed per row": (partial(optembed, rows="row", norm=2), optembed_table),
    "optembed oov": (partial(optembed, oov=True), optembed_table),
    "dnis": (dnis, dnis_table),
    **{
        f"pep {g}": (partial(PepLayer, SCHEMA, g, init=-1.0, lr=0.1, decay=1e-5), pep_table)
        for g in ("global", "field_dimension", "feature", "feature_dimension")
    },
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LAYERS)
def test_bags_are_those_of_masked_tables(name: str, dtype: torch.dtype) -> None:
    make, masked = LAYERS[name]
    torch.manual_seed(3)
    layer = make()
    with torch.no_grad():
        for n, p in layer.named_parameters():
            p.copy_(torch.rand(p.shape) if n in ("thresholds", "alpha") else torch.randn(p.shape) - 1)
    net = Supernet(build_model("dnn", SCHEMA, Plan.full(SCHEMA), num_dense=0, hidden=(3,)), layer).to(dtype)
    if isinstance(layer, OptembedLayer):
        layer.eval().widths = torch.tensor([4, 2, 3])
    if isinstance(layer, PepLayer) and layer.many is not None:
        layer.many.eval()
        layer.many.constant_in_eval = False
    bags, history = bags_of(1), torch.tensor([[4, 0, 8], [8, 1, 4]])
    out, alone = net.vectors(bags), net.vectors.lookup("seen", history)

    storage = net.vectors.width4.detach().double().requires_grad_()
    leaves = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    tables, start = {}, 0
    for table, number in TABLES.items():
        rows = SCHEMA.by_table[table][0].num_ids
        tables[table] = masked(layer, storage[start : start + rows], number, start, leaves)
        start += rows
    wanted = []
    for f, spec in enumerate(SCHEMA):
        ends = bags.offsets[f * BATCH : (f + 1) * BATCH + 1]
        wanted.append(
            F.embedding_bag(
                bags.values[ends[0] : ends[-1]],
                tables[spec.table_name],
                ends - ends[0],
                mode=spec.pooling,
                include_last_offset=True,
                padding_idx=spec.padding_idx,
            )
        )
    pooled = torch.stack(wanted, 1)
    unpooled = tables["things"][history] * (history != 0).unsqueeze(-1)
    tight = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out.double(), pooled, **tight)
    torch.testing.assert_close(alone.double(), unpooled, **tight)

    weights = torch.randn(pooled.shape, dtype=torch.float64), torch.randn(unpooled.shape, dtype=torch.float64)
    ((pooled * weights[0]).sum() + (unpooled * weights[1]).sum()).backward()
    ((out * weights[0].to(dtype)).sum() + (alone * weights[1].to(dtype)).sum()).backward()
    torch.testing.assert_close(net.vectors.width4.grad.double(), storage.grad, **tight)
    for n, p in layer.named_parameters():
        assert p.grad is not None, n
        torch.testing.assert_close(p.grad.double(), leaves[n].grad, **tight)


def test_one_id_per_feature_of_shared_tables_is_masked_alike() -> None:
    """Ids [B, F] of features that share a table are bags of one."""
    schema = Schema([FeatureSpec("user", 30, WIDTH), FeatureSpec("friend", 30, WIDTH, table="user")])
    net = Supernet(
        build_model("dnn", schema.with_init("normal:1"), Plan.full(schema), num_dense=0, hidden=(3,)),
        OptembedLayer(1, WIDTH, field_of=table_numbers(schema)),
    ).eval()
    with torch.no_grad():
        net.layer.thresholds.fill_(3.0)
    net.layer.widths = torch.tensor([3])
    ids = torch.randint(0, 30, (40, 2))
    table = net.table("friend").detach()
    masked = table * (table.abs().sum(1, keepdim=True) > 3) * (torch.arange(WIDTH) < 3)
    torch.testing.assert_close(net.vectors(ids), masked[ids])


def test_vectors_of_a_row_that_read_one_table_have_one_width() -> None:
    """Widths are drawn per row and table: of the candidate, its pooled history, and its history before it is pooled."""
    net = Supernet(
        build_model("din", SCHEMA, Plan.full(SCHEMA), num_dense=0, hidden=(3,)), optembed(rows="none")
    ).train()
    with torch.no_grad():
        net.vectors.width4.fill_(1.0)
    bags = bags_of(2)
    lengths = bags.offsets.diff().view(len(SCHEMA), BATCH)
    place = SCHEMA.names.index("liked")
    first, last = int(lengths[:place].sum()), int(lengths[: place + 1].sum())
    seen: list[tuple[Tensor, Tensor]] = []

    def probe(dense: Tensor, ids: BagIds) -> Tensor:
        seen.append((net.vectors(ids), net.vectors.lookup("liked", ids.values[first:last])))
        return ids.offsets[:BATCH]

    net.model.forward = probe
    for _ in range(500):
        net(torch.zeros(BATCH, 0), bags)
    widths = torch.stack([out.ne(0).sum(2) for out, _ in seen])
    things = widths[:, :, 1]
    assert torch.equal(widths[:, lengths[place] > 0, place], things[:, lengths[place] > 0])
    owners = torch.repeat_interleave(torch.arange(BATCH), lengths[place])
    assert torch.equal(torch.stack([out.ne(0).sum(1) for _, out in seen]), things[:, owners])
    shares = torch.stack([(things == w).float().mean(0) for w in range(1, WIDTH + 1)])
    assert (shares - 1 / WIDTH).abs().max() < 0.1
    both = torch.stack([things[:, 0], things[:, 1], widths[:, 0, 0]]).float()
    assert (torch.corrcoef(both) - torch.eye(3)).abs().max() < 0.2, "rows and tables draw for themselves"
    assert net.layer.drawn is None


class More(Events):
    splits: ClassVar[dict[str, int]] = {"train": 1500, "valid": 600, "test": 200}


CONFIG = TrainConfig(
    model="dnn", model_args={"hidden": [8]}, embedding_dim=WIDTH, batch_size=100, epochs=1, learning_rate=0.01,
    embedding_weight_decay=1e-3, ratio=1.3, embedding_init="normal:0.1",
)  # fmt: skip
QUICK = {"generations": 2, "population": 4, "mutations": 2, "crossovers": 2}


@pytest.mark.parametrize("model", ["deepfm", "din"])
def test_candidates_together_are_those_alone(model: str) -> None:
    data = More()
    schema = data.schema(WIDTH).with_init("normal:1")
    torch.manual_seed(0)
    built = build_model(model, schema, Plan.full(schema), num_dense=1, hidden=(8,))
    fields = table_numbers(schema)
    net = Supernet(built, OptembedLayer(max(fields) + 1, WIDTH, field_of=fields))
    with torch.no_grad():
        net.layer.thresholds.fill_(2.0)
    candidates = [(4,) * 5, (1, 2, 3, 4, 1), (2, 1, 1, 1, 4), (1,) * 5]
    wanted = []
    for candidate in candidates:
        net.layer.widths = torch.tensor(candidate)
        wanted.append(evaluate(net, data, "valid").auc)
    net.layer.widths = None
    got = CandidateEvaluator(net, data, batch_size=170).auc(candidates)
    assert got == pytest.approx(wanted, abs=1e-6)
    assert len({round(a, 4) for a in got}) == 4
    part = CandidateEvaluator(net, data, rows=200, batch_size=170).metrics(candidates[:1])
    assert part[0].samples == 200


def test_candidates_of_real_labels_are_compared_by_their_error() -> None:
    data, config = Ratings(real=True), CONFIG.replace(loss="squared_error")
    schema = data.schema(WIDTH).with_init("normal:1")
    net = Supernet(build_model("dnn", schema, Plan.full(schema), num_dense=1, hidden=(8,)), OptembedLayer(3, WIDTH))
    evaluator = CandidateEvaluator(net, data, config)
    candidates = [(4, 4, 4), (1, 1, 1)]
    batch = next(iter(data.batches("valid", 400, shuffle=False)))
    for candidate, score in zip(candidates, evaluator.scores(candidates), strict=True):
        net.layer.widths = torch.tensor(candidate)
        error = (logits_of(net, batch).detach().double() - batch.label.double()).square().mean().sqrt()
        assert score == pytest.approx(-float(error), rel=1e-6)


def search_of(kind: Any, settings: Any, config: TrainConfig, data: Any) -> Any:
    budget = sum(4 * s.num_ids * s.embedding_dim for s in data.schema(WIDTH).first_readers) / config.ratio
    return kind(config.replace(ratio=None), data, settings, SearchFolder(None, {}), int(budget), None, False)


@pytest.mark.parametrize("model", ["dnn", "din"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (OptembedSearch, OptembedSettings(**QUICK, pull=1.0, retrain_from="supernet")),
        (OptembedSearch, OptembedSettings(**QUICK, pull=1.0, oov=True, retrain_from="supernet")),
        (PepSearch, PepSettings(check_every=1, retrain_from="supernet")),
    ],
    ids=["optembed", "optembed oov", "pep"],
)
def test_what_is_found_gives_the_logits_of_the_supernet(kind: Any, settings: Any, model: str) -> None:
    """Kept rows and columns of the tables, in the collection that stores them, and the masked tables are the same."""
    data, config = More(), CONFIG.replace(model=model, epochs=3 if kind is PepSearch else 1)
    search = search_of(kind, settings, config, data)
    search.check()
    plan = search.search()
    methods = {plan[name].method for name in plan}
    assert search.method in methods
    schema = search.schema
    assert plan["item"] == plan["history"], "one table"
    assert plan.footprint(schema).serve <= search.budget
    found = build_retrained(planned(search.config, plan, search.budget), schema, 1, **search.start_weights()).eval()
    net = search.net.eval()
    if kind is OptembedSearch:
        net.layer.widths = torch.tensor(search.folder.get("evolution")["best"])
    batch = next(iter(data.batches("test", 200, shuffle=False)))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(found, batch), logits_of(net, batch), rtol=1e-4, atol=1e-5)


def test_a_table_is_one_choice_of_what_all_its_readers_look_up() -> None:
    """Counts, widths, and bytes are per table; a report names the others as readers."""
    from recsys_embed.search.frequency_blocks import count_ids, id_counts

    data = More()
    schema = data.schema(WIDTH)
    counts = dict(zip(schema.by_table, id_counts(data, schema), strict=True))
    wanted = torch.zeros(30, dtype=torch.int64)
    for batch in data.batches("train", 100, shuffle=False):
        wanted += torch.bincount(batch.ids[:, 1], minlength=30)
        wanted += torch.bincount(batch.lists.feature(1)[0], minlength=30)
    assert torch.equal(counts["item"], wanted)
    assert all(torch.equal(a, b) for a, b in zip(counts.values(), count_ids(data, schema), strict=True))


@pytest.mark.parametrize("kind", slow_but(["dnis", "optembed", "pep"], "dnis"))
def test_real_labels_are_searched_and_told_by_their_error(kind: str, tmp_path: Any) -> None:
    settings = {"optembed": QUICK, "dnis": {"blocks": 2}, "pep": {"check_every": 1, "threshold_lr": 0.4}}[kind]
    cls = get_search(kind)
    config = CONFIG.replace(loss="squared_error", epochs=5 if kind == "pep" else 2)
    outcome = run_search(
        cls, config, Ratings(real=True), cls.settings_cls.from_dict(settings), folder=tmp_path, show_progress=False
    )
    test = outcome.result.test
    assert test.rmse < 1.2
    assert f"- test: RMSE {test.rmse:.4f} (400 rows)" in (tmp_path / "report.md").read_text()
    assert outcome.footprint.serve <= outcome.full_bytes / 1.3


class Stopping(More):
    """Raises a keyboard interrupt where a batch of a split is asked for, once."""

    def __init__(self, split: str, at: int) -> None:
        super().__init__()
        self.split, self.left = split, at

    def batches(self, split: str, *args: Any, **options: Any) -> Any:
        made = super().batches(split, *args, **options)
        return Interrupting(self, made) if split == self.split else made


class Interrupting:
    def __init__(self, owner: Stopping, made: Any) -> None:
        self.owner, self.made = owner, made

    def __len__(self) -> int:
        return len(self.made)

    def __iter__(self) -> Any:
        for batch in self.made:
            self.owner.left -= 1
            if self.owner.left == 0:
                raise KeyboardInterrupt
            yield batch


ITEMS = {"model": "twotower", "model_args": ARGS, "loss": "sampled_softmax", "loss_args": {"negatives": 3}}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"model": "din"}, ITEMS], ids=["din", "twotower"])
@pytest.mark.parametrize("kind", ["optembed", "dnis", "pep"])
def test_a_stopped_search_over_bags_ends_as_it_would_have_ended(kind: str, changes: Any, tmp_path: Any) -> None:
    settings = {"optembed": QUICK, "dnis": {"blocks": 2}, "pep": {"check_every": 2, "threshold_lr": 1.0}}[kind]
    cls = get_search(kind)
    config = CONFIG.replace(**changes, epochs=2, top_k=(5,), checkpoint_every=3, eval_every=7)

    def run(data: Any, folder: str) -> Any:
        options = {"folder": tmp_path / folder, "show_progress": False}
        return run_search(cls, config, data, cls.settings_cls.from_dict(settings), **options)

    whole = run(More(), "whole")
    stops = 0
    for split, at in (("train", 8), ("train", 25), ("valid", 4), ("held_out", 5), ("train", 44), ("valid", 9)):
        try:
            run(Stopping(split, at), "parts")
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 2
    found = run(More(), "parts")
    assert found.plan == whole.plan
    assert found.result.test == whole.result.test
    wanted = whole.model.state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in found.model.state_dict().items() if isinstance(t, Tensor))
