"""tt: a tensor train in place of a table (Yin, Acun, Wu and Liu, TT-Rec, MLSys 2021, arXiv 2101.11714).

The digits of an id choose a slice of each of 2 to 4 small cores, and the vector is the product of these matrices. Ids
of a batch are deduplicated first, since a product costs far more than a row that is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from math import prod
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from recsys_embed.core.generators import TensorTrain
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.program import Initializer, LookupProgram, MixedRadixDigit, RowLookup, Table
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.fit import fit_tables, importance_of
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.features import FeatureSpec
from recsys_embed.method_parts.tensor_train import (
    covering_factors,
    rank_bounds,
    tensor_train_of,
    train_elements,
    width_factors,
)
from recsys_embed.method_parts.tensor_train_files import Cores, fbtt_cores, hetu_cores, shapes_of_cores

_SHAPES = ("ranks", "id_shape", "width_shape")
# Numbers that a fit weighted by counts gathers at once.
_REFINED_BELOW = 1 << 24


@dataclass(frozen=True, kw_only=True)
class TtConfig(MethodConfig):
    """Cores ``core0``, ``core1``, ..., of which core k holds ``id_shape[k]`` slices ``[r, width_shape[k], r']``.

    With ``order="most_significant"`` the first core has the highest digit of an id, as in FBTT-Embedding, with
    ``"least_significant"`` the lowest, as in Hetu: cores of one order mean another table in the other. Shapes are by
    default factors near each other.

    Cores start from normal distributions such that vectors have the variance of a full table's elements: a sum of
    ``prod(ranks)`` products has that many times the product of the cores' variances. (The start of FBTT-Embedding
    lacks the ranks, and has 190 times the intended variance besides.)

    >>> TtConfig(ranks=(8, 8)).footprint(FeatureSpec("C1", 1_000_000, 16)).serve  # 4 * 100 * (2*8 + 8*2*8 + 8*4)
    70400
    """

    method: ClassVar[str] = "tt"

    ranks: tuple[int, ...] = param(MISSING, "inner ranks, one fewer than cores: 1 to 3")
    id_shape: tuple[int, ...] | None = param(None, "slices of each core, of a product of at least the number of ids")
    width_shape: tuple[int, ...] | None = param(None, "columns of each core, of the product `embedding_dim`")
    order: Literal["most_significant", "least_significant"] = param(
        "most_significant", "digit of an id that chooses in the first core"
    )

    def __post_init__(self) -> None:
        for name in _SHAPES:
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        super().__post_init__()

    def shapes_of(self, spec: FeatureSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Slices and columns of each core.

        >>> TtConfig(ranks=(4,)).shapes_of(FeatureSpec("C1", 10_000, 16))
        ((100, 100), (4, 4))
        """
        cores = len(self.ranks) + 1
        return (
            self.id_shape or covering_factors(spec.num_ids, cores),
            self.width_shape or width_factors(spec.embedding_dim, cores),
        )

    def check(self, spec: FeatureSpec) -> list[str]:
        faults = super().check(spec)
        if not 1 <= len(self.ranks) <= 3 or min(self.ranks) < 1:
            return [*faults, f"`ranks` must be 1 to 3 integers >= 1, for 2 to 4 cores; got {self.ranks}"]
        cores = len(self.ranks) + 1
        for name in ("id_shape", "width_shape"):
            shape = getattr(self, name)
            if shape is not None and (len(shape) != cores or min(shape) < 1):
                faults.append(f"`{name}` must be {cores} integers >= 1, one more than `ranks`; got {shape}")
        if faults:
            return faults
        rows, widths = self.shapes_of(spec)
        if prod(rows) < spec.num_ids:
            faults.append(f"`id_shape` must have a product of at least {spec.num_ids}, the ids; got {rows}")
        if prod(widths) != spec.embedding_dim:
            faults.append(f"`width_shape` must have the product {spec.embedding_dim}, the width; got {widths}")
        return faults

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        (rows, widths), ranks = self.shapes_of(spec), self.ranks
        head = TensorTrain(widths, ranks)
        distribution, scale = spec.initial_distribution()
        variance = scale**2 / 3 if distribution == "uniform" else scale**2
        start = Initializer("normal", (variance / prod(ranks)) ** (0.5 / len(rows)))
        sizes = [prod(shape) for shape in head.shapes]
        tables = tuple(Table(f"core{k}", n, w, start) for k, (n, w) in enumerate(zip(rows, sizes, strict=True)))
        return LookupProgram(
            tables,
            tuple(RowLookup(f"core{k}", d, column=sum(sizes[:k])) for k, d in enumerate(self._digits(rows))),
            head=head,
        )

    def _digits(self, rows: Sequence[int]) -> list[MixedRadixDigit]:
        """The digit of each core."""
        last = len(rows) - 1
        if self.order == "most_significant":
            return [MixedRadixDigit(div=prod(rows[k + 1 :]), mod=rows[k] if k else 0) for k in range(last + 1)]
        return [MixedRadixDigit(div=prod(rows[:k]), mod=rows[k] if k < last else 0) for k in range(last + 1)]

    # -- sizes ------------------------------------------------------------------------------------------------------

    @classmethod
    def _ladder(
        cls, spec: FeatureSpec, params: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...]]]:
        """Largest useful ranks, and the shapes, for options without ranks: of three cores by default."""
        shapes = [params[name] for name in ("id_shape", "width_shape") if params.get(name)]
        cores = len(shapes[0]) if shapes else 3
        least = cls.from_params({**params, "ranks": (1,) * (cores - 1)})
        raise_faults(least.check(spec), f"{cls.__name__}, feature {spec.name!r}")
        shapes_of = least.shapes_of(spec)
        return rank_bounds(*shapes_of), shapes_of

    @classmethod
    def max_size(cls, spec: FeatureSpec, **params: Any) -> int:
        bounds, shapes = cls._ladder(spec, params)
        low, high = 1, sum(bounds) - len(bounds) + 1
        whole = spec.num_ids * spec.embedding_dim
        while low < high:
            middle = (low + high + 1) // 2
            if train_elements(*shapes, ranks=_ranks(bounds, middle)) < whole:
                low = middle
            else:
                high = middle - 1
        return low

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        """Ranks that sum to ``size`` more than ones would, as equal as their bounds allow."""
        given = {k: v for k, v in params.items() if k != "ranks"}
        if params.get("ranks") is not None:
            raise ConfigError(f"`ranks` fix the size of the cores; leave them out to size by bytes ({cls.__name__})")
        return cls.from_params({**given, "ranks": _ranks(cls._ladder(spec, given)[0], size)})


def _ranks(bounds: Sequence[int], size: int) -> tuple[int, ...]:
    """Ranks ``size`` - 1 above ones in sum, as equal as bounds allow, the last ones larger.

    >>> [_ranks((2, 9), size) for size in (1, 2, 3, 4, 5)]
    [(1, 1), (1, 2), (2, 2), (2, 3), (2, 4)]
    """
    left, out = size - 1, [1] * len(bounds)
    # In the order of their bounds, so that what the small ones cannot take goes to the others.
    order = sorted(range(len(bounds)), key=lambda k: (bounds[k], k))
    for done, k in enumerate(order):
        out[k] += min(bounds[k] - 1, left // (len(order) - done))
        left -= out[k] - 1
    return tuple(out)


class TtEmbedding(CompressedEmbedding):
    """Drop-in over the cores of a tensor train, whose product a vector is.

    >>> emb = TtEmbedding(1_000_000, 16, ranks=(8, 8))
    >>> emb(torch.tensor([1, 999_999])).shape, emb.footprint().serve
    (torch.Size([2, 16]), 70400)
    """

    config_cls = TtConfig
    config: TtConfig

    @torch.no_grad()
    def fit_(self, weight: Tensor, counts: Tensor | None = None) -> None:
        """Set the cores to nearly the best approximation of ``weight [spec.num_ids, embedding_dim]``, by TT-SVD.

        It weighs all slices of the cores alike, also those of no id, for which the mean stands. Unless the table is
        large, alternating least squares then weigh each id by its count.
        """
        importance = importance_of(self, weight, counts)
        rows, widths = self.config.shapes_of(self.spec)
        share = (importance / importance.sum()).to(torch.promote_types(weight.dtype, torch.float32))
        mean = share @ weight.to(share.dtype)
        target = mean.expand(prod(rows), -1).clone()
        target[: len(weight)][importance > 0] = weight[importance > 0].to(share.dtype)
        for k, core in enumerate(tensor_train_of(target, rows, widths, self.config.ranks, self.config.order)):
            self.table(f"core{k}").copy_(core)
        alike = len(weight) == prod(rows) and bool((importance == importance[0]).all())
        if not alike and len(weight) * self.program.combined_width < _REFINED_BELOW:
            with torch.enable_grad():
                fit_tables(self, weight, counts, sweeps=3, steps=20)

    @classmethod
    def from_fbtt(
        cls, state: Mapping[str, Any], num_embeddings: int, ranks: Sequence[int], *, table: int = 0, **options: Any
    ) -> Self:
        """A module of the cores of an FBTT-Embedding ``TTEmbeddingBag`` or ``TableBatchedTTEmbeddingBag``.

        Args:
            state: its state dict.
            num_embeddings: ids of the table.
            ranks: inner ranks it was made with (``tt_ranks``).
            table: which of its tables.
            options: anything else the constructor takes.

        Raises:
            ConfigError: shapes do not fit, or rows lie in its cache, which are trained apart from the cores.
        """
        return cls._from_cores(fbtt_cores(state, table), num_embeddings, ranks, "most_significant", options)

    @classmethod
    def from_hetu(cls, cores: Cores, num_embeddings: int, ranks: Sequence[int], **options: Any) -> Self:
        """A module of the cores of a Hetu ``TensorTrainEmbedding``.

        Args:
            cores: arrays ``[rows, r * columns * r']`` in order, or by their names, which end in ``_0``, ``_1``, ``_2``.
            num_embeddings: ids of the table.
            ranks: inner ranks; Hetu's are equal.
            options: anything else the constructor takes.
        """
        return cls._from_cores(hetu_cores(cores), num_embeddings, ranks, "least_significant", options)

    @classmethod
    def _from_cores(
        cls, cores: Sequence[Tensor], num_embeddings: int, ranks: Sequence[int], order: str, options: Mapping[str, Any]
    ) -> Self:
        id_shape, width_shape = shapes_of_cores(cores, ranks)
        config = TtConfig.from_params(
            {"ranks": tuple(ranks), "id_shape": id_shape, "width_shape": width_shape, "order": order}
        )
        like = {"device": cores[0].device, "dtype": cores[0].dtype}
        module = cls(num_embeddings, prod(width_shape), config=config, **{**like, **options})
        with torch.no_grad():
            for k, core in enumerate(cores):
                module.table(f"core{k}").copy_(core)
        return module
