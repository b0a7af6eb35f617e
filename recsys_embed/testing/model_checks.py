"""What a click model must do."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.optim import SGD
from recsys_embed.plan import Plan
from recsys_embed.registry import list_methods
from recsys_embed.utils.types import BagIds


def check_model(model: str) -> None:
    """Run the contract of a registered click model over every method: shape, seeding, learning, state.

    Raises:
        AssertionError: names the method and clause.
    """
    from recsys_embed.models import RetrievalModel, build_model, get_model

    second = "item" if issubclass(get_model(model), RetrievalModel) else "b"
    features = [FeatureSpec("a", 50, 4), FeatureSpec(second, 300, 4)]
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(64, 3, generator=generator)
    single = torch.stack([torch.randint(0, s.num_embeddings, (64,), generator=generator) for s in features], 1)
    label = (single[:, 0] % 2).float()
    ids: Tensor | BagIds = single
    if get_model(model).needs_history:
        features.append(FeatureSpec("history", 300, 4, table=second, pooling="mean"))
        lengths = torch.randint(0, 4, (64,), generator=generator)
        history = torch.randint(0, 300, (int(lengths.sum()),), generator=generator)
        offsets = torch.cat([torch.arange(128), 128 + lengths.cumsum(0) - lengths, torch.tensor([128 + len(history)])])
        ids = BagIds(torch.cat([single.T.reshape(-1), history]), offsets)
    schema = Schema(features)
    for info in list_methods():
        need = sum(info.config_cls.sized(s, 1).footprint(s).serve for s in schema)
        plan = Plan.uniform(schema, info.name, budget=max(need, 350 * 4 * 4), full_below=1)
        given = plan if get_model(model).uses_vectors else Plan.full(schema.with_dim(1))
        with warnings.catch_warnings():
            # A model that reads a history and its item alone says so of the other feature.
            warnings.filterwarnings("ignore", ".* stay as they were drawn")
            net, twin = (
                build_model(model, schema, given, num_dense=3, optimizer=SGD(lr=0.1), seed=7) for _ in range(2)
            )
        where = f"model {model!r}, method {info.name!r}"
        with torch.random.fork_rng():  # both draw the same dropout
            torch.manual_seed(0)
            first = net(dense, ids)
            torch.manual_seed(0)
            again = twin(dense, ids)
        assert first.shape == (64,), f"{where}: logits must be [64]; got {tuple(first.shape)}"
        assert torch.equal(first, again), f"{where}: same seed, other bits"
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(net(dense, ids), label)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        # Not the last: steps this long make small models overshoot once they fit.
        assert min(losses) < losses[0], f"{where}: loss never fell below {min(losses):.4f} from {losses[0]:.4f}"
        twin.load_state_dict(net.state_dict())
        net.eval(), twin.eval()
        assert torch.equal(net(dense, ids), twin(dense, ids)), f"{where}: state does not restore the model"
