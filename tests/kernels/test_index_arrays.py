"""Index arrays that were replaced or moved are read as torch reads them, or refused before a kernel reads them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.dispatch import available_backends

SCHEMA = rse.Schema([rse.FeatureSpec("a", 100_000, 8)])
CONFIG = rse.get_method("adaptive").config_cls.from_params(
    {"num_frequent": 10_000, "num_buckets": 7, "order": "counts"}
)
NATIVE = next(b.available for b in available_backends() if b.name == "native")
IDS = torch.cat([torch.arange(2000), torch.arange(98_000, 100_000)])


def _replaced(backend: str, name: str, change: Callable[[Tensor], Tensor]) -> rse.EmbeddingCollection:
    made = rse.EmbeddingCollection(SCHEMA, rse.Plan({"a": CONFIG}), backend=backend)
    index = made.bundle.kernel.index
    setattr(index, name, change(getattr(index, name)))
    return made


@pytest.mark.skipif(not NATIVE, reason="the native kernels are not built")
@pytest.mark.parametrize("name", ["words", "ranks"])
def test_replaced_arrays_keep_their_type_or_are_refused(name: str) -> None:
    wanted = rse.EmbeddingCollection(SCHEMA, rse.Plan({"a": CONFIG}), backend="torch")(IDS[:, None])
    for change in (Tensor.long, Tensor.clone, lambda t: t.repeat_interleave(2)[::2]):
        made = _replaced("native", name, change)
        assert torch.equal(made(IDS[:, None]), wanted)
        assert torch.equal(copy.deepcopy(made)(IDS[:, None]), wanted)
    for change in (lambda t: t[:1].clone(), lambda t: t.to("meta"), lambda t: torch.cat([t, t])):
        with pytest.raises(ConfigError, match=f"index array '{name}'"):
            _replaced("native", name, change)(IDS[:, None])
    with pytest.raises(ConfigError, match=f"index array '{name}' must be a tensor"):
        _replaced("native", name, lambda t: t.double() + 0.5)
    made = _replaced("native", name, lambda t: t[:1])
    setattr(
        made.bundle.kernel.index, name, _replaced("torch", name, Tensor.clone).bundle.kernel.index.arrays.held[name]
    )
    assert torch.equal(made(IDS[:, None]), wanted)


def test_casts_of_whole_modules_leave_index_arrays() -> None:
    made = rse.make_embedding("adaptive", 1000, 8, num_frequent=100, num_buckets=7, order="counts")
    wanted = made(torch.arange(1000))
    made.type(torch.float64)
    assert {name: held.dtype for name, held in made.kernel.index.arrays.held.items()} == {
        "words": torch.int64,
        "ranks": torch.int32,
    }
    assert torch.equal(made(torch.arange(1000)), wanted.double())
