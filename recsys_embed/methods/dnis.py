"""dnis: blocks of ids by frequency, each with its own subset of columns (DNIS and AutoSrh)."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal, Self

from recsys_embed.core.id_sets import IdSet
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.program import (
    Initializer,
    LookupProgram,
    MixedRadixDigit,
    RankInSet,
    RowLookup,
    Table,
    Transform,
)
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.features import FeatureSpec
from recsys_embed.method_parts.pruned_columns import ColumnBuilder, column_runs
from recsys_embed.method_parts.width_rule import block_faults


@dataclass(frozen=True, kw_only=True)
class DnisConfig(MethodConfig):
    """A feature pruned by DNIS (Cheng, Shen, Huang, arXiv 2006.04466): each block of ids keeps some of the columns.

    ``blocks`` holds the ids of every block but the last, most frequent first, see ``mixeddim``; ``columns`` one number
    per block, whose bit k says that column k is kept. The search (``recsys-embed search dnis``) finds both; any set of
    columns is possible, and blocks that share columns share tables. ``order="ids"`` takes ids to be numbered by falling
    frequency, which costs nothing; with ``"counts"`` the sets of ids are stored, and counted.

    Columns that a block lacks are zeros (``pruned="zero"``), or of one vector that all ids of the feature add
    (``"oov"``), which starts at zero.

    >>> spec = FeatureSpec("C1", 1000, 16)
    >>> DnisConfig(blocks=(100,), columns=(0xFFFF, 0b11), pruned="zero").footprint(spec).serve
    13600
    """

    method: ClassVar[str] = "dnis"
    order_option: ClassVar[str | None] = "order"
    plannable: ClassVar[bool] = False

    columns: tuple[int, ...] = param(MISSING, "columns of each block, as the bits of a number")
    blocks: tuple[int, ...] | None = param(None, "ids of each block but the last, most frequent first")
    pruned: Literal["zero", "oov"] = param("oov", "columns a block lacks: 'zero', or of a vector all ids add ('oov')")
    order: Literal["ids", "counts"] = param("ids", "'ids' fall in frequency, or `assign_(counts)` orders them")

    def check(self, spec: FeatureSpec) -> list[str]:
        faults = super().check(spec) + block_faults(spec, self.blocks or ())
        count = len(self.blocks or ()) + 1
        if len(self.columns) != count or not all(0 <= c < 1 << spec.embedding_dim for c in self.columns):
            faults.append(
                f"`columns` must be {count} numbers below 2^{spec.embedding_dim}, one per block; "
                f"got {self.columns!r:.80}"
            )
        return faults

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        out = ColumnBuilder(spec.embedding_dim)
        patterns = [tuple(bool(c >> k & 1) for c in self.columns) for k in range(spec.embedding_dim)]
        found = list(column_runs(patterns))
        if self.pruned == "zero" and len(found) > 1 and not any(found[-1][0]):
            found.pop()
        for alive, column, count in found:
            if self.pruned == "oov" and not all(alive):
                out.share(column, count)
            elif not any(alive):
                out.skip(column, count)
            for has, first, number in column_runs(alive):
                if has:
                    self._add(out, spec, (first, first + number), column, count)
        return out.program()

    def _add(self, out: ColumnBuilder, spec: FeatureSpec, blocks: tuple[int, int], column: int, count: int) -> None:
        """The table of some neighbouring blocks in some neighbouring columns."""
        edges = [0, *self._edges, spec.num_ids]
        start, stop = edges[blocks[0]], edges[blocks[1]]
        name = f"rows_{start}_{column}"
        rows: Transform = MixedRadixDigit()
        if stop - start < spec.num_ids:
            form = IdSet if self.order == "ids" else IdSet.smallest
            rows = RankInSet(form(f"ids_{start}_{stop}", spec.num_ids, start, stop - start))
        out.add(Table(name, stop - start, count, Initializer.plain(spec)), RowLookup(name, rows, column=column))

    @property
    def _edges(self) -> list[int]:
        """First rank of each block but the first."""
        edges: list[int] = []
        for count in self.blocks or ():
            edges.append(count + (edges[-1] if edges else 0))
        return edges

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        """A first block of ``size`` ids with all columns, and none for the others."""
        full = (1 << spec.embedding_dim) - 1
        if size >= spec.num_ids:
            return cls.from_params({**params, "columns": (full,)})
        return cls.from_params({**params, "columns": (full, 0), "blocks": (size,)})


class DnisEmbedding(CompressedEmbedding):
    """Drop-in over blocks of ids, each with its own columns.

    >>> import torch
    >>> emb = DnisEmbedding(1000, 4, blocks=(10,), columns=(0b1111, 0b0101), pruned="zero", init="normal:1")
    >>> emb(torch.tensor([3, 500])).count_nonzero(1)
    tensor([4, 2])
    """

    config_cls = DnisConfig
