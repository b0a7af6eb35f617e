"""Pruning of merged tables under a budget: by whole columns of blocks, or by single elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from recsys_embed.core.footprint import format_bytes
from recsys_embed.core.id_sets import IdSet, set_text
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.errors import BudgetError
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.registry import get_method
from recsys_embed.search.extract import chunks
from recsys_embed.search.largest_elements import LargestElements

Chosen = dict[str, tuple[MethodConfig, dict[str, str]]]


def most_within(top: int, fits: Callable[[int], bool], limit: int) -> int:
    """``top`` where that fits, else a number that fits and whose successor does not.

    That is the largest of all where what takes more numbers takes more room. Sets of ids need not: a column that is
    kept whole has none, so some larger number may fit too.

    Raises:
        BudgetError: not even 0 does.
    """
    if fits(top):
        return top
    if not fits(0):
        raise _too_little(limit)
    low, high = 0, top - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _too_little(limit: int) -> BudgetError:
    return BudgetError(
        f"even with nothing kept, the features take more than the {format_bytes(limit)} available for the vectors. "
        "Ways out: 1. a larger budget; 2. structure 'blocks', if it is 'elements'; 3. fewer features"
    )


@dataclass(frozen=True)
class FieldBlocks:
    """Blocks of one feature.

    Args:
        spec: the feature.
        sizes: ids of each block, most frequent first; none is 0.
        members: ids of each block.
        order: ids by falling count, or None where their numbers are that.
        importance: float64 ``[blocks, D]`` of each block's columns.
    """

    spec: FeatureSpec
    sizes: list[int]
    members: list[Tensor]
    order: Tensor | None
    importance: Tensor

    def config(self, columns: Tensor, pruned: str) -> MethodConfig:
        """The configuration that keeps ``columns``, bool ``[blocks, D]``."""
        if bool(columns.all()):
            return get_method("full").config_cls.from_params({})
        bits: list[int] = []
        sizes: list[int] = []
        for row, size in zip(columns.tolist(), self.sizes, strict=True):
            number = sum(1 << k for k, kept in enumerate(row) if kept)
            # Neighbours that keep the same columns are one block.
            if bits and bits[-1] == number:
                sizes[-1] += size
            else:
                bits.append(number)
                sizes.append(size)
        order = "ids" if self.order is None else "counts"
        options = {"columns": tuple(bits), "blocks": tuple(sizes[:-1]) or None, "pruned": pruned, "order": order}
        return get_method("dnis").config_cls.from_params(options)

    def choose(self, columns: Tensor, pruned: str) -> tuple[MethodConfig, dict[str, str]]:
        """That configuration and its sets of ids."""
        config, sets = self.config(columns, pruned), {}
        if self.order is not None:
            for index in cast("tuple[IdSet, ...]", config.program(self.spec).indexes):
                ids = self.order[index.start : index.start + index.count]
                sets[index.name] = set_text(ids, self.spec.num_ids)
        return config, sets


def importance_of(table: Tensor, members: Sequence[Tensor]) -> Tensor:
    """Mean absolute value of every column of some sets of rows: float64 ``[sets, D]``."""
    out = []
    for ids in members:
        total = torch.zeros(table.shape[1], dtype=torch.float64)
        for _, part in chunks(ids):
            total += table[part.to(table.device)].abs().double().sum(0).cpu()
        out.append(total / max(1, len(ids)))
    return torch.stack(out)


def keep_columns(fields: Sequence[FieldBlocks], pruned: str, *, budget: int | None, sparsity: float) -> Chosen:
    """The most important columns of blocks, as many as the budget (or the share of elements) allows.

    Raises:
        BudgetError: not even none of them fit the budget.
    """
    weights = torch.cat([f.importance.reshape(-1) for f in fields])
    sizes = torch.cat([torch.tensor(f.sizes).unsqueeze(1).expand_as(f.importance).reshape(-1) for f in fields])
    order = weights.argsort(descending=True, stable=True)
    elements = sizes[order].cumsum(0)
    if budget is None:
        count = int((elements <= (1 - sparsity) * int(sizes.sum())).sum())
    else:
        # No more fit, since elements alone take that much. What the sets of ids take on top need not rise with every
        # column, so the largest count that fits is found by stepping down to it.
        count = int((4 * elements <= budget).sum())
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[:count]] = True
    cells = [f.importance.numel() for f in fields]
    # Views, so that they follow `kept`.
    columns = [k.view_as(f.importance) for f, k in zip(fields, kept.split(cells), strict=True)]
    if budget is not None:
        owner = torch.arange(len(fields)).repeat_interleave(torch.tensor(cells))[order].tolist()
        spent = [f.config(k, pruned).footprint(f.spec).serve for f, k in zip(fields, columns, strict=True)]
        while sum(spent) > budget:
            if not count:
                raise _too_little(budget)
            count -= 1
            kept[order[count]] = False
            field = owner[count]
            spent[field] = fields[field].config(columns[field], pruned).footprint(fields[field].spec).serve
    return {f.spec.name: f.choose(k, pruned) for f, k in zip(fields, columns, strict=True)}


def choose_elements(spec: FeatureSpec, kept: Tensor, pruned: str) -> tuple[MethodConfig, dict[str, str]]:
    """The configuration that keeps single elements, bool ``[num_ids, D]``, and its sets of ids."""
    counts = kept.sum(0).tolist()
    if min(counts) == spec.num_ids:
        return get_method("full").config_cls.from_params({}), {}
    config = get_method("pep").config_cls.from_params({"num_kept": tuple(counts), "pruned": pruned, "order": "sets"})
    indexes = {i.name: int(i.name.rpartition("_")[2]) for i in config.program(spec).indexes}
    sets = {name: set_text(kept[:, k].nonzero().squeeze(1), spec.num_ids) for name, k in indexes.items()}
    return config, sets


def keep_elements(
    schema: Schema, tables: Sequence[Tensor], pruned: str, *, budget: int | None, sparsity: float
) -> list[Tensor]:
    """The largest elements of all tables together: bool ``[num_ids, D]`` per table.

    With a ``sparsity`` the number kept is the nearest integer to its share, whatever ties there are.
    """
    ranking, cls = LargestElements(tables), get_method("pep").config_cls
    if budget is None:
        return ranking.mask(round((1 - sparsity) * ranking.total))

    def bytes_of(count: int) -> int:
        found = ranking.columns(count).tolist()
        configs = [cls.from_params({"num_kept": tuple(row), "pruned": pruned, "order": "sets"}) for row in found]
        return sum(c.footprint(s).serve for c, s in zip(configs, schema, strict=True))

    return ranking.mask(most_within(ranking.total, lambda n: bytes_of(n) <= budget, budget))
