"""compositional: complementary partitions (Shi, Mudigere, Naumov and Yang, KDD 2020, arXiv 1909.02107).

Every partition of the ids has a small table with one row per class. No two ids share their classes in all partitions,
so every id keeps a vector of its own (for ``sum`` and ``mul``: unless values coincide) from about
k * n**(1/k) rows.

Where this differs from the authors' DLRM code: the quotient is exact integer division (theirs goes through floats,
wrong above 2**24); rows combine per id before bags are pooled (``bag="pooled"`` is theirs); and products start like a
full table (``initializer="dlrm_bug"`` is theirs, whose call sets the lower bound of the uniform distribution and not
its width).
The affine map is ours: it breaks the tie between the order of ids and their classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import gcd, prod, sqrt
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from recsys_embed.core import hashing
from recsys_embed.core.heads import PerClassNetwork, PooledCombination
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.program import Initializer, LookupProgram, MixedRadixDigit, RowLookup, Table
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.fit import fit_tables
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.features import FeatureSpec
from recsys_embed.method_parts.partition_sizes import covering_moduli, moduli_by_cost, next_prime

_MLP = ("hidden_weight", "hidden_bias", "out_weight", "out_bias")


def class_maps(
    partition: str, moduli: tuple[int, ...], affine: tuple[int, int, int] | None = None
) -> list[MixedRadixDigit]:
    """The map of each partition from ids in [0, prod(moduli)) to its classes; together they are injective.

    >>> [int(digit.rows(torch.tensor(1234))) for digit in class_maps("generalized", (10, 20, 30))]
    [4, 3, 6]
    """
    if partition == "quotient_remainder":
        return [MixedRadixDigit(div=moduli[1], affine=affine), MixedRadixDigit(mod=moduli[1], affine=affine)]
    if partition == "generalized":
        return [MixedRadixDigit(div=prod(moduli[:j]), mod=m, affine=affine) for j, m in enumerate(moduli)]
    return [MixedRadixDigit(mod=m, affine=affine) for m in moduli]


@dataclass(frozen=True, kw_only=True)
class CompositionalConfig(MethodConfig):
    """Tables ``part0``, ``part1``, ..., one per partition; a full table where that would not be smaller.

    With ``num_collisions`` c the first table has ceil(n / c) rows and the others cover c: c rows for the second of
    two. Classes of an id x, with moduli m_0, m_1, ...:

    - ``quotient_remainder``: x // m_1 and x % m_1;
    - ``generalized``: the digits of x, x % m_0, (x // m_0) % m_1, ...;
    - ``chinese_remainder``: x % m_j, with pairwise coprime moduli.

    ``combine="feature"`` emits the rows as separate vectors; ``"path"`` sends the row of the first table through a
    network per class of each further partition.

    >>> CompositionalConfig(num_collisions=4).footprint(FeatureSpec("C1", 10_000, 16)).serve // (16 * 4)
    2504
    """

    method: ClassVar[str] = "compositional"
    renamed_options: ClassVar[Mapping[str, str]] = {"init": "initializer"}
    renamed_values: ClassVar[Mapping[str, Mapping[Any, Any]]] = {"combine": {"add": "sum"}}

    partition: Literal["quotient_remainder", "generalized", "chinese_remainder"] = param(
        "quotient_remainder", "how ids fall into classes"
    )
    num_partitions: int | None = param(None, "tables; as many as `moduli`, or 2, by default", low=2, high=31)
    combine: Literal["mul", "sum", "concat", "feature", "path"] = param("mul", "how rows become a vector")
    num_collisions: int | None = param(None, "ids that share a row of the first table", low=1)
    moduli: tuple[int, ...] | None = param(None, "rows of each table, instead of `num_collisions`")
    affine: bool = param(False, "first map x to (a*x + b) % p, a bijection for a prime p >= n")
    threshold: int = param(0, "features of at most this many ids keep a full table", low=0)
    bag: Literal["per_id", "pooled"] = param(
        "per_id", "'pooled' pools bags per table before tables combine, as in DLRM"
    )
    initializer: Literal["plain", "dlrm_bug", "xavier"] = param(
        "plain", "'plain' starts with the full table's mean and std"
    )
    hidden: int = param(64, "hidden width of the networks of combine='path'", low=1, high=65536)

    def __post_init__(self) -> None:
        if isinstance(self.moduli, list):
            object.__setattr__(self, "moduli", tuple(self.moduli))
        super().__post_init__()

    # -- faults ----------------------------------------------------------------------------------------------------

    @property
    def _tables(self) -> int:
        """Number of partitions."""
        if self.num_partitions is not None:
            return self.num_partitions
        return len(self.moduli) if self.moduli else 2

    def _faults(self, spec: FeatureSpec) -> list[str]:
        """Faults: options that contradict each other, whatever the size of the tables."""
        k, faults = self._tables, []
        if self.partition == "quotient_remainder" and k != 2:
            faults.append(f"`num_partitions` must be 2 for partition 'quotient_remainder'; got {k}; use 'generalized'")
        if self.combine == "concat" and spec.embedding_dim < k:
            faults.append(
                f"`embedding_dim` must be at least the {k} tables that 'concat' joins; got {spec.embedding_dim}"
            )
        if self.combine == "path" and self.bag == "pooled":
            faults.append("`bag` must be 'per_id' for combine 'path', whose networks belong to an id; got 'pooled'")
        return faults

    def _moduli_faults(self, spec: FeatureSpec) -> list[str]:
        moduli = self.moduli
        if moduli is None:
            return []
        if len(moduli) < 2 or min(moduli) < 1:
            return [f"`moduli` must be 2 or more integers >= 1; got {moduli!r}"]
        faults = []
        if len(moduli) != self._tables:
            faults.append(f"`moduli` must be as many as `num_partitions`, {self._tables}; got {len(moduli)}")
        if self.partition == "chinese_remainder":
            shared = [f"{a} and {b} share {gcd(a, b)}" for a, b in combinations(moduli, 2) if gcd(a, b) > 1]
            if shared:
                faults.append(f"`moduli` must be pairwise coprime for 'chinese_remainder'; got {', '.join(shared)}")
        if spec.num_ids > self.threshold and prod(moduli) < self._range(spec):
            why = f"the prime of the affine map of {spec.num_ids} ids" if self.affine else "the number of ids"
            faults.append(f"`moduli` must have a product >= {self._range(spec)}, {why}; got {prod(moduli)}")
        return faults

    def check(self, spec: FeatureSpec) -> list[str]:
        faults = super().check(spec) + self._faults(spec) + self._moduli_faults(spec)
        n, c = spec.num_ids, self.num_collisions
        if c is not None and self.moduli is not None:
            faults.append(f"`num_collisions` and `moduli` both size the tables: give one; got {c} and {self.moduli}")
        if n > self.threshold and c is None and self.moduli is None:
            faults.append("`num_collisions` or `moduli` is missing; give one, or a byte `budget` to size the tables")
        if n > self.threshold and c is not None and c > n:
            faults.append(f"`num_collisions` must be in [1, {n}]; got {c}; or keep small tables plain with `threshold`")
        return faults

    # -- the tables -------------------------------------------------------------------------------------------------

    def _range(self, spec: FeatureSpec) -> int:
        """Number of values that are partitioned: ids, or values of the affine map."""
        return next_prime(spec.num_ids) if self.affine else spec.num_ids

    def _widths(self, spec: FeatureSpec) -> list[int]:
        d, k = spec.embedding_dim, self._tables
        return [d // k + (j < d % k) for j in range(k)] if self.combine == "concat" else [d] * k

    def _mlp_shapes(self, spec: FeatureSpec) -> list[tuple[int, ...]]:
        """Shapes of one class's network, in the order of ``_MLP``."""
        d = spec.embedding_dim
        return [(d, self.hidden), (self.hidden,), (self.hidden, d), (d,)]

    def _networks(self, spec: FeatureSpec, moduli: tuple[int, ...]) -> list[list[Table]]:
        """Tables of the network of each further partition; networks keep the variance of their input."""
        # ReLU halves the mean square of its input (He et al. 2015).
        bounds = (sqrt(3 / spec.embedding_dim), 0.0, sqrt(6 / self.hidden), 0.0)
        inits = [Initializer("uniform", bound) if bound else Initializer("constant") for bound in bounds]
        shapes = self._mlp_shapes(spec)
        return [
            [
                Table(f"part{j}_{name}", m, prod(shape), init, dense=True, inner=shape)
                for name, shape, init in zip(_MLP, shapes, inits, strict=True)
            ]
            for j, m in enumerate(moduli[1:], start=1)
        ]

    def _costs(self, spec: FeatureSpec) -> tuple[int, ...]:
        """Elements stored per class of each partition."""
        widths = self._widths(spec)
        network = sum(prod(shape) for shape in self._mlp_shapes(spec))
        return (widths[0], *(network if self.combine == "path" else w for w in widths[1:]))

    def moduli_of(self, spec: FeatureSpec) -> tuple[int, ...] | None:
        """Classes of each partition of ``spec``, or None where the feature keeps a full table.

        >>> config = CompositionalConfig(num_collisions=4, threshold=200)
        >>> config.moduli_of(FeatureSpec("C1", 1000, 16)), config.moduli_of(FeatureSpec("C2", 200, 16))
        ((250, 4), None)
        """
        n = spec.num_ids
        if n <= self.threshold:
            return None
        coprime = self.partition == "chinese_remainder"
        moduli = self.moduli or covering_moduli(self._range(spec), self.num_collisions or 1, self._tables, coprime)
        elements = sum(m * c for m, c in zip(moduli, self._costs(spec), strict=True))
        return moduli if elements < n * spec.embedding_dim else None

    def classes_of(self, spec: FeatureSpec) -> list[MixedRadixDigit]:
        """The partitions' maps from an id to its class; only for a feature that is compressed."""
        moduli, affine = self.moduli_of(spec), None
        if moduli is None:
            raise ConfigError(f"feature {spec.name!r} keeps a full table and has no partitions")
        if self.affine:
            # Ids stay below 2**31, so a*x + b stays below 2**63.
            p = self._range(spec)
            a = 1 + hashing.salt(self.seed, spec.table_name, "affine", 0) % (p - 1)
            affine = (a, hashing.salt(self.seed, spec.table_name, "affine", 1) % p, p)
        return class_maps(self.partition, moduli, affine)

    def _initializers(self, spec: FeatureSpec, rows: tuple[int, ...], widths: list[int]) -> list[Initializer]:
        n, k = spec.num_embeddings, self._tables
        if self.initializer == "xavier":
            return [Initializer("normal", sqrt(2 / (m + w))) for m, w in zip(rows, widths, strict=True)]
        if self.initializer == "dlrm_bug":
            low = n**-0.5
            return [Initializer("uniform", (1 - low) / 2, (1 + low) / 2)] * k
        if self.combine == "mul":
            # A factor 1 + U(±1/sqrt(n)) has the mean square 1 + 1/(3n).
            return [
                Initializer.plain(spec, (1 + 1 / (3 * n)) ** (-(k - 1) / 2)),
                *[Initializer("uniform", n**-0.5, 1.0)] * (k - 1),
            ]
        return [Initializer.plain(spec, k**-0.5 if self.combine == "sum" else 1.0)] * k

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        moduli = self.moduli_of(spec)
        if moduli is None:
            table = Table("weight", spec.num_ids, spec.embedding_dim, Initializer.plain(spec))
            return LookupProgram((table,), (RowLookup("weight", MixedRadixDigit()),))
        widths = self._widths(spec)
        initializers, classes = self._initializers(spec, moduli, widths), self.classes_of(spec)
        parts = zip(moduli, widths, initializers, strict=True)
        tables = [Table(f"part{j}", rows, width, init) for j, (rows, width, init) in enumerate(parts)]
        if self.combine == "path":
            networks = self._networks(spec, moduli)
            names = tuple((n[0].name, n[1].name, n[2].name, n[3].name) for n in networks)
            head = PerClassNetwork(tuple(classes[1:]), names)
            held = (tables[0], *(t for network in networks for t in network))
            return LookupProgram(held, (RowLookup("part0", classes[0]),), head=head)
        if self.pools_first:
            apart = tuple(RowLookup(f"part{j}", digit, column=sum(widths[:j])) for j, digit in enumerate(classes))
            pooled = PooledCombination(self._tables, "mul" if self.combine == "mul" else "sum")
            return LookupProgram(tuple(tables), apart, head=pooled)
        side_by_side = self.combine in ("concat", "feature")
        row_lookups = [
            RowLookup(f"part{j}", digit, column=sum(widths[:j]) if side_by_side else 0)
            for j, digit in enumerate(classes)
        ]
        vectors = self._tables if self.combine == "feature" else 1
        return LookupProgram(
            tuple(tables), tuple(row_lookups), "mul" if self.combine == "mul" else "sum", vectors=vectors
        )

    @property
    def pools_first(self) -> bool:
        """Whether bags are pooled per table before tables combine, where the order matters."""
        return self.bag == "pooled" and self.combine in ("mul", "sum")

    # -- sizes ------------------------------------------------------------------------------------------------------

    @classmethod
    def _ladder(cls, spec: FeatureSpec, params: dict[str, Any]) -> Sequence[tuple[int, ...]]:
        """The useful moduli, cheapest first, all below the cost of a full table."""
        config = cls.from_params(params)
        faults = config._faults(spec)
        if config.num_collisions is not None or config.moduli is not None:
            faults.append("`num_collisions` and `moduli` fix the size of the tables; leave them out to size by bytes")
        raise_faults(faults, f"{cls.__name__}, feature {spec.name!r}")
        if spec.num_ids <= config.threshold:
            return ()
        coprime, plain = config.partition == "chinese_remainder", spec.num_ids * spec.embedding_dim
        return moduli_by_cost(config._range(spec), config._costs(spec), coprime, plain)

    @classmethod
    def max_size(cls, spec: FeatureSpec, **params: Any) -> int:
        return len(cls._ladder(spec, params)) + 1

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        rungs = cls._ladder(spec, params)
        if size > len(rungs):
            # The largest size is the full table.
            threshold = max(spec.num_ids, params.get("threshold", 0))
            return cls.from_params({**params, "threshold": threshold})
        moduli = rungs[size - 1]
        if params.get("partition", "quotient_remainder") == "quotient_remainder":
            return cls.from_params({**params, "num_collisions": moduli[1]})
        return cls.from_params({**params, "moduli": moduli})


class CompositionalEmbedding(CompressedEmbedding):
    """Drop-in over complementary partitions; with ``combine="feature"`` it returns several vectors per id.

    >>> emb = CompositionalEmbedding(10_000, 16, num_collisions=100)
    >>> emb(torch.tensor([1, 9_999])).shape, emb.footprint().serve, len(emb.materialize().unique(dim=0))
    (torch.Size([2, 16]), 12800, 10000)
    """

    config_cls = CompositionalConfig
    config: CompositionalConfig

    def fit_(self, weight: Tensor, counts: Tensor | None = None) -> None:
        """Approximate ``weight`` in place.

        Networks (``combine="path"``) start from the mean of each class of the first partition and keep their hidden
        layers; their last output layer is fitted.
        """
        head = self.program.head
        if not isinstance(head, PerClassNetwork):
            return super().fit_(weight, counts)
        with torch.no_grad():
            base = self.table("part0")
            rows = self.program.row_lookups[0].transform.rows(torch.arange(len(weight), device=weight.device))
            share = torch.ones(len(weight)) if counts is None else counts.float().clamp_min(1e-6)
            share = share.to(weight).unsqueeze(1)
            total = torch.zeros_like(base[:, :1]).index_add_(0, rows, share).clamp_min(1e-12)
            base.copy_(torch.zeros_like(base).index_add_(0, rows, weight * share) / total)
        fit_tables(self, weight, counts, names=head.networks[-1][2:])
