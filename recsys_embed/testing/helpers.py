"""What checks are written with: modules to try, memory that shows who reads what nobody wrote, expected errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.features import FeatureSpec
from recsys_embed.registry import MethodInfo
from recsys_embed.utils.types import Option

ROWS, WIDTH = 403, 8
IDS = torch.tensor([[0, 402, 7], [7, 31, 400]])


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, ``torch.empty`` returns NaN, so that reading memory nobody wrote shows."""
    flags: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), flags.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    flags.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        flags.fill_uninitialized_memory = before[1]


@contextmanager
def refused(error: type[Exception], *words: str) -> Iterator[None]:
    """Inside, ``error`` must be raised with all ``words`` in its text."""
    try:
        yield
    except error as e:
        text = str(e)
    else:
        raise AssertionError(f"expected {error.__name__} naming {', '.join(words)}; nothing was raised")
    absent = [w for w in words if w not in text]
    if absent:
        raise AssertionError(f"the error must name {', '.join(absent)}; got {text}")


def example(method: MethodInfo, rows: int = ROWS, width: int = WIDTH, **options: Option) -> CompressedEmbedding:
    """A module of the method at half the bytes of a full table, or as near as the method allows.

    Its seed is 0 unless ``options`` give another; with ``seed=None`` torch's generator draws.
    """
    options = {"seed": 0, **options}
    if options["seed"] is None:
        del options["seed"]
    spec = FeatureSpec("embedding", rows, width, unseen=options.get("unseen"))
    itemsize = (options.get("dtype") or torch.get_default_dtype()).itemsize
    whole = rows * width * itemsize
    need = method.config_cls.sized(spec, 1).footprint(spec, itemsize).serve
    with poisoned_memory():
        return method.embedding_cls(rows, width, budget=max(whole // 2, need), **options)


def example_ids(module: CompressedEmbedding) -> Tensor:
    """Ids that suit the module."""
    return IDS % module.num_embeddings
