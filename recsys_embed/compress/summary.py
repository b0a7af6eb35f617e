"""Builds the report of a compression from the tables found and their replacements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from recsys_embed.compress.build import TableReplacement
from recsys_embed.compress.report import CompressedTable, CompressReport, SharedTable
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import Table
from recsys_embed.discover import FoundTable
from recsys_embed.embedding import CompressedEmbedding


def compression_report(
    tables: Sequence[FoundTable],
    replacements: Sequence[TableReplacement],
    configs: Mapping[str, MethodConfig],
    dry_run: bool,
) -> CompressReport:
    """One line per table of the model, whether it was replaced or not."""
    by_name = {replacement.table.name: replacement for replacement in replacements}
    lines: list[CompressedTable] = []
    shared: dict[str, tuple[Table, int]] = {}
    readers: dict[str, list[str]] = {}
    counted: set[int] = set()
    for table in tables:
        replacement = by_name.get(table.name)
        before, held = _bytes(table, counted)
        common: dict[str, Any] = {
            "name": table.name, "paths": table.paths, "kind": table.kind, "rows": table.rows, "width": table.width,
            "bytes_before": before,
        }  # fmt: skip
        if replacement is None:
            kept = table.name in configs
            left = "its output layer's weight is also " + ", ".join(table.tied) if table.tied else "left out"
            why = "" if kept else table.obstacle or left
            action: Any = "kept" if kept else "skipped"
            lines.append(
                CompressedTable(
                    action=action, method=_method(table), bytes_after=before, note=why, bytes_held=held, **common
                )
            )
            continue
        for t in replacement.shared():
            shared[t.name] = (t, table.dtype.itemsize)
            readers.setdefault(t.name, []).append(table.name)
        names = tuple(t.name for t in replacement.shared())
        done: dict[str, Any] = {"shared": names, "relative_error": replacement.error, "note": _note(replacement)}
        lines.append(
            CompressedTable(
                action="replaced",
                method=replacement.config.method,
                bytes_after=replacement.own_bytes(),
                bytes_held=replacement.held_bytes(),
                **done,
                **common,
            )
        )
    joint = [
        SharedTable(t.name, t.rows, t.width, t.nbytes(size), tuple(readers[t.name]), t.trained_bytes(size))
        for t, size in shared.values()
    ]
    return CompressReport(tuple(lines), tuple(joint), dry_run)


def _method(table: FoundTable) -> str:
    """The method of a table that is not replaced."""
    module: Any = table.module
    if table.kind == "compressed":
        return str(module.config.method)
    return str(module.plan[table.table].method) if table.kind == "collection" else "full"


def _bytes(table: FoundTable, counted: set[int]) -> tuple[int, int]:
    """Bytes of a table as found, once served and as held; shared tensors count for the first table that holds them."""
    if table.weight is not None:
        size = table.rows * table.width * table.dtype.itemsize
        return size, size
    module: Any = table.module
    if table.kind == "collection":
        parts = module.plan[table.table].footprint(module.schema[table.table], table.dtype.itemsize)
        return int(parts.serve), int(parts.serve + parts.unrounded)
    sizes: dict[int, tuple[int, int]] = {}
    for reader in table.modules:
        m: Any = reader
        # A loaded export reads the tensors of the file, as they are.
        served = getattr(m, "served", None)
        described = {} if m.from_file else {m.parameter_name(t.name): t for t in m.program.tables}
        for name, p in m.named_parameters():
            stored = described[name].nbytes(p.element_size()) if name in described else p.nbytes
            sizes[id(p)] = stored, p.nbytes
        sizes |= {id(s.data): (s.data.nbytes,) * 2 for s in ([] if served is None else served.children())}
    fresh = {key: size for key, size in sizes.items() if key not in counted}
    counted.update(fresh)
    index = int(module.footprint().index)
    return sum(s for s, _ in fresh.values()) + index, sum(h for _, h in fresh.values()) + index


def _note(replacement: TableReplacement) -> str:
    notes = []
    module: nn.Module = replacement.modules[0]
    padding, weight = getattr(module, "padding_idx", None), replacement.table.weight
    pads = not replacement.plain and padding is not None and replacement.table.pooling is None
    if pads and weight is not None and not weight.is_meta and bool(weight.detach()[padding].any()):
        notes.append("its padding row held values; the padding id gives zeros now")
    if replacement.plain and isinstance(module, CompressedEmbedding) and module.spec.unseen not in (None, "raise"):
        notes.append(f"unseen ids raise now, as in torch ({module.spec.unseen!r} before)")
    paddings = {getattr(m, "padding_idx", None) for m in replacement.modules if getattr(m, "mode", None) is None}
    if replacement.plain and isinstance(module, CompressedEmbedding) and len(paddings) > 1:
        notes.append("its modules pad with different ids; their one table holds what the others read there")
    by_id = getattr(replacement.config, "order", None) == "ids"
    apart = by_id or (replacement.trial is not None and bool(replacement.trial.program.indexes))
    if apart and replacement.counts is None and not replacement.index_contents:
        notes.append("ids are assumed to be numbered by falling frequency; give `counts` if they are not")
    elif by_id and replacement.counts is not None and not _falling(replacement.counts):
        notes.append(
            "the plan assumes ids numbered by falling frequency, but `counts` are not in that order: use order='counts'"
        )
    return "; ".join(notes)


def _falling(counts: Tensor) -> bool:
    """Whether the first tenth of the ids has at least 90 % of the lookups of the most frequent tenth."""
    head = max(1, len(counts) // 10)
    return bool(counts[:head].sum() >= 0.9 * counts.topk(head).values.sum())
