"""Report of an export: bytes and errors, per table and in total."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from recsys_embed.core.footprint import format_bytes
from recsys_embed.utils.types import JSON


@dataclass(frozen=True)
class TableOutcome:
    """One table (or, of form ``"whole"``, a parameter that lookups read as a whole) in an exported file.

    Args:
        name: of its tensor.
        rows, width: of the table that lookups see.
        kind: precision of the stored values: fp32, fp16, bf16, fp8, int8, int4, int2.
        form: how kept rows are known: ``"all"``, ``"range"``, ``"bitmap"``, ``"sorted"``; or ``"whole"``.
        kept_rows, kept_columns: what is not zero and stands in the file.
        bytes: of the stored values, scales and biases included.
        index_bytes: of the arrays that know the kept rows.
        source_bytes: what the table took before.
        max_error, rms_error: largest and root-mean-square difference of an element from the source.
        rms: root mean square of the elements.
    """

    name: str
    rows: int
    width: int
    kind: str
    form: str
    kept_rows: int
    kept_columns: int
    bytes: int
    index_bytes: int
    source_bytes: int
    max_error: float
    rms_error: float
    rms: float


@dataclass(frozen=True)
class Metric:
    """A measure of the model before and after export, e.g. AUC on a test split."""

    name: str
    before: float
    after: float

    @property
    def change(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class ExportReport:
    """Result of :func:`recsys_embed.export`.

    Args:
        path: the file.
        precision: as asked for.
        needs_skeleton: whether ``load`` needs the model to fill (``into=``), as for models the library does not know.
        bytes: of the file.
        embedding_bytes: of tables, their index arrays and the embeddings' other parameters in it.
        source_bytes: what these took before, without optimizer state.
        dense_bytes: of everything else of the model.
        header_bytes: of manifest and tensor list.
        tables: every table and other parameter of the embeddings.
        metric: what was measured, if anything.
        notes: tables that were kept as they are, and why.
        encoder_bytes: of the vocabularies of raw rows' encoders; 0 where the file has none.
    """

    path: Path
    precision: str
    needs_skeleton: bool
    bytes: int
    embedding_bytes: int
    source_bytes: int
    dense_bytes: int
    header_bytes: int
    tables: tuple[TableOutcome, ...]
    metric: Metric | None = None
    notes: tuple[str, ...] = ()
    encoder_bytes: int = 0

    @property
    def max_error(self) -> float:
        """Largest difference of any element of the embeddings from the source."""
        return max((t.max_error for t in self.tables), default=0.0)

    def to_dict(self) -> JSON:
        """JSON values."""
        values = asdict(self)
        values["path"], values["tables"], values["notes"] = (
            str(self.path),
            [asdict(t) for t in self.tables],
            [*self.notes],
        )
        return {**values, "max_error": self.max_error}

    def __str__(self) -> str:
        at = "the precisions of the plan" if self.precision == "planned" else self.precision
        ratio = self.source_bytes / self.embedding_bytes if self.embedding_bytes else 1.0
        lines = [
            f"{self.path}: {format_bytes(self.bytes)} at {at}; embeddings "
            f"{format_bytes(self.source_bytes)} -> {format_bytes(self.embedding_bytes)} ({ratio:.2f}x), other layers "
            f"{format_bytes(self.dense_bytes)}, header {format_bytes(self.header_bytes)}"
            + (f", vocabularies of raw rows {format_bytes(self.encoder_bytes)}" if self.encoder_bytes else "")
        ]
        rows = [("table", "rows kept", "width", "kind", "bytes", "index", "max error", "rms error")]
        for t in sorted(self.tables, key=lambda t: -t.bytes - t.index_bytes)[:12]:
            relative = f"{t.rms_error / t.rms:.2%}" if t.rms else "0.00%"
            kept = f"{t.kept_rows:,}" if t.kept_rows == t.rows else f"{t.kept_rows:,} of {t.rows:,}"
            width = str(t.width) if t.kept_columns == t.width else f"{t.kept_columns} of {t.width}"
            sizes = (format_bytes(t.bytes), format_bytes(t.index_bytes) if t.index_bytes else "-")
            rows.append((t.name, kept, width, t.kind, *sizes, f"{t.max_error:.2g}", relative))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("  ".join(cells).rstrip())
        if len(self.tables) > 12:
            lines.append(f"... and {len(self.tables) - 12} smaller ones")
        if self.metric is not None:
            m = self.metric
            lines.append(f"{m.name}: {m.before:.6f} before, {m.after:.6f} after ({m.change:+.6f})")
        lines += [f"note: {note}" for note in self.notes]
        if self.needs_skeleton:
            lines.append("load it into a freshly built model: recsys_embed.load(path, into=model)")
        return "\n".join(lines)
