"""The report of a compression, done or planned: one line per table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from recsys_embed.core.footprint import format_bytes
from recsys_embed.discover import TableKind
from recsys_embed.utils.types import JSON

Action = Literal["replaced", "kept", "skipped"]
REPORT_VERSION = 1


@dataclass(frozen=True)
class CompressedTable:
    """One table of the model.

    Args:
        name: as in the plan.
        paths: every dotted path at which it stands.
        kind: of the module that was there, see :class:`recsys_embed.discover.FoundTable`.
        action: ``"replaced"``; ``"kept"`` as a full table, by the plan; or ``"skipped"``, see ``note``.
        method: that stores it afterwards.
        bytes_before: of the table, once served.
        bytes_after: that this table alone stores once served; tables shared with others count in ``SharedTable``.
        shared: names of those.
        relative_error: Frobenius norm of the difference to the trained table over the table's own, ids weighted by
            ``counts`` where given; None where nothing was fitted.
        note: anything else worth knowing.
        bytes_held: that this table alone holds while it trains, before an export rounds its rows; None: the same.
    """

    name: str
    paths: tuple[str, ...]
    kind: TableKind
    rows: int
    width: int
    action: Action
    method: str
    bytes_before: int
    bytes_after: int
    shared: tuple[str, ...] = ()
    relative_error: float | None = None
    note: str = ""
    bytes_held: int | None = None


@dataclass(frozen=True)
class SharedTable:
    """A physical table that several tables of the model read, counted once; ``bytes`` are those of serving it."""

    name: str
    rows: int
    width: int
    bytes: int
    readers: tuple[str, ...]
    bytes_held: int | None = None


@dataclass(frozen=True)
class CompressReport:
    """Every embedding table of a model before and after; ``print`` shows it as a table.

    >>> table = CompressedTable("user", ("user",), "embedding", 1000, 16, "replaced", "hash", 64000, 6400)
    >>> report = CompressReport((table,))
    >>> report.bytes_before, report.bytes_after, report.ratio
    (64000, 6400, 10.0)
    """

    tables: tuple[CompressedTable, ...]
    shared: tuple[SharedTable, ...] = ()
    dry_run: bool = False
    notes: tuple[str, ...] = ()

    @property
    def bytes_before(self) -> int:
        """Bytes of all tables of the model as they were, those left alone included."""
        return sum(t.bytes_before for t in self.tables)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tables of the model now, once they are served."""
        return sum(t.bytes_after for t in self.tables) + sum(s.bytes for s in self.shared)

    @property
    def bytes_held(self) -> int:
        """Bytes that the model holds for all tables now: rows that an export rounds are float32 until then."""
        own = sum(t.bytes_after if t.bytes_held is None else t.bytes_held for t in self.tables)
        return own + sum(s.bytes if s.bytes_held is None else s.bytes_held for s in self.shared)

    @property
    def ratio(self) -> float:
        """Bytes before over bytes after."""
        return self.bytes_before / self.bytes_after if self.bytes_after else 1.0

    @property
    def replaced(self) -> tuple[CompressedTable, ...]:
        """The tables that changed."""
        return tuple(t for t in self.tables if t.action == "replaced")

    def __getitem__(self, name: str) -> CompressedTable:
        """The line of a table, by its name or a dotted path of it."""
        return next(t for t in self.tables if name == t.name or name in t.paths)

    def to_dict(self) -> JSON:
        """JSON-ready."""
        return {
            "version": REPORT_VERSION,
            "dry_run": self.dry_run,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bytes_held": self.bytes_held,
            "tables": [asdict(t) for t in self.tables],
            "shared": [asdict(s) for s in self.shared],
            **({"notes": list(self.notes)} if self.notes else {}),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        head = ("table", "kind", "rows x width", "method", "before", "after", "ratio", "error")
        rows: list[Sequence[str]] = []
        for t in self.tables:
            ratio = f"{t.bytes_before / t.bytes_after:.1f}" if t.bytes_after and t.action == "replaced" else "-"
            method = t.method if t.action != "skipped" else "(skipped)"
            after = format_bytes(t.bytes_after) if not t.shared else f"{format_bytes(t.bytes_after)} +"
            error = "-" if t.relative_error is None else f"{t.relative_error:.3f}"
            shape = f"{t.rows:,} x {t.width}"
            rows.append((t.name, t.kind, shape, method, format_bytes(t.bytes_before), after, ratio, error))
        for s in self.shared:
            used = f"shared by {len(s.readers)}"
            rows.append((s.name, used, f"{s.rows:,} x {s.width}", "", "", format_bytes(s.bytes), "", ""))
        total = f"{self.ratio:.1f}"
        rows.append(("total", "", "", "", format_bytes(self.bytes_before), format_bytes(self.bytes_after), total, ""))
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(w) if i in (0, 1, 3) else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in [head, *rows]
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines += [f"{'+' if t.shared else ' '} {t.name}: {t.note}" for t in self.tables if t.note]
        if self.bytes_held != self.bytes_after:
            lines.append(
                f"after: as exported; the model itself holds {format_bytes(self.bytes_held)} of weights as they train"
            )
        lines += self.notes
        if self.dry_run:
            lines.append("dry run: the model is as it was")
        return "\n".join(line.rstrip() for line in lines)
