"""mixeddim: row widths grow with popularity, projected to one width (Ginart et al. 2019, arXiv 1909.11810)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from heapq import heapify, heappop, heappush
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from recsys_embed.core.heads import Projection
from recsys_embed.core.id_sets import IdSet
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.program import (
    Initializer,
    LeadingColumns,
    LookupProgram,
    MixedRadixDigit,
    RankInSet,
    RowLookup,
    Table,
)
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.fit import importance_of, principal_axes
from recsys_embed.errors import ConfigError, raise_faults, unknown_name
from recsys_embed.features import FeatureSpec
from recsys_embed.method_parts.width_rule import Rounding, WidthGrowth, WidthRule, alpha_fault, block_faults
from recsys_embed.utils.types import Option


@dataclass(frozen=True, kw_only=True)
class MixeddimConfig(MethodConfig):
    """Blocks of ids in order of frequency; rows of block b are ``dims[b]`` wide, falling, and projected where narrower.

    With one block this is a narrow table and a matrix without bias; a table as wide as the output has no matrix. With
    more blocks, one matrix projects the concatenated columns of all blocks, except a first block as wide as the output.
    Bags of a collection are pooled before the matrix applies.

    ``blocks`` holds the number of ids of every block but the last, which takes the rest; :meth:`equal_traffic` finds
    them. ``order="ids"`` takes ids to be numbered by falling frequency; ``"counts"`` stores the sets of ids (part of
    the footprint) and needs ``assign_(counts)`` before training, see ``adaptive``.

    **Widths by popularity.** A table or block of n rows, of which a sample reads k, gets the width
    ``scale * (n / k) ** -alpha``, between 1 and ``embedding_dim``. A budget determines the scale, for one feature
    with ``blocks=`` and for many in a plan (see :meth:`plan`, which can also solve for alpha). ``alpha=0`` gives equal
    widths; the paper recommends about 0.3.

    **Initial rows** (``initializer``): ``"plain"`` gives outputs a full table's variance, ``"xavier"`` is the
    authors' (Glorot and Bengio 2010, for rows and matrix), which makes rows of large tables very small.

    **A frozen matrix** (``projection="frozen"``) is not trained and starts with the columns of each block as the first
    ones of the vector, as if rows were padded with zeros; see :class:`LowdimConfig` for when it pays.

    Pitfalls: at least one element per id is stored. Rounding to powers of two wastes a budget: the steps are large.

    >>> MixeddimConfig(dims=(4,)).footprint(FeatureSpec("C1", 1000, 16)).serve
    16256
    >>> MixeddimConfig(dims=(16, 2), blocks=(100,)).footprint(FeatureSpec("C1", 1000, 16)).serve  # 2 columns projected
    13728
    """

    method: ClassVar[str] = "mixeddim"
    order_option: ClassVar[str | None] = "order"
    renamed_options: ClassVar[Mapping[str, str]] = {"law": "initializer"}
    options_without_network: ClassVar[Mapping[str, Option]] = {"projection": "frozen"}

    dims: tuple[int, ...] = param(MISSING, "widths of the blocks' rows, falling")
    blocks: tuple[int, ...] | None = param(None, "ids of each block but the last, most frequent first")
    order: Literal["ids", "counts"] = param("ids", "'ids' fall in frequency, or `assign_(counts)` orders them")
    initializer: Literal["plain", "xavier"] = param("plain", "distribution of initial rows and matrix")
    projection: Literal["learned", "frozen"] = param("learned", "whether training changes the matrix")

    @property
    def _starts(self) -> list[int]:
        """First rank of each block."""
        starts = [0]
        for count in self.blocks or ():
            starts.append(starts[-1] + count)
        return starts

    def check(self, spec: FeatureSpec) -> list[str]:
        faults = super().check(spec) + block_faults(spec, self.blocks or ())
        width, count = spec.embedding_dim, len(self.blocks or ()) + 1
        if len(self.dims) != count:
            faults.append(f"`dims` must hold {count} widths, one per block; got {len(self.dims)}")
        falling = all(a > b for a, b in zip(self.dims, self.dims[1:], strict=False))
        if not (falling and self.dims[0] <= width and self.dims[-1] >= 1):
            faults.append(f"`dims` must fall, within [1, {width}], the feature's width; got {self.dims}")
        return faults

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        n, width = spec.num_ids, spec.embedding_dim
        narrow = [d for d in self.dims if d < width]
        starts = self._starts
        counts = [stop - start for start, stop in zip(starts, [*starts[1:], n], strict=True)]
        tables, row_lookups = [], []
        for b, (start, count, dim) in enumerate(zip(starts, counts, self.dims, strict=True)):
            name = f"block_{b}" if self.blocks else "weight"
            tables.append(Table(name, count, dim, self._initializer(spec, count, dim, max(narrow, default=0))))
            form = IdSet if self.order == "ids" else IdSet.smallest
            rows = RankInSet(form(name, n, start, count)) if self.blocks else MixedRadixDigit()
            row_lookups.append(RowLookup(name, rows, column=sum(self.dims[:b])))
        if narrow:
            spread = (6 / (narrow[0] + width)) ** 0.5 if self.initializer == "xavier" else (3 / narrow[0]) ** 0.5
            frozen = self.projection == "frozen"
            init = LeadingColumns("constant", blocks=tuple(narrow)) if frozen else Initializer("uniform", spread)
            tables.append(Table("projection", sum(narrow), width, init, dense=True, frozen=frozen))
        return LookupProgram(tuple(tables), tuple(row_lookups), head=Projection("projection") if narrow else None)

    def _initializer(self, spec: FeatureSpec, rows: int, dim: int, widest: int) -> Initializer:
        """Initializer of a block; scaled so that narrower blocks have the variance of the widest projected one."""
        whole = spec.embedding_dim
        if self.projection == "frozen" and dim < whole:
            return Initializer.plain(spec)
        if self.initializer == "xavier":
            gain = (widest + whole) / (dim + whole) if dim < whole else 1.0
            return Initializer("uniform", (6 / (rows + dim) * gain) ** 0.5)
        return Initializer.plain(spec, (widest / dim) ** 0.5 if dim < whole else 1.0)

    @staticmethod
    def equal_traffic(counts: Tensor, num_blocks: int) -> tuple[int, ...]:
        """Ids of each block but the last, such that ``num_blocks`` blocks get about equal numbers of lookups.

        Where a few ids take most of the traffic there may be fewer blocks.

        Args:
            counts: ``[num_embeddings]`` how often each id occurs, in any order.
            num_blocks: at least 2.

        >>> MixeddimConfig.equal_traffic(torch.tensor([5, 1, 1, 1, 1, 1]), 2)
        (1,)
        """
        if num_blocks < 2 or not counts.any():
            raise ConfigError(f"`num_blocks` must be at least 2, and some count not 0; got {num_blocks}")
        traffic = counts.to(torch.float64).sort(descending=True).values.cumsum(0)
        marks = traffic[-1] * torch.arange(1, num_blocks, dtype=torch.float64, device=traffic.device) / num_blocks
        # An id whose lookups straddle a mark belongs to the block before it.
        edges = sorted({int(e) for e in torch.searchsorted(traffic, marks) + 1 if int(e) < len(counts)})
        return tuple(b - a for a, b in zip([0, *edges], edges, strict=False))

    @classmethod
    def max_size(cls, spec: FeatureSpec, **params: Any) -> int:
        return spec.embedding_dim

    @classmethod
    def sized(
        cls,
        spec: FeatureSpec,
        size: int,
        *,
        alpha: float = 0.3,
        blocks: Sequence[int] | None = None,
        shares: Sequence[float] | None = None,
        rounding: Rounding = "integer",
        **params: Any,
    ) -> Self:
        """A first block ``size`` wide, or wider where that costs nothing, and the others by the alpha rule.

        Args:
            alpha: how fast widths fall with popularity.
            blocks: ids of each block but the last; those that come out equally wide are joined.
            shares: of lookups that each block serves, equal by default.
            rounding: of the widths.
        """
        rule = WidthRule.of(spec, blocks, shares, rounding=rounding)
        raise_faults(alpha_fault(alpha), f"widths by popularity, feature {spec.name!r}")
        # The last widths save less than the matrix takes; a single block grows with each but the full one.
        wider = range(size, rule.most + 1) if blocks else {size, rule.most}
        configs = (
            cls.from_params({**params, **rule.blocks(alpha, d * rule.first_ratio**alpha)}) for d in sorted(wider)
        )
        # Widths from the rule are valid, and planning tries many, so they are not checked here.
        return min(reversed(list(configs)), key=lambda config: config.build_program(spec).footprint().serve)

    @classmethod
    def planning_variants(cls, spec: FeatureSpec, curve: Any) -> Sequence[Mapping[str, Any]]:
        """One width, and blocks of ids that take 60, 30 and 10 % of the lookups (of a planner's frequency curve)."""
        edges = sorted({curve.head(0.6), curve.head(0.9)})
        blocks = [b - a for a, b in zip([0, *edges], edges, strict=False)]
        if len(edges) < 2 or not blocks[0] > 0 or edges[-1] >= spec.num_embeddings:
            return ({},)
        return ({}, {"blocks": blocks, "shares": (0.6, 0.3, 0.1)})

    @classmethod
    def plan(
        cls,
        specs: Sequence[FeatureSpec],
        budget: int,
        plain: MethodConfig,
        *,
        full_below: int = 200,
        alpha: float | None = 0.3,
        d0: int | None = None,
        queries: Mapping[str, float] | None = None,
        blocks: Mapping[str, Sequence[int]] | None = None,
        shares: Mapping[str, Sequence[float]] | None = None,
        rounding: Rounding = "integer",
        **params: Any,
    ) -> dict[str, MethodConfig]:
        """Widths by the alpha rule across all tables and blocks.

        As the budget grows, widths rise in the order of the rule; a table whose next step does not fit stays as it is
        while others, of smaller steps, go on.

        Args:
            full_below: features with fewer ids keep a full table, where that fits.
            alpha: the budget fixes the scale of the rule; with None, the most popular table or block is ``d0`` wide
                and the budget fixes alpha in [0, 1].
            d0: largest width; ``embedding_dim`` by default.
            queries: per feature, ids per sample; 1 by default.
            blocks: per feature, ids of each block but the last.
            shares: per feature with blocks, share of its lookups that each block serves; equal by default.
            rounding: of the widths.
        """
        given = {"queries": queries, "blocks": blocks, "shares": shares}
        rules = _rules(specs, alpha, d0, rounding, given)
        whole = {s.name: plain.footprint(s).serve for s in specs}

        def option(spec: FeatureSpec, widths: tuple[float, float]) -> tuple[int, MethodConfig]:
            """Bytes and configuration of a feature at an alpha and a scale."""
            config = cls.from_params({**params, **rules[spec.name].blocks(*widths)})
            need = config.footprint(spec).serve
            return (need, config) if need < whole[spec.name] else (whole[spec.name], plain)

        used = 0
        for keep in (full_below, 0):
            ruled = [s for s in specs if s.num_embeddings >= keep]
            growth = WidthGrowth([rules[s.name] for s in ruled], alpha)
            chosen = {s.name: (whole[s.name], plain) for s in specs}
            chosen |= {s.name: option(s, growth.at(0.0)) for s in ruled}
            used = sum(need for need, _ in chosen.values())
            if used > budget:
                continue
            steps = [(growth.step(rules[s.name], 0.0), i) for i, s in enumerate(ruled)]
            queue = [(x, i) for x, i in steps if x is not None]
            heapify(queue)
            while queue:
                x, i = heappop(queue)
                spec = ruled[i]
                grown = option(spec, growth.at(x))
                if used - chosen[spec.name][0] + grown[0] > budget:
                    continue
                used += grown[0] - chosen[spec.name][0]
                chosen[spec.name] = grown
                following = growth.step(rules[spec.name], x)
                if following is not None:
                    heappush(queue, (following, i))
            return {name: config for name, (_, config) in chosen.items()}
        raise cls.budget_error(used, len(specs), budget, "`d0`" if alpha is None else "embedding_dim")


def _rules(
    specs: Sequence[FeatureSpec], alpha: Any, d0: Any, rounding: Any, given: Mapping[str, Any]
) -> dict[str, WidthRule]:
    """The rule of every feature, from a plan's options by feature name.

    Raises:
        ConfigError: an option is wrong.
    """
    names, faults = [s.name for s in specs], alpha_fault(0 if alpha is None else alpha)
    options: dict[str, Mapping[str, Any]] = {}
    for what, values in given.items():
        options[what] = values if isinstance(values, Mapping) else {}
        if values is not None and not isinstance(values, Mapping):
            faults.append(f"`{what}` of a plan must be given per feature name; got {values!r:.80}")
        faults += [str(unknown_name(f"feature in `{what}`", n, names)) for n in options[what] if n not in names]
    raise_faults(faults, "widths by popularity")
    rules = {}
    for s in specs:
        own = {what: values[s.name] for what, values in options.items() if s.name in values}
        rules[s.name] = WidthRule.of(s, rounding=rounding, most=d0, **own)
    return rules


class MixeddimEmbedding(CompressedEmbedding):
    """Drop-in over rows whose width depends on frequency, and a projection.

    >>> import torch
    >>> emb = MixeddimEmbedding(1_000_000, 16, dims=(16, 4, 1), blocks=(1000, 50_000))
    >>> emb(torch.tensor([[1, 999_999]])).shape, emb.footprint().serve
    (torch.Size([1, 2, 16]), 4660320)
    """

    config_cls = MixeddimConfig

    @torch.no_grad()
    def fit_(self, weight: Tensor, counts: Tensor | None = None) -> None:
        """Set rows and matrix to the best approximation of ``weight [spec.num_ids, embedding_dim]``.

        Each block has columns and rows of the matrix of its own, so each has its own optimum: the leading right
        singular vectors of its rows scaled by the square roots of ``counts`` (Eckart and Young 1936). Ids of a block
        that none of the counted ids belong to count alike.
        """
        importance = importance_of(self, weight, counts)
        for row_lookup, ids in zip(self.program.row_lookups, self._members(), strict=True):
            table = self.table(row_lookup.table)
            parts = [(at, ids[at : at + (1 << 16)]) for at in range(0, len(ids), 1 << 16)]
            axes = None
            if table.shape[1] < self.embedding_dim:
                known = importance if importance[ids].any() else torch.ones_like(importance)
                axes = principal_axes(weight, known, table.shape[1], (part for _, part in parts))
                matrix = self.table("projection")
                # A first block that is not projected has no rows in the matrix.
                first = row_lookup.column - (self.program.combined_width - matrix.shape[0])
                matrix[first : first + table.shape[1]] = axes.T.to(matrix.dtype)
            for at, part in parts:
                rows = weight[part].double()
                table[at : at + len(part)] = (rows if axes is None else rows @ axes).to(table.dtype)

    def _members(self) -> Iterator[Tensor]:
        """Ids of each block, in the order of its rows."""
        for row_lookup in self.program.row_lookups:
            owners = self.kernel.index.owners(0, row_lookup.transform, self.spec.num_ids)
            if owners is None:
                raise RuntimeError(
                    f"blocks of {type(self).__name__} are rows of single ids; got {row_lookup.transform}"
                )
            yield owners.to(self._device())
