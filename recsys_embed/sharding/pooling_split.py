"""Which features TorchRec can pool on the ranks that hold the tables, and which need a row per id."""

from __future__ import annotations

from typing import Literal

from recsys_embed.core.program import LookupProgram
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.kernels.unseen_ids import action
from recsys_embed.plan import Plan, table_key
from recsys_embed.sharding.physical_tables import ROW_ALIGNMENT

Pooling = Literal["tables", "ids"]


def pools_in_tables(spec: FeatureSpec, program: LookupProgram) -> bool:
    """Whether "pool each row lookup, then combine" equals "combine per id, then pool".

    They are equal where vectors are sums of rows. Products, learned weights per id, signs and row lookups of several
    rows need every id's row; so do max pooling, heads that apply per id, and means over bags with absent ids.
    """
    if program.head is not None and program.head.pools == "ids":
        return False
    if spec.pooling == "max" or any(
        p.sign is not None or p.weight or p.num_rows > 1 or p.width for p in program.row_lookups
    ):
        return False
    apart = len(set(program.spans)) == len(program.spans)
    absent = any(p.transform.may_be_absent for p in program.row_lookups)
    return program.combine == "sum" or (apart and not absent)


def split_by_pooling(schema: Schema, plan: Plan, pool: Pooling) -> tuple[list[str], list[str]]:
    """Names of the features whose bags TorchRec pools, and of those that are looked up id by id.

    Features that share a table go the same way, as a table has one place.
    """
    by_id = set()
    owners: dict[str, list[str]] = {}
    programs = plan.gathered(schema)
    for spec in schema:
        if spec.name not in programs:
            by_id.add(spec.name)
            continue
        program = programs[spec.name]
        for table in program.tables:
            owners.setdefault(table_key(spec, table), []).append(spec.name)
        # Rows of one or two numbers are packed into one physical row; only TorchRecRowReader unpacks them.
        short = any(ROW_ALIGNMENT % t.width == 0 and t.width < ROW_ALIGNMENT for t in program.tables if not t.dense)
        zero = action(spec, plan[spec.name].accepts_raw) == "zero" or spec.padding_idx is not None
        if pool == "ids" or zero or short or not pools_in_tables(spec, program):
            by_id.add(spec.name)
    before = -1
    while before != len(by_id):
        before = len(by_id)
        for names in owners.values():
            if not by_id.isdisjoint(names):
                by_id.update(names)
    return [n for n in schema.names if n not in by_id], [n for n in schema.names if n in by_id]
