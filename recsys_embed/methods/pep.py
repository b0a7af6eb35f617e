"""pep: unstructured pruning; every column has its own set of ids that keep an element (PEP)."""

from __future__ import annotations

from collections.abc import Mapping
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


@dataclass(frozen=True, kw_only=True)
class PepConfig(MethodConfig):
    """A feature pruned by PEP (Liu et al., ICLR 2021, arXiv 2101.07577): ``num_kept[k]`` elements of column k.

    The search (``recsys-embed search pep``) finds a set of ids for every column, and the plan that it writes names them
    (``order="sets"``). Then every column is a table of its own, one element wide: 4 bytes per element, and 12 per
    column and 64 ids, or 4 more per element where these are few. (Compressed sparse rows would take 8 bytes per element
    and 4 per id.) A configuration alone keeps the elements of the most frequent ids, known as for ``adaptive``; columns
    that keep as many stand together.

    Pruned elements are zeros (``pruned="zero"``), or of one vector that all ids of the feature add (``"oov"``), which
    starts at zero.

    Pitfall: a lookup reads one element per column, so it is slower than one of whole rows.

    >>> PepConfig(num_kept=(500, 100, 0, 0), pruned="zero", order="sets").footprint(FeatureSpec("C1", 1000, 4)).serve
    2784
    """

    method: ClassVar[str] = "pep"
    order_option: ClassVar[str | None] = "order"
    renamed_options: ClassVar[Mapping[str, str]] = {"kept": "num_kept"}
    plannable: ClassVar[bool] = False

    num_kept: tuple[int, ...] = param(MISSING, "elements of each column")
    pruned: Literal["zero", "oov"] = param("oov", "pruned elements: 'zero', or of a vector that all ids add ('oov')")
    order: Literal["ids", "counts", "sets"] = param("ids", "ids of a column: the first, by `assign_`, or in a plan")

    def check(self, spec: FeatureSpec) -> list[str]:
        faults = super().check(spec)
        if len(self.num_kept) != spec.embedding_dim or not all(0 <= n <= spec.num_ids for n in self.num_kept):
            faults.append(
                f"`num_kept` must be {spec.embedding_dim} numbers in [0, {spec.num_ids}], one per column; "
                f"got {self.num_kept!r:.80}"
            )
        return faults

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        out, n = ColumnBuilder(spec.embedding_dim), spec.num_ids
        some = [IdSet("", n, 0, count) for count in self.num_kept if 0 < count < n]
        forms = {form: sum(IdSet("", n, 0, i.count, form).nbytes for i in some) for form in ("bitmap", "sorted")}
        # One form of id set for the whole feature: row lookups of one kind run as one operation.
        form: Any = "range" if self.order == "ids" else min(forms, key=lambda f: forms[f])
        apart = self.order == "sets"
        found = list(column_runs([(c, k if apart and 0 < c < n else 0) for k, c in enumerate(self.num_kept)]))
        if self.pruned == "zero" and len(found) > 1 and not found[-1][0][0]:
            found.pop()
        for (elements, _), column, count in found:
            if elements < n and self.pruned == "oov":
                out.share(column, count)
            elif not elements:
                out.skip(column, count)
            if not elements:
                continue
            rows: Transform = MixedRadixDigit()
            if elements < n:
                rows = RankInSet(IdSet(f"column_{column}", n, 0, elements, form))
            table = Table(f"column_{column}", elements, count, Initializer.plain(spec))
            out.add(table, RowLookup(table.name, rows, column=column))
        return out.program()

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        """All columns of ``size`` ids."""
        return cls.from_params({**params, "num_kept": (size,) * spec.embedding_dim})


class PepEmbedding(CompressedEmbedding):
    """Drop-in that stores single elements.

    >>> import torch
    >>> emb = PepEmbedding(100, 2, num_kept=(1, 2), pruned="zero", order="sets", init="normal:1")
    >>> _ = emb.assign_({"column_0": torch.tensor([7]), "column_1": torch.tensor([7, 30])})
    >>> emb(torch.tensor([7, 30, 31])).count_nonzero(1)
    tensor([2, 1, 0])
    """

    config_cls = PepConfig
