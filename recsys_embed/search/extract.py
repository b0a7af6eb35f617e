"""Turn the result of a search into a plan, and copy the rows and columns that the plan keeps from full tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.core import hashing
from recsys_embed.core.id_sets import set_text
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import RowLookup
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.plan import Plan, table_key
from recsys_embed.registry import get_method
from recsys_embed.utils.deprecated import earlier_names

_CHUNK = 1 << 18


def chunks(table: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First row and rows of parts of a table of bounded size."""
    for start in range(0, len(table), _CHUNK):
        yield start, table[start : start + _CHUNK]


def choose(spec: FeatureSpec, kept: Tensor, width: int, pruned: str = "zero") -> tuple[MethodConfig, dict[str, str]]:
    """The configuration of a feature that keeps some rows at one width, and its sets of ids.

    Args:
        spec: the feature.
        kept: bool ``[num_ids]``.
        width: columns kept.
        pruned: what other ids give, see ``OptembedConfig``.

    >>> spec = FeatureSpec("C1", 100, 8)
    >>> choose(spec, torch.arange(100) < 30, 4)[0].order, choose(spec, torch.arange(100) % 2 == 0, 4)[0].order
    ('ids', 'counts')
    """
    count = int(kept.sum())
    if count == spec.num_ids and width == spec.embedding_dim:
        return get_method("full").config_cls.from_params({}), {}
    # The first ids need no set: their number says which they are.
    front = count in (0, spec.num_ids) or bool(kept[:count].all())
    options = {"num_kept": count, "dim": width, "pruned": pruned, "order": "ids" if front else "counts"}
    sets = {} if front else {"kept": set_text(kept.nonzero().squeeze(1), spec.num_ids)}
    return get_method("optembed").config_cls.from_params(options), sets


def make_plan(
    schema: Schema, chosen: Mapping[str, tuple[MethodConfig, dict[str, str]]], reasons: Mapping[str, str] | None = None
) -> Plan:
    """A plan of configurations with their sets, by the first feature of each table."""
    sets = {name: texts for name, (_, texts) in chosen.items() if texts}
    plan = Plan({name: config for name, (config, _) in chosen.items()}, reasons or {}, sets=sets).for_readers(schema)
    plan.check(schema)
    return plan


def initial_table(spec: FeatureSpec, seed: int) -> Tensor:
    """The full table that a collection of ``seed`` starts from: ``[num_ids, embedding_dim]``."""
    table = get_method("full").config_cls.from_params({}).program(spec).tables[0]
    return table.init.fill_(torch.empty(table.rows, table.width), hashing.salt(seed, "init", table_key(spec, table)))


def _ids_of(collection: EmbeddingCollection, spec: FeatureSpec, row_lookup: RowLookup) -> Tensor | None:
    """Ids whose rows a row lookup reads, in the order of the rows; None for rows that many ids share."""
    store, programs = collection.bundle.kernel.index, list(collection.bundle.programs)
    owners: Tensor | None = store.owners(programs.index(spec.name), row_lookup.transform, spec.num_ids)
    return None if owners is None else owners.cpu()


@torch.no_grad()
def take_rows(collection: EmbeddingCollection, name: str, dense: Tensor, shared: Tensor | None = None) -> None:
    """Copy the kept rows and columns of a full table ``dense [num_ids, width]`` into a feature's compact tables.

    Rows that many ids share get those columns of ``shared [width]``; without it they keep their values.
    """
    spec, program = collection.schema[name], collection.bundle.programs[name]
    for row_lookup in program.row_lookups:
        ids, table = _ids_of(collection, spec, row_lookup), program.table(row_lookup.table)
        values, own = collection.table(table_key(spec, table)), 0 if ids is None else len(ids)
        columns = slice(row_lookup.column, row_lookup.column + table.width)
        if ids is not None:
            for start, part in chunks(values[:own]):
                part.copy_(dense[ids[start : start + len(part)].to(dense.device)][:, columns])
        if shared is not None:
            values[own:] = shared[columns]


def full_bytes(schema: Schema) -> int:
    """Bytes of full tables of all features, each table once."""
    return sum(4 * s.num_ids * s.embedding_dim for s in schema.first_readers)


def widths_text(schema: Schema, kept: Sequence[Tensor], widths: Sequence[int]) -> dict[str, str]:
    """Per feature, in words, what a search kept."""
    return {
        s.name: f"kept {int(k.sum()):,} of {s.num_ids:,} rows, {w} of {s.embedding_dim} columns"
        for s, k, w in zip(schema, kept, widths, strict=True)
    }


__getattr__ = earlier_names(__name__, {"plain_bytes": "search.extract.full_bytes"})
