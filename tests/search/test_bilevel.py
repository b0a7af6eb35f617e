"""What DNIS moves its selection by, beside the derivatives of the losses that autograd takes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from recsys_embed.search import DnisSettings, layers
from recsys_embed.search.bilevel import BilevelTrainer
from recsys_embed.search.dnis import DnisSearch
from recsys_embed.search.folder import SearchFolder
from tests.train.toy import ToyData, toy_config

L1 = 1e-3


def test_the_second_order_term_is_the_effect_through_the_next_step_of_the_tables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # d/d alpha of unseen(w - rate * d train(w, alpha) / d w) through w alone, by differentiating twice.
    config = toy_config(
        model="fm", model_args={}, backend="torch", embedding_init="normal:0.3", embedding_learning_rate=0.05
    )
    search = DnisSearch(config, ToyData(), DnisSettings(blocks=2), SearchFolder(None, {}))
    options = {"upper": "valid", "alpha_lr": 0.05, "l1": L1, "second_order": True, "show_progress": False}
    trainer = BilevelTrainer(search.build(), search.data, config, **options)
    net, layer = trainer.net, trainer.layer
    seen = []
    layer.step = lambda grad, lr, second: seen.append((grad, lr, second))
    with torch.no_grad():
        layer.alpha.uniform_(0.2, 0.9)
    train, unseen = (next(iter(search.data.batches(split, 500))) for split in ("train", "valid"))
    before = {name: value.clone() for name, value in net.state_dict().items() if value.is_floating_point()}
    trainer._select(train, unseen)
    (grad, lr, second) = seen[0]

    monkeypatch.setattr(layers, "mask_vectors", lambda *_: None)  # plain torch, which differentiates twice
    layer.alpha.requires_grad_(True)
    with trainer._open() as weights:
        losses = [F.binary_cross_entropy_with_logits(net(b.dense, b.ids), b.label) for b in (train, unseen)]
        toward, *direction = torch.autograd.grad(losses[1], [layer.alpha, *weights])
        inner = torch.autograd.grad(losses[0], weights, create_graph=True)
        product = sum((g * d).sum() for g, d in zip(inner, direction, strict=True))
        (mixed,) = torch.autograd.grad(product, [layer.alpha])
    wanted = -0.05 * mixed
    assert lr == 0.05
    torch.testing.assert_close(grad, toward + L1)
    assert F.cosine_similarity(second.flatten(), wanted.flatten(), dim=0) > 0.99
    assert float(second.norm() / wanted.norm()) == pytest.approx(1.0, abs=0.02)
    for name, value in before.items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)
