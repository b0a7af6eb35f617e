"""An id that is padding: zeros without gradient, and bags skip it; for every method, backend, pooling and policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed import SGD, EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.errors import ConfigError, IdRangeError
from recsys_embed.registry import MethodInfo, list_methods

N, WIDTH, PAD = 61, 8, 5
METHODS = [pytest.param(m, id=m.name) for m in list_methods()]
BACKENDS = ("native", "torch", "reference")
POOLINGS: tuple[Any, ...] = ("sum", "mean", "max")


def collection(method: MethodInfo, backend: str, padded: bool, **options: Any) -> EmbeddingCollection:
    """A feature per pooling over one table, and one without padding."""
    specs = [
        FeatureSpec(p, N, WIDTH, p, init="normal:1", table="t", padding_idx=PAD if padded else None, **options)
        for p in POOLINGS
    ]
    specs.append(FeatureSpec("whole", N, WIDTH, init="normal:1", table="t", **options))
    schema = Schema(specs)
    spec = schema["whole"]
    need = method.config_cls.sized(spec, 1).footprint(spec).serve
    config = method.config_cls.for_budget(spec, max(N * WIDTH * 2, need))
    return EmbeddingCollection(schema, Plan(dict.fromkeys(schema.names, config)), backend=backend)


def bags(seed: int = 0, length: int = 40) -> tuple[Tensor, Tensor]:
    """A few ids of which many are padding, in bags, the same for all four features; the first two bags are padding."""
    make = torch.Generator().manual_seed(seed)
    values = torch.randint(N, (length,), generator=make)
    values[torch.rand(length, generator=make) < 0.4] = PAD
    values[:5] = PAD
    offsets = torch.tensor([0, 1, 5, 5, 12, 12 + length // 4, length])
    return values, offsets


def four(values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    count = len(POOLINGS) + 1
    shifted = torch.cat([offsets[:1], *(offsets[1:] + i * len(values) for i in range(count))])
    return values.repeat(count), shifted


def without_padding(values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    kept = values != PAD
    return values[kept], torch.cat([torch.zeros(1, dtype=torch.int64), kept.long().cumsum(0)])[offsets]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_is_as_if_it_was_not_there(method: MethodInfo, backend: str) -> None:
    padded, plain = collection(method, backend, True), collection(method, backend, False)
    assert all(torch.equal(a, b) for a, b in zip(padded.parameters(), plain.parameters(), strict=True))
    with_, rest = bags(), without_padding(*bags())
    scale = torch.linspace(-1, 1, 4 * WIDTH).view(1, 4, WIDTH) if padded.output_dim == WIDTH else torch.ones(())
    found, wanted = padded(*four(*with_)), plain(*four(*rest))
    torch.testing.assert_close(found[:, :3], wanted[:, :3])
    assert not found[:2, :3].any()
    (found * scale)[:, :3].square().sum().backward()
    (wanted * scale)[:, :3].square().sum().backward()
    for (name, mine), theirs in zip(padded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    # Ids one by one, and the feature without padding, which reads the row.
    ids = torch.tensor([[PAD] * 4, [7] * 4])
    vectors = padded(ids)
    assert not vectors[0, :3].any()
    torch.testing.assert_close(vectors[1], plain(ids)[1])
    torch.testing.assert_close(vectors[0, 3], plain(ids)[0, 3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unseen", ["hash", "oov", "zero", "raise", None])
@pytest.mark.parametrize("name", ["full", "hash"])
def test_minus_one_is_no_padding(name: str, unseen: Any, backend: str) -> None:
    method = rse.registry.get_method(name)
    padded, plain = (collection(method, backend, p, unseen=unseen) for p in (True, False))
    for value in (-1, -2, N):
        ids = torch.full((2, 4), value)
        if unseen == "raise" or (unseen is None and name == "full"):
            with pytest.raises(IdRangeError, match=f"from {value} to"):
                padded(ids)
            continue
        wanted = plain(ids)
        hashed = value == -1 and name == "hash" and unseen in ("hash", None)
        # Hashed, -1 has the number that padding has left.
        wanted = plain(torch.full((2, 4), PAD)) if hashed else wanted
        torch.testing.assert_close(padded(ids)[:, :3], wanted[:, :3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["hash", "multihash"])
def test_of_raw_ids(name: str, backend: str) -> None:
    """Every other id, negative ones included, is an id; no two of them become one."""
    pad = -(2**40)
    spec = FeatureSpec("a", 1000, WIDTH, "mean", ids="raw", init="normal:1")
    schemas = [Schema([replace(spec, padding_idx=p)]) for p in (None, pad)]
    config = rse.registry.get_method(name).config_cls.for_budget(spec, 8000)
    plain, padded = (EmbeddingCollection(s, Plan({"a": config}), backend=backend) for s in schemas)
    ids = torch.tensor([[-2], [-(2**63)], [2**63 - 1], [PAD], [0]])
    torch.testing.assert_close(padded(ids), plain(ids))
    assert not padded(torch.tensor([[pad]])).any()
    assert padded(torch.tensor([[-1]])).any()
    values, offsets = torch.tensor([-7, pad, -9, pad]), torch.tensor([0, 3, 4])
    torch.testing.assert_close(padded(values, offsets), plain(values[[0, 2]], torch.tensor([0, 2, 2])))


def test_is_torchs_padding() -> None:
    """The bags of nn.EmbeddingBag with padding_idx, forward and one step."""
    for mode in POOLINGS:
        coll = EmbeddingCollection(Schema([FeatureSpec("a", N, WIDTH, mode, padding_idx=PAD)]), None, SGD(lr=1.0))
        bag = nn.EmbeddingBag(N, WIDTH, mode=mode, padding_idx=PAD, include_last_offset=True)
        with torch.no_grad():
            bag.weight.copy_(coll.table("a.weight"))
        values, offsets = bags()
        out = coll(values, offsets)
        torch.testing.assert_close(out[:, 0], bag(values, offsets))
        out.square().sum().backward()
        bag(values, offsets).square().sum().backward()
        torch.testing.assert_close(coll.table("a.weight"), bag.weight.detach() - bag.weight.grad)


@pytest.mark.slow
@pytest.mark.parametrize("unseen", [None, "zero"])
def test_compiled(unseen: Any) -> None:
    method = rse.registry.get_method("hash")
    coll = collection(method, "auto", True, unseen=unseen)
    compiled = torch.compile(coll, fullgraph=True, backend="aot_eager")
    values, offsets = four(*bags())
    torch.testing.assert_close(compiled(values, offsets), coll(values, offsets))
    ids = torch.tensor([[PAD, 3, PAD, PAD], [7, PAD, 1, 2]])
    torch.testing.assert_close(compiled(ids), coll(ids))


def test_counts_leave_it_out() -> None:
    coll = EmbeddingCollection(Schema([FeatureSpec("a", N, WIDTH, padding_idx=PAD)])).count_unseen()
    coll(torch.tensor([[PAD], [1], [PAD], [2]]))
    assert coll.unseen_counts()["a"] == (0, 2)


def test_is_one_of_the_ids() -> None:
    with pytest.raises(ConfigError, match=r"padding_idx.*\[0, 10\)"):
        FeatureSpec("a", 10, 4, padding_idx=10)
    with pytest.raises(ConfigError, match="padding_idx"):
        Schema(
            [FeatureSpec("a", 10, 4, ids="raw", table="t", padding_idx=i) for i in (1,)]
            + [FeatureSpec("b", 10, 4, ids="raw", table="t")]
        )


def test_states_load_with_another_padding() -> None:
    plain = EmbeddingCollection(Schema([FeatureSpec("a", N, WIDTH)]), seed=1)
    padded = EmbeddingCollection(Schema([FeatureSpec("a", N, WIDTH, padding_idx=PAD)]))
    padded.load_state_dict(plain.state_dict())
    assert torch.equal(padded.table("a.weight"), plain.table("a.weight"))
