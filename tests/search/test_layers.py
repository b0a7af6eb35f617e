"""What searches learn: the step and its estimator, masks, selections, thresholds, and what makes rows die."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsys_embed.errors import ConfigError
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.models import build_model
from recsys_embed.plan import Plan
from recsys_embed.search import DnisLayer, OptembedLayer, Supernet
from recsys_embed.search.layers import PepLayer, long_tailed, normalised, soft_threshold, unit_step


def test_the_estimator_at_its_corners() -> None:
    u = torch.tensor([-1.1, -1, -0.41, -0.4, -0.2, 0, 0.2, 0.4, 0.41, 1, 1.1], dtype=torch.float64)
    wanted = torch.tensor([0, 0.4, 0.4, 0.4, 1.2, 2, 1.2, 0.4, 0.4, 0.4, 0], dtype=torch.float64)
    torch.testing.assert_close(long_tailed(u), wanted)
    assert unit_step(torch.tensor([-1.0, 0.0, 1e-9])).tolist() == [0, 0, 1], "a norm equal to its threshold is pruned"


@settings(max_examples=30, deadline=None)
@given(norm=st.sampled_from([1, 2]), seed=st.integers(0, 2**30), oov=st.booleans())
def test_gradients_are_the_papers(norm: int, seed: int, oov: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    layer = OptembedLayer(3, 4, norm=norm, oov=oov).double().eval()
    v = (torch.randn(5, 3, 4, generator=g, dtype=torch.float64) * 0.3).requires_grad_()
    with torch.no_grad():
        layer.thresholds.copy_(torch.rand(3, generator=g))
        if oov:
            layer.oov.copy_(torch.randn(3, 4, generator=g))
    layer.widths = torch.tensor([4, 1, 3])
    mask = layer.columns(layer.widths).double()
    upstream = torch.randn(5, 3, 4, generator=g, dtype=torch.float64)
    layer(v).backward(upstream)
    norms = v.detach().norm(norm, dim=-1)
    kept = (norms > layer.thresholds.detach()).double()
    slope = long_tailed(norms - layer.thresholds.detach())
    other = layer.oov.detach() * mask if oov else 0.0
    q = (upstream * (mask * v.detach() - other)).sum(-1)
    toward = v.detach().sign() if norm == 1 else v.detach() / norms.unsqueeze(-1)
    torch.testing.assert_close(layer.thresholds.grad, -(slope * q).sum(0))
    torch.testing.assert_close(v.grad, kept[..., None] * mask * upstream + (slope * q)[..., None] * toward)


def test_a_pruned_row_comes_back() -> None:
    row = torch.full((1, 1, 4), 0.05, requires_grad=True)
    layer = OptembedLayer(1, 4).eval()
    with torch.no_grad():
        layer.thresholds.fill_(0.3)
    for _ in range(100):
        out = layer(row)
        if out.any():
            break
        (-out.sum()).backward()  # the loss falls along the row
        with torch.no_grad():
            row.sub_(row.grad, alpha=0.05)
            row.grad = None
    assert layer(row).any()


def test_masks_are_prefixes_drawn_per_sample_and_field() -> None:
    layer = OptembedLayer(6, 8, rows="none")
    out = layer(torch.ones(4000, 6, 8))
    widths = out.sum(-1)
    assert torch.equal(out, layer.columns(widths))
    shares = torch.stack([(widths == w).float().mean(0) for w in range(1, 9)])
    assert (shares - 1 / 8).abs().max() < 0.03
    correlation = torch.corrcoef(widths.T) - torch.eye(6)
    assert correlation.abs().max() < 0.06
    assert torch.equal(layer.eval()(torch.ones(2, 6, 8)), torch.ones(2, 6, 8))


def test_thresholds_step_by_plain_sgd_on_loss_and_pull() -> None:
    layer = OptembedLayer(2, 4)
    before = layer.thresholds.detach().clone()
    layer.thresholds.grad = torch.tensor([0.5, -1.0])
    layer.step(lr=0.1, pull=0.2)
    torch.testing.assert_close(
        layer.thresholds.detach(), before - 0.1 * (torch.tensor([0.5, -1.0]) - 0.2 * before.neg().exp())
    )


def test_thresholds_per_row_belong_to_their_rows() -> None:
    layer = OptembedLayer(2, 4, rows="row", sizes=[3, 2]).eval()
    with torch.no_grad():
        layer.thresholds.copy_(torch.tensor([9.0, 0, 9, 0, 9]))
    ids = torch.tensor([[1, 0], [0, 1], [2, 0]])
    assert layer(torch.ones(3, 2, 4), ids).any(-1).tolist() == [[True, True], [False, False], [False, True]]
    layer(torch.ones(3, 2, 4, requires_grad=True) * 0.2, ids).sum().backward()
    assert layer.thresholds.grad[3] != 0
    with pytest.raises(ConfigError, match="need the ids"):
        layer(torch.ones(3, 2, 4))


def test_faults_of_layers_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"2 faults in OptembedLayer:(.|\n)*`norm`(.|\n)*must be searched"):
        OptembedLayer(2, 4, rows="none", norm=3, dims=False)
    with pytest.raises(ConfigError, match="needs `sizes`"):
        OptembedLayer(2, 4, rows="row", sizes=[3])


@pytest.mark.parametrize("optimizer", ["dense", "fused"])
def test_an_id_that_never_occurs_falls_below_its_threshold(optimizer: str) -> None:
    from recsys_embed import Adam, EmbeddingCollection

    schema = Schema([FeatureSpec("a", 10, 4, init="normal:0.1")])
    fused = Adam(lr=0.01, weight_decay=1e-3, rows="all") if optimizer == "fused" else None
    coll = EmbeddingCollection(schema, optimizer=fused)
    layer = OptembedLayer(1, 4, dims=False)
    with torch.no_grad():
        layer.thresholds.fill_(0.02)
    dense = None if fused else torch.optim.Adam(coll.parameters(), lr=0.01, weight_decay=1e-3)
    ids = torch.arange(5).unsqueeze(1)
    for _ in range(300):
        ((layer(coll(ids), ids) - 1) ** 2).sum().backward()
        if dense is not None:
            dense.step()
            dense.zero_grad()
    norms = coll.table("a.weight").detach().abs().sum(1)
    assert (norms[5:] < 0.02).all()
    assert (norms[:5] > 1).all()


# -- DNIS and PEP ---------------------------------------------------------------------------------------------------


def test_gradients_of_blocks_have_one_mean() -> None:
    grad = torch.randn(7, 5, dtype=torch.float64) * torch.logspace(-4, 3, 7, dtype=torch.float64).unsqueeze(1)
    means = normalised(grad).abs().mean(1)
    torch.testing.assert_close(means, torch.ones(7, dtype=torch.float64), rtol=1e-2, atol=0)


def test_the_selection_stays_between_0_and_1() -> None:
    layer = DnisLayer([torch.tensor([0, 1])], 3)
    layer.step(torch.tensor([[1.0, 0, -1], [1.0, 1, 1]]), lr=2.0)
    assert layer.alpha.tolist() == [[0, 1, 1], [0, 0, 0]]
    layer.step(torch.zeros(2, 3), lr=0.5, second=torch.tensor([[-1.0, 1, 0], [0, 0, 0]]))
    assert layer.alpha.tolist() == [[0.5, 0.5, 1], [0, 0, 0]]


def test_each_id_is_scaled_by_its_block() -> None:
    layer = DnisLayer([torch.tensor([0, 1, 0]), torch.tensor([2, 1])], 2)
    with torch.no_grad():
        layer.alpha.copy_(torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]))
    out = layer(torch.ones(2, 2, 2), torch.tensor([[2, 0], [1, 1]]))
    torch.testing.assert_close(out, torch.tensor([[[0.1, 0.2], [0.5, 0.6]], [[0.3, 0.4], [0.3, 0.4]]]))


@pytest.mark.parametrize(
    "granularity", ["global", "dimension", "field", "field_dimension", "feature", "feature_dimension"]
)
def test_thresholds_of_pep_belong_where_their_granularity_says(granularity: str) -> None:
    schema = Schema([FeatureSpec("a", 5, 3), FeatureSpec("b", 7, 3)])
    layer = PepLayer(schema, granularity, init=-150.0, lr=0.1, decay=1e-2)
    count = sum(p.numel() for p in layer.parameters())
    assert (
        count
        == {"global": 1, "dimension": 3, "field": 2, "field_dimension": 6, "feature": 12, "feature_dimension": 36}[
            granularity
        ]
    )
    ids = torch.tensor([[4, 6], [0, 1]])
    v = torch.randn(2, 2, 3)
    assert torch.equal(layer(v, ids), v), "at -150 a sigmoid is 0 in float32"
    for p in layer.parameters():
        p.data.copy_(torch.randn(p.shape))
    wanted = torch.stack([
        torch.stack([soft_threshold(v[b, f], layer.of(f, n).expand(s.num_ids, 3)[ids[b, f]])
                     for f, (n, s) in enumerate(zip("ab", schema, strict=True))]) for b in range(2)])  # fmt: skip
    torch.testing.assert_close(layer(v, ids), wanted)


def test_decay_alone_lifts_thresholds_of_pep() -> None:
    schema = Schema([FeatureSpec("a", 5, 3)])
    layer = PepLayer(schema, "feature_dimension", init=-150.0, lr=0.5, decay=1e-5)
    for _ in range(20):
        layer(torch.ones(1, 1, 3, requires_grad=True), torch.tensor([[2]])).sum().backward()
    raw = layer.of(0, "a").detach()
    torch.testing.assert_close(raw, torch.full((5, 3), -140.0), rtol=0, atol=0.2)  # all rows, by the rate per step


# -- the supernet ---------------------------------------------------------------------------------------------------


def net_of(model: str = "deepfm", **hparams: object) -> tuple[Supernet, Tensor, Tensor]:
    schema = Schema([FeatureSpec("a", 20, 4, init="normal:1"), FeatureSpec("b", 30, 4, init="normal:1")])
    built = build_model(model, schema, Plan.full(schema), num_dense=2, **{"hidden": (8,), **hparams})
    layer = OptembedLayer(2, 4)
    ids = torch.stack([torch.randint(0, s.num_ids, (16,)) for s in schema], 1)
    return Supernet(built, layer), torch.randn(16, 2), ids


def test_a_supernet_masks_what_the_network_sees_and_nothing_else() -> None:
    net, dense, ids = net_of()
    net.eval()
    whole = net(dense, ids)
    with torch.no_grad():
        net.layer.thresholds.fill_(3.0)
    masked = net(dense, ids)
    assert not torch.allclose(whole, masked)
    kept = {n: net.table(n).abs().sum(1) > 3 for n in "ab"}
    with torch.no_grad():
        net.layer.thresholds.fill_(-1.0)
        for n in "ab":
            net.table(n)[~kept[n]] = 0
    torch.testing.assert_close(net(dense, ids), masked)


def test_a_supernet_needs_plain_tables_of_one_width() -> None:
    schema = Schema([FeatureSpec("a", 20, 4)])
    hashed = build_model("fm", schema, Plan.uniform(schema, "hash", num_buckets=5), num_dense=2)
    with pytest.raises(ConfigError, match="full tables of one width; got methods"):
        Supernet(hashed, OptembedLayer(1, 4))
    mixed = Schema([FeatureSpec("a", 20, 4), FeatureSpec("b", 20, 8)])
    with pytest.raises(ConfigError, match="width None"):
        Supernet(build_model("dnn", mixed, Plan.full(mixed), num_dense=2), OptembedLayer(2, 4))
