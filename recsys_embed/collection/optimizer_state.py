"""The saved state of a fused optimizer: checks of what is loaded, and its place in a module's state dict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from recsys_embed.errors import CheckpointError, raise_faults
from recsys_embed.optim import FusedOptimizer, is_rate
from recsys_embed.utils.types import JSON

STEPS = "steps"
"""Ends the key of a storage's number of steps in a state dict."""
LR = "lr"
"""Ends the key of a storage's learning rate in a state dict, where the user has set it."""
ELSEWHERE = -1
"""Number of steps of tables whose state is saved in another dict."""
_weights_alone: ContextVar[bool] = ContextVar("weights_alone", default=False)


@contextmanager
def weights_alone() -> Iterator[None]:
    """State dicts taken and loaded here hold no optimizer state: for weights that are served, or kept as the best.

    >>> from recsys_embed import EmbeddingCollection, FeatureSpec, RowwiseAdagrad, Schema
    >>> coll = EmbeddingCollection(Schema([FeatureSpec("C1", 10, 4)]), optimizer=RowwiseAdagrad())
    >>> with weights_alone():
    ...     sorted(coll.state_dict())
    ['_extra_state', 'width4']
    """
    token = _weights_alone.set(True)
    try:
        yield
    finally:
        _weights_alone.reset(token)


def weights_of(model: nn.Module, *, keep_vars: bool = False) -> dict[str, Any]:
    """A model's ``state_dict`` without the state of fused optimizers."""
    with weights_alone():
        return model.state_dict(keep_vars=keep_vars)


def without_state() -> bool:
    """Whether state dicts are to hold weights alone."""
    return _weights_alone.get()


def optimizer_entries(names: Iterable[str]) -> list[str]:
    """Names among those of a collection's state dict, without its prefix, that are of optimizer state."""
    names = list(names)
    starts = tuple(n.removesuffix(STEPS) for n in names if n.endswith(f"_{STEPS}") and "." not in n)
    return [n for n in names if "." not in n and n.startswith(starts) and f"{n}_" not in starts] if starts else []


def forget_state(state_dict: dict[str, object], prefix: str, storages: tuple[str, ...]) -> None:
    """Drop the entries of optimizer state, which tables without a fused optimizer do not have."""
    starts = tuple(f"{prefix}{storage}_" for storage in storages)
    tables = {f"{prefix}{storage}" for storage in storages}
    for key in [k for k in state_dict if k.startswith(starts) and k not in tables and "." not in k[len(prefix) :]]:
        del state_dict[key]


class _StateKey(str):
    """A missing key of optimizer state, which torch's message explains."""

    def __format__(self, spec: str) -> str:
        return f"{self!s:{spec}} (state of the fused optimizer, which strict=False starts anew)"


class SavedState(NamedTuple):
    """Optimizer state of one storage in a state dict.

    Args:
        tensors: by name of the rule's state; none where the state is in a dict of its own.
        steps: that the storage has made; ``ELSEWHERE`` where the state is in a dict of its own.
    """

    tensors: dict[str, Tensor]
    steps: int


def take_state(
    state_dict: dict[str, object],
    prefix: str,
    rule: FusedOptimizer,
    wanted: Mapping[str, Mapping[str, Tensor]],
    version: int | None,
    missing: list[str],
) -> dict[str, SavedState]:
    """Optimizer state in a state dict, whose entries are dropped from it, by storage; of storages where it is whole.

    Args:
        wanted: the tensors of the state, by storage and name.
        version: of the module that wrote it; the first did not save the state.
        missing: gets the keys that are not there, which makes a strict load fail.

    Raises:
        CheckpointError: a state that no table can go on from.
    """
    found: dict[str, SavedState] = {}
    faults: list[str] = []
    for storage, tensors in wanted.items():
        saved = {name: state_dict.get(f"{prefix}{storage}_{name}") for name in tensors}
        whole = {n: t for n, t in saved.items() if isinstance(t, Tensor) and t.shape == tensors[n].shape}
        count = state_dict.get(f"{prefix}{storage}_{STEPS}")
        known = isinstance(count, Tensor) and count.numel() == 1 and not count.is_meta and int(count) >= ELSEWHERE
        steps = int(cast("Tensor", count)) if known else None
        if steps is not None and steps != ELSEWHERE and len(whole) == len(tensors):
            found[storage] = SavedState(whole, steps)
            faults += [f"{prefix}{storage}: {fault}" for fault in rule.state_faults(whole, steps)]
        elif steps == ELSEWHERE:
            found[storage] = SavedState({}, ELSEWHERE)
        elif without_state():
            continue
        elif version is None or version < 2:
            # Earlier versions saved it apart.
            found[storage] = SavedState({}, ELSEWHERE)
        else:
            lacks = [f"{prefix}{storage}_{name}" for name in tensors if name not in whole]
            lacks += [] if known else [f"{prefix}{storage}_{STEPS}"]
            missing += [*lacks[:-1], *map(_StateKey, lacks[-1:])]
    raise_faults(faults, "an optimizer state that no table can go on from", CheckpointError)
    # What another rule saved is nobody's.
    forget_state(state_dict, prefix, tuple(wanted))
    return found


def check_state(
    saved: JSON, name: str, rule: FusedOptimizer | None, have: Mapping[str, Tensor], storages: tuple[str, ...]
) -> None:
    """Check that what ``optimizer_state_dict()`` returned fits some tables.

    Args:
        name: of the rule of the tables, as it is saved.
        rule: of the tables.
        have: the tensors of the state by name.

    Raises:
        CheckpointError: the state is of another rule, or its tensors are missing or of another shape.
    """
    parts = saved if isinstance(saved, Mapping) else {}
    kinds: dict[str, type | tuple[type, ...]] = {"rule": str, "lr": (int, float), "steps": Mapping, "state": Mapping}
    wrong = [k for k, kind in kinds.items() if not isinstance(parts.get(k), kind)]
    if wrong or not is_rate(saved["lr"]) or not all(isinstance(n, int) for n in saved["steps"].values()):
        raise CheckpointError(f"an optimizer state is what optimizer_state_dict() returns; got {saved!r:.80}")
    if saved["rule"] != name:
        raise CheckpointError(f"optimizer state is of {saved['rule']}; this collection uses {name}")
    state = saved["state"]
    wrong = [f"{k} is missing" for k in sorted(have.keys() - state.keys())]
    wrong += [f"{k} belongs to no table" for k in sorted(state.keys() - have.keys())]
    for k in sorted(have.keys() & state.keys()):
        shape = getattr(state[k], "shape", None)
        if shape != have[k].shape:
            wrong.append(f"{k} has shape {None if shape is None else tuple(shape)}, not {tuple(have[k].shape)}")
    if saved["steps"].keys() != set(storages):
        wrong.append(f"it counts steps of {sorted(saved['steps'])}, not of {sorted(storages)}")
    elif rule is not None and not wrong:
        for storage in storages:
            own = {key: state[f"{storage}_{key}"] for key in rule.tensors}
            wrong += [f"{storage}: {fault}" for fault in rule.state_faults(own, saved["steps"][storage])]
    raise_faults(
        wrong,
        "an optimizer state that does not fit the tables; where an earlier version saved it, which kept tables "
        "behind networks or pooled combinations apart, load the weights alone and start the optimizer anew",
        CheckpointError,
    )


def state_entries(state: Mapping[str, Tensor], steps: Mapping[str, Tensor], lr: float | None) -> dict[str, Tensor]:
    """Entries of a state dict; the learning rate is among them where the user has set it."""
    counts = {f"{storage}_{STEPS}": n for storage, n in steps.items()}
    rate = {} if lr is None else {f"{storage}_{LR}": torch.tensor(lr, dtype=torch.float64) for storage in steps}
    return {**state, **counts, **rate}


def saved_lr(state_dict: Mapping[str, object], prefix: str, storages: tuple[str, ...]) -> float | None:
    """The learning rate in a state dict.

    Raises:
        CheckpointError: it is none.
    """
    for value in (state_dict.get(f"{prefix}{storage}_{LR}") for storage in storages):
        if isinstance(value, Tensor) and not value.is_meta:
            if value.numel() != 1 or not is_rate(value.item()):
                raise CheckpointError(f"{prefix}*_{LR} of a state dict must be a finite number >= 0; got {value!r:.80}")
            return float(value)
    return None
