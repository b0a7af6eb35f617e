"""Faults of rows, named by split, part and row before anything is trained on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_embed.errors import ConfigError, DataError, raise_faults

_PIECE = 1 << 20
"""Rows looked at together, so that no mask of a whole split is held."""


def shape_faults(
    batch: Any, num_dense: int, num_features: int, rows: int | None = None, num_lists: int = 0
) -> list[str]:
    """Parts of a batch that are not what a data set promises; shapes and types only, so it costs next to nothing.

    Args:
        batch: what ``read`` returned.
        num_dense: numeric columns of the data set.
        num_features: features of its schema that have one id per row.
        rows: rows that were asked for; None: any number.
        num_lists: features of its schema that have lists.

    >>> from recsys_embed.data import Batch
    >>> shape_faults(Batch(torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2)), 3, 1, rows=2)
    []
    >>> shape_faults(Batch(torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2)), 4, 1)
    ['`dense` must have 4 columns (`num_dense`); got 3', '`ids` must be int32 or int64; got torch.float32']
    """
    names = {"dense": num_dense, "ids": num_features, "label": None}
    if absent := _absent(batch):
        return [absent]
    faults, lengths = [], {}
    for name, columns in names.items():
        part = getattr(batch, name)
        if not isinstance(part, Tensor):
            faults.append(f"`{name}` must be a torch.Tensor; got {type(part).__name__}{_cure(part)}")
            continue
        if part.dim() != (1 if columns is None else 2):
            wanted = "[B]" if columns is None else f"[B, {columns}]"
            faults.append(f"`{name}` must have the shape {wanted}; got {list(part.shape)}")
            continue
        lengths[name] = len(part)
        if columns is not None and part.shape[1] != columns:
            of = "`num_dense`" if name == "dense" else "one per feature of the schema"
            faults.append(f"`{name}` must have {columns} columns ({of}); got {part.shape[1]}")
        if name == "ids" and part.dtype not in (torch.int32, torch.int64):
            faults.append(f"`ids` must be int32 or int64; got {part.dtype}")
        if name == "dense" and part.dtype != torch.float32:
            faults.append(f"`dense` must be float32; got {part.dtype}")
    extra = getattr(batch, "extra", None) or {}
    for name, part in extra.items():
        if isinstance(part, Tensor) and part.dim():
            lengths[name] = len(part)
        else:
            faults.append(f"part {name!r} must be a torch.Tensor [B, ...]; got {type(part).__name__}{_cure(part)}")
    lists = getattr(batch, "lists", None)
    if (0 if lists is None else lists.num_features) != num_lists:
        got = "none" if lists is None else lists.num_features
        faults.append(f"`lists` must hold the ids of {num_lists} features (`num_lists`); got {got}")
    elif lists is not None:
        lengths["lists"] = len(lists)
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {n}" for name, n in lengths.items())
        faults.append(f"all parts must have equally many rows; got {found}")
    elif rows is not None and lengths and (got := next(iter(lengths.values()))) != rows:
        faults.append(f"expected {rows} rows; got {got}. `splits` and what `read` gives must agree")
    return faults


def _absent(batch: Any) -> str:
    lacking = [name for name in ("dense", "ids", "label") if not hasattr(batch, name)]
    if not lacking:
        return ""
    return (
        f"expected a recsys_embed.data.Batch(dense, ids, label); got {type(batch).__name__}, "
        f"which lacks {', '.join(lacking)}"
    )


def need_parts(batch: Any, where: str) -> None:
    """Refuse what is no batch at all, e.g. a tuple.

    Raises:
        ConfigError: says what is expected.
    """
    if absent := _absent(batch):
        raise ConfigError(f"{absent} (batches of {where})")


def no_weight(batch: Any) -> bool:
    """Whether rows have weights, which are all 0."""
    weight = getattr(batch, "extra", {}).get("weight")
    return weight is not None and not weight.any()


def _cure(part: Any) -> str:
    return ": torch.as_tensor makes one of an array" if hasattr(part, "__array__") else ""


def value_faults(
    dense: Tensor,
    label: Tensor,
    first_row: int = 0,
    *,
    shuffled: bool = False,
    real_labels: bool = False,
    needs_labels: bool = True,
) -> list[str]:
    """Labels other than 0 and 1, and numeric values that are NaN or infinite; one reduction each where all is well.

    Args:
        dense: ``[B, num_dense]``.
        label: ``[B]``.
        first_row: number of their first row.
        shuffled: rows have no number that would tell anybody where to look.
        real_labels: labels are any finite numbers.
        needs_labels: rows must have labels; else they may all have none (NaN).

    >>> value_faults(torch.zeros(3, 1), torch.tensor([1.0, 2.0, 1.0]))
    ["labels must be 0 or 1; got 2, first in row 1: map the two values, e.g. label == 2, or train on them ..."]
    """
    found = (
        []
        if not needs_labels and label.isnan().all()
        else label_faults(label, first_row, shuffled=shuffled, real=real_labels)
    )
    if not torch.isfinite(dense.sum()):  # a sum is finite wherever all values are, unless they are huge
        wrong = ~torch.isfinite(dense)
        for column in wrong.any(0).nonzero().flatten().tolist():
            rows = wrong[:, column].nonzero().flatten()
            found.append(
                f"numeric column {column} (counted from 0) is NaN or infinite in {len(rows)} of {len(dense)} rows"
                f"{_first(rows, first_row, shuffled)}: fill what is missing, e.g. with 0 or the column's mean"
            )
    return found


def label_faults(label: Tensor, first_row: int = 0, *, shuffled: bool = True, real: bool = False) -> list[str]:
    """Labels ``[B]`` other than 0 and 1, or that are not finite; see :func:`value_faults`."""
    if torch.isfinite(label).all() if real else torch.equal(label, label.bool().to(label.dtype)):
        return []
    return [_label_fault(label, first_row, shuffled, real)]


def _label_fault(label: Tensor, first_row: int, shuffled: bool, real: bool) -> str:
    nan = label.isnan()
    if nan.all():
        return (
            f"there are no labels (all {len(label)} are NaN); training and metrics need a label"
            f"{'' if real else ' of 0 or 1'} in every row. Convert rows that have one, or give `label` in a data set "
            "of your own"
        )
    if nan.any():
        rows = nan.nonzero().flatten()
        where = _first(rows, first_row, shuffled)
        cure = "" if real else ", or label them 0 or 1"
        return f"{len(rows)} of {len(label)} labels are NaN{where}: leave those rows out{cure}"
    if real:
        rows = (~torch.isfinite(label)).nonzero().flatten()
        return f"{len(rows)} of {len(label)} labels are infinite{_first(rows, first_row, shuffled)}: leave them out"
    rows = ((label != 0) & (label != 1)).nonzero().flatten()
    values = label.unique().tolist()
    others = [f"{v:g}" for v in values if v not in (0, 1)]
    got = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
    cure = f"map the two values, e.g. label == {values[1]:g}" if len(values) == 2 else "map them, e.g. label > 0"
    cure += ", or train on them as they are with loss='squared_error'"
    return f"labels must be 0 or 1; got {got}{_first(rows, first_row, shuffled)}: {cure}"


def _first(rows: Tensor, first_row: int, shuffled: bool) -> str:
    return "" if shuffled else f", first in row {first_row + int(rows[0])}"


def split_faults(dense: Tensor, label: Tensor, *, real_labels: bool = False, needs_labels: bool = True) -> list[str]:
    """Faults of the values of a whole split: those of its first piece that has any."""
    for start in range(0, len(label), _PIECE):
        piece = slice(start, start + _PIECE)
        found = value_faults(dense[piece], label[piece], start, real_labels=real_labels, needs_labels=needs_labels)
        if found:
            return found
    return []


def refuse_values(batch: Any, where: str, *, real_labels: bool = False, needs_labels: bool = True) -> None:
    """Refuse a shuffled batch whose labels or numeric values are the reason for what went wrong.

    Raises:
        DataError: names them and ``where`` they are.
    """
    faults = value_faults(batch.dense, batch.label, shuffled=True, real_labels=real_labels, needs_labels=needs_labels)
    raise_faults(faults, where, DataError)
