"""unified: many features share one table, each id reading several rows of it (feature multiplexing, 2305.12102)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from typing import Any, ClassVar, Literal, Self

from recsys_embed.core import hashing
from recsys_embed.core.heads import Projection
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.precision import Layout, rows_within
from recsys_embed.core.program import Hash, Initializer, LookupProgram, RowLookup, Table
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import ConfigError, unknown_name
from recsys_embed.features import MAX_ROWS, FeatureSpec
from recsys_embed.method_parts.shared_plan import keep_small_tables


@dataclass(frozen=True, kw_only=True)
class UnifiedConfig(MethodConfig):
    """One table of ``num_buckets`` x ``dim`` for every feature that names it (Coleman et al., NeurIPS 2023, 3.1).

    Each id reads ``num_hashes`` rows, found by independent hashes salted with the feature's name and the number, so a
    feature keeps its rows when others are added or removed. Rows of different features collide freely: with a learned
    linear layer above, such collisions are mostly harmless (section 3.4), unlike those within one feature.

    Two properties follow: features that are SUMMED before the first layer should not share a table, and the rows of a
    table shared by features of unlike cardinality start with the paper's U(±0.05) unless the features' own initializer
    is explicit.

    >>> UnifiedConfig(num_buckets=1000).footprint(FeatureSpec("C1", 100_000, 16)).serve
    16000
    """

    method: ClassVar[str] = "unified"
    accepts_raw: ClassVar[bool] = True
    renamed_options: ClassVar[Mapping[str, str]] = {
        "num_rows": "num_buckets",
        "num_probes": "num_hashes",
        "chunk_dim": "dim",
    }

    num_buckets: int = param(MISSING, "rows of each shared table", low=1, high=MAX_ROWS)
    num_hashes: int | None = param(
        None, "rows read per id; the most up to 4 that leave rows of 4 or more (concat), else 2 (sum)", low=1, high=64
    )
    dim: int | None = param(None, "row width; embedding_dim / num_hashes (concat) or embedding_dim (sum)", low=1)
    combine: Literal["concat", "sum"] = param("concat", "how the rows of an id combine")
    num_tables: int = param(1, "shared tables; consecutive chunks take them in turn", low=1, high=64)
    first_chunk: int = param(0, "chunks of earlier features, which fixes the first table in turn", low=0)
    table: str = param("unified", "name of the shared table; features that name another do not share")

    def _shape(self, spec: FeatureSpec) -> tuple[int, int]:
        """Row lookups per id and row width for ``spec``."""
        d, summed = spec.embedding_dim, self.combine == "sum"
        if self.num_hashes is not None:
            row_lookups = self.num_hashes
        elif summed or self.dim is not None:
            row_lookups = 2
        else:
            # Narrower rows waste most of the memory transfer that reads them.
            row_lookups = max(k for k in (1, 2, 3, 4) if k == 1 or (d % k == 0 and d // k >= 4))
        if self.dim is not None:
            return row_lookups, self.dim
        return row_lookups, d if summed else max(1, d // row_lookups)

    def check(self, spec: FeatureSpec) -> list[str]:
        faults = super().check(spec)
        row_lookups, _ = self._shape(spec)
        if self.combine == "concat" and self.dim is None and spec.embedding_dim % row_lookups:
            faults.append(
                f"`num_hashes` must divide embedding_dim {spec.embedding_dim}, or `dim` be given; got {row_lookups}"
            )
        if not self.table or "." in self.table or "#" in self.table:
            faults.append(f"`table` must be a name without '.' or '#'; got {self.table!r}")
        return faults

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        row_lookups, width = self._shape(spec)
        summed = self.combine == "sum"
        explicit = ":" in spec.init
        initialised = spec if explicit else replace(spec, init="uniform:0.05")
        init = Initializer.plain(initialised, row_lookups**-0.5 if summed else 1.0)
        names = [self.table if self.num_tables == 1 else f"{self.table}_{i}" for i in range(self.num_tables)]
        turns = [names[(self.first_chunk + j) % self.num_tables] for j in range(row_lookups)]
        reads = tuple(
            RowLookup(
                turns[j],
                Hash(hashing.salt(self.seed, spec.table_name, "chunk", j), self.num_buckets),
                column=0 if summed else j * width,
            )
            for j in range(row_lookups)
        )
        tables = [Table(n, self.num_buckets, width, init, shared=True) for n in names if n in turns]
        columns = width if summed else row_lookups * width
        head = None
        if columns != spec.embedding_dim:
            head = "projection"
            spread = Initializer("uniform", (3 / columns) ** 0.5)
            tables.append(Table(head, columns, spec.embedding_dim, spread, dense=True))
        return LookupProgram(tuple(tables), reads, head=None if head is None else Projection(head))

    @classmethod
    def max_size(cls, spec: FeatureSpec, **params: Any) -> int:
        config = cls.from_params({**params, "num_buckets": 1})
        _, width = config._shape(spec)
        return min(MAX_ROWS, max(1, spec.num_ids * spec.embedding_dim // (width * config.num_tables)))

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        return cls.from_params({**params, "num_buckets": size})

    @classmethod
    def plan(
        cls,
        specs: Sequence[FeatureSpec],
        budget: int,
        plain: MethodConfig,
        *,
        full_below: int = 200,
        num_hashes: int | Mapping[str, int] | None = None,
        **params: Any,
    ) -> dict[str, MethodConfig]:
        """One shared table of the bytes that the budget leaves.

        Args:
            full_below: features with fewer ids keep a private full table, smallest first, while these tables take
                at most half the budget.
            num_hashes: for all features, or per feature name (multi-size; give ``dim`` with it, and a
                projection brings every feature to its width).
        """
        for name in num_hashes if isinstance(num_hashes, Mapping) else ():
            if name not in {s.name for s in specs}:
                raise unknown_name("feature in `num_hashes`", name, [s.name for s in specs])
        chosen, spent, shared = keep_small_tables(specs, budget, plain, full_below)
        if not shared:
            return chosen
        chunks = 0
        small: dict[str, UnifiedConfig] = {}
        for spec in shared:
            row_lookups = num_hashes.get(spec.name) if isinstance(num_hashes, Mapping) else num_hashes
            turn = chunks if params.get("num_tables", 1) > 1 else 0
            config = cls.from_params({**params, "num_buckets": 1, "num_hashes": row_lookups, "first_chunk": turn})
            small[spec.name] = config
            chunks += config._shape(spec)[0]
        tables = {t.name: t for s in shared for t in small[s.name].program(s).tables if t.shared}
        if len({t.width for t in tables.values()}) > 1 or len({small[s.name]._shape(s)[1] for s in shared}) > 1:
            raise ConfigError(
                f"features that share table {params.get('table', 'unified')!r} need rows of one width; give `dim`"
            )
        heads = sum(t.nbytes() for s in shared for t in small[s.name].program(s).tables if t.dense)
        width, left = next(t.width for t in tables.values()), (budget - spent - heads) // len(tables)
        useful = sum((s.num_ids if s.ids == "index" else s.num_embeddings) * s.embedding_dim for s in shared)
        precision = params.get("precision", "fp32")
        room = rows_within(left, width, precision)
        rows = min(room, useful // (width * len(tables)))
        if rows < 1:
            least = spent + heads + Layout.of(width, precision).row_bytes * len(tables)
            raise cls.budget_error(least, len(specs), budget, "`dim`", per_id=False)
        chosen |= {name: replace(config, num_buckets=min(rows, MAX_ROWS)) for name, config in small.items()}
        return {s.name: chosen[s.name] for s in specs}


class UnifiedEmbedding(CompressedEmbedding):
    """Drop-in for one feature: several hashed rows of one table per id; takes any int64 id.

    >>> import torch
    >>> emb = UnifiedEmbedding(1_000_000, 16, num_buckets=50_000, num_hashes=4)
    >>> emb(torch.tensor([1, 2**40])).shape, emb.footprint().serve
    (torch.Size([2, 16]), 800000)
    """

    config_cls = UnifiedConfig
