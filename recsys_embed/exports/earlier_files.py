"""Exports of earlier versions, in which some tables that a collection now holds were in separate modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from recsys_embed.errors import CheckpointError
from recsys_embed.exports.manifest import StorageItem
from recsys_embed.exports.served_modules import ModuleItem, refusals
from recsys_embed.features import Schema
from recsys_embed.kernels.storage import stack_tables
from recsys_embed.plan import Plan, table_key


def with_tables_of_modules(storages: Sequence[StorageItem], modules: Sequence[ModuleItem]) -> tuple[StorageItem, ...]:
    """The storages as collections of today read them.

    Raises:
        CheckpointError: tables that belong together are not all there, or stored in different ways; or a schema
            or plan that is none.
    """
    found = list(storages)
    for item in modules:
        if item.kind == "collection":
            with refusals(f"the collection at {item.paths[0]!r}"):
                for merged, parts in _merged(found, item):
                    found = [s for s in found if s not in parts] + [merged]
    return tuple(found)


def _merged(storages: Sequence[StorageItem], item: ModuleItem) -> Iterator[tuple[StorageItem, list[StorageItem]]]:
    """Storages of a collection that are in parts, and the parts."""
    schema, plan = Schema.from_dict(item.build["schema"]), Plan.from_dict(item.build["plan"])
    path = f"{item.paths[0]}." if item.paths[0] else ""
    by_target = {target: s for s in storages for target in s.targets}
    apart: dict[str, StorageItem] = {}
    for name, program in plan.gathered(schema).items():
        for table in program.tables:
            own = by_target.get((f"{path}bundle.own.feature_{name}", table.name))
            if own is not None:
                apart[table_key(schema[name], table)] = own
    _, places = stack_tables(plan.tables(schema)) if apart else ({}, {})
    for storage in dict.fromkeys(places[key].storage for key in apart):
        rest = by_target.get((item.paths[0], storage))
        left = [] if rest is None else list(rest.tables)
        keys = sorted((k for k, p in places.items() if p.storage == storage), key=lambda k: places[k].offset)
        others = len([k for k in keys if k not in apart])
        tables = [t for k in keys for t in (apart[k].tables if k in apart else [left.pop(0)] if left else [])]
        kinds = {(t.width, t.dtype, t.part.layout.kind) for t in tables}
        if left or len(tables) != len(keys) or len(kinds) > 1:
            raise CheckpointError(
                f"{storage!r} at {item.paths[0]!r} was stored in {len(keys) - others} modules and {others} tables "
                "beside them that do not fit together; export the model again"
            )
        parts = [apart[k] for k in keys if k in apart] + ([] if rest is None else [rest])
        yield StorageItem(tuple(tables), tuple((p, storage) for p in item.paths)), parts
