"""multihash: each id reads several hashed rows, so two ids rarely share all of them; optionally with weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from recsys_embed.core import hashing
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.program import Hash, Initializer, LookupProgram, Murmur, RowLookup, Table, Transform, Weight
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import ConfigError, unknown_name
from recsys_embed.features import MAX_ROWS, FeatureSpec

PRESETS: dict[str, dict[str, Any]] = {
    "thinc": {"num_hashes": 4, "hash": "murmur", "initializer": "thinc"},
    "bloom": {"combine": "mean", "initializer": "cce"},
    "svenstrup": {"weights": "original", "initializer": "svenstrup"},
    "cce": {"weights": "flat", "initializer": "cce"},
}


@dataclass(frozen=True, kw_only=True)
class MultihashConfig(MethodConfig):
    """``num_hashes`` rows of a table of ``num_buckets`` rows, combined (two ids share all k with probability M^-k).

    **Importance weights** make it hash embeddings (Svenstrup et al., NeurIPS 2017, arXiv 1709.03933): row j counts
    ``w_j(x)``, a learned scalar from a second hashed table. With u, u_j hashes of the id into [0, num_weights):
    ``"original"`` reads ``w_j = P[u, j]``, ``"indep"`` ``P[u_j, j]``, ``"flat"`` any element of P. The paper's option
    to output the weights comes in two forms: ``append_weights="inside"`` keeps the width, with a pool of
    ``embedding_dim - num_hashes`` and outputs ``[sum_j w_j E_j ; w / sqrt(embedding_dim)]`` (the library cce);
    ``"outside"`` is the paper's ``[sum_j w_j E_j ; w]``, so the output is ``num_hashes`` WIDER than ``embedding_dim``.

    **Frequency split** (Zhang et al. 2020, arXiv 2007.14523): ids in ``[0, num_frequent)`` have private rows, the
    others hash into ``num_buckets`` more; ids must be numbered by descending frequency. With ``combine="sum"`` a
    frequent id is its one private row; with ``"concat"`` each of the ``separate`` tables has a private chunk for it, so
    that its whole width is its own. When sizing by a budget, ``frequent_share`` instead of ``num_frequent`` gives this
    share of the rows to frequent ids.

    **Initial rows** (``initializer``): ``"plain"`` gives outputs a full table's variance (frequent ids under
    ``"sum"``: 1/num_hashes of it); weights start at 1, or, where they are part of the output, like a full table.
    ``"svenstrup"`` is N(0, 0.1) rows with N(0, 5e-4) weights, ``"cce"`` U(±1/sqrt(embedding_dim)) with U(±1),
    ``"thinc"`` U(±0.1). The near-zero weights of ``"svenstrup"`` shrink the rows' gradients by as much: train them with
    Adagrad or Adam.

    **Presets** (``preset=`` where options are given by keyword): ``"thinc"``, ``"bloom"``, ``"svenstrup"``, ``"cce"``.

    A budget is split half and half between rows and weights, as cce does.

    >>> MultihashConfig(num_buckets=500).footprint(FeatureSpec("C1", 10_000, 16)).serve
    32000
    >>> config = MultihashConfig(num_buckets=500, weights="flat", num_weights=4000)
    >>> config.footprint(FeatureSpec("C1", 10_000, 16)).serve
    64000
    """

    method: ClassVar[str] = "multihash"
    accepts_raw: ClassVar[bool] = True
    renamed_options: ClassVar[Mapping[str, str]] = {
        "law": "initializer",
        "head": "num_frequent",
        "head_share": "frequent_share",
    }

    num_buckets: int = param(MISSING, "hashed rows of the table, or of each table", low=1, high=MAX_ROWS)
    num_hashes: int = param(2, "rows per id", low=1, high=64)
    combine: Literal["sum", "mean", "concat"] = param("sum", "how the rows of an id combine")
    separate: bool = param(False, "a table per hash instead of one for all")
    sign: bool = param(False, "multiply each row by its own hash in {-1, +1}")
    hash: Literal["splitmix64", "murmur"] = param("splitmix64", "'murmur': the 4 keys of thinc, salted by `seed` alone")
    weights: Literal["original", "indep", "flat"] | None = param(None, "learned importance of each row")
    num_weights: int | None = param(None, "rows of the weights; 10 x num_buckets by default", low=1, high=MAX_ROWS)
    append_weights: Literal["inside", "outside"] | None = param(None, "weights become columns of the output")
    num_frequent: int = param(0, "ids below this have private rows", low=0, high=MAX_ROWS)
    initializer: Literal["plain", "svenstrup", "cce", "thinc"] = param(
        "plain", "distribution of initial rows and weights"
    )

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> Self:
        """As :meth:`MethodConfig.from_params`; ``preset`` names options that the given ones override."""
        given = cls.current_options(params)
        preset = given.pop("preset", None)
        if preset is not None and preset not in PRESETS:
            raise unknown_name("preset of MultihashConfig", str(preset), PRESETS)
        return super().from_params({**PRESETS.get(preset, {}), **given})

    @classmethod
    def thinc(cls, num_buckets: int, seed: int = 0) -> Self:
        """thinc's (spaCy's) HashEmbed: the sum of four rows keyed by MurmurHash3; thinc seeds it with the layer's id.

        Bit for bit thinc's rows for the same ``seed`` and table; without its dropout, which belongs to the model.

        >>> MultihashConfig.thinc(5000, seed=7).num_hashes
        4
        """
        return cls.from_params({"preset": "thinc", "num_buckets": num_buckets, "seed": seed})

    @property
    def _tables(self) -> int:
        return self.num_hashes if self.separate else 1

    @property
    def _weight_rows(self) -> int:
        """Rows of the importance table, ``num_hashes`` elements each."""
        return self.num_weights or min(10 * self.num_buckets, MAX_ROWS // self.num_hashes)

    def _chunk(self, spec: FeatureSpec) -> int:
        """Width of a stored row."""
        width = spec.embedding_dim - (self.num_hashes if self.append_weights == "inside" else 0)
        return width // self.num_hashes if self.combine == "concat" else width

    def check(self, spec: FeatureSpec) -> list[str]:
        return super().check(spec) + self._check_shape(spec) + self._check_weights() + self._check_frequent(spec)

    def _check_shape(self, spec: FeatureSpec) -> list[str]:
        faults = []
        width, k = spec.embedding_dim, self.num_hashes
        chunks = k if self.combine == "concat" and not self.separate else 1
        most = max(1, spec.num_ids - self.num_frequent) * chunks
        if spec.ids == "index" and self.num_buckets > most:
            faults.append(f"`num_buckets` must be in [1, {most}]; got {self.num_buckets}")
        if self.combine == "concat" and width % k:
            faults.append(f"`num_hashes` must divide embedding_dim {width} with combine='concat'; got {k}")
        if self.append_weights == "inside" and width <= k:
            faults.append(
                f"`num_hashes` leaves no column of embedding_dim {width} beside the appended weights; got {k}"
            )
        if self.hash == "murmur":
            if k > 4:
                faults.append(f"`num_hashes` must be in [1, 4] with hash='murmur', which has 4 keys; got {k}")
            if not 0 <= self.seed < 2**32:
                faults.append(f"`seed` must be in [0, {2**32 - 1}] with hash='murmur'; got {self.seed}")
        return faults

    def _check_weights(self) -> list[str]:
        faults = []
        if self.weights is None:
            for name in ("num_weights", "append_weights"):
                if getattr(self, name) is not None:
                    faults.append(f"`{name}` needs `weights`; got {getattr(self, name)!r} and weights=None")
        elif self.num_weights and self.num_weights * self.num_hashes > MAX_ROWS:
            most = MAX_ROWS // self.num_hashes
            faults.append(f"`num_weights` must be in [1, {most}] with {self.num_hashes} hashes; got {self.num_weights}")
        return faults

    def _check_frequent(self, spec: FeatureSpec) -> list[str]:
        if self.num_frequent == 0:
            return []
        faults = []
        if spec.ids == "raw":
            faults.append("`num_frequent` needs ids numbered by descending frequency; the feature has raw ids")
        elif self.num_frequent >= spec.num_ids:
            faults.append(
                f"`num_frequent` must be in [0, {spec.num_ids - 1}]; got {self.num_frequent}; "
                "with a budget use `frequent_share`"
            )
        if self.hash == "murmur" or self.weights is not None or self.combine == "mean":
            faults.append(
                "`num_frequent` goes with combine='sum' or 'concat', hash='splitmix64' and no weights; "
                f"got {self.combine!r}, {self.hash!r}, weights={self.weights!r}"
            )
        if self.combine == "concat" and not self.separate:
            faults.append(
                "`num_frequent` with combine='concat' needs separate=True, so that frequent ids own their chunks"
            )
        return faults

    def _inits(self, spec: FeatureSpec) -> tuple[Initializer, Initializer]:
        """Initializers of rows and weights."""
        width, k = spec.embedding_dim, self.num_hashes
        gain = {"sum": k**-0.5, "mean": k**0.5, "concat": 1.0}[self.combine]
        if self.initializer == "svenstrup":
            return Initializer("normal", 0.1), Initializer("normal", 5e-4)
        if self.initializer == "cce":
            return Initializer("uniform", width**-0.5), Initializer("uniform", 1.0)
        if self.initializer == "thinc":
            return Initializer("uniform", 0.1), Initializer("constant", loc=1.0)
        if self.append_weights is None:
            return Initializer.plain(spec, gain), Initializer("constant", loc=1.0)
        # The weights carry a full table's distribution into their own columns, rows of equal variance into the others.
        divisor = width**0.5 if self.append_weights == "inside" else 1.0
        return Initializer("uniform", gain * 3**0.5 / divisor), Initializer.plain(spec, divisor)

    def _rows(self, spec: FeatureSpec, j: int) -> Transform:
        if self.hash == "murmur":
            return Murmur(self.seed, j, self.num_buckets)
        salt = hashing.salt(self.seed, spec.table_name, "row", j)
        if self.combine == "concat":
            return Hash(salt, self.num_buckets, num_frequent=self.num_frequent)
        # A frequent id reads its own row of the first table, and none in the other row lookups.
        alone = self.num_frequent > 0 and j > 0
        offset = -self.num_frequent if self.separate and alone else 0
        return Hash(salt, self.num_buckets, 1, offset, self.num_frequent, alone)

    def _weight(self, spec: FeatureSpec, j: int) -> Weight:
        k, rows = self.num_hashes, self._weight_rows
        salt = hashing.salt(self.seed, spec.table_name, "weight", 0 if self.weights == "original" else j)
        return Weight("importance", Hash(salt, rows * k) if self.weights == "flat" else Hash(salt, rows, k, j))

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        k, chunk, concat = self.num_hashes, self._chunk(spec), self.combine == "concat"
        init, weight_init = self._inits(spec)
        names = [f"weight_{j}" for j in range(k)] if self.separate else ["weight"]
        private = [self.num_frequent if concat or j == 0 else 0 for j in range(len(names))]
        tables = [Table(n, self.num_buckets + p, chunk, init) for n, p in zip(names, private, strict=True)]
        row_lookups = [
            RowLookup(
                names[j % len(names)],
                self._rows(spec, j),
                column=j * chunk if concat else 0,
                scale=1 / k if self.combine == "mean" else 1.0,
                sign=hashing.salt(self.seed, spec.table_name, "sign", j) if self.sign else None,
                weight=self._weight(spec, j) if self.weights else None,
            )
            for j in range(k)
        ]
        if self.weights:
            tables.append(Table("importance", self._weight_rows * k, 1, weight_init))
        if self.append_weights:
            start, scale = k * chunk if concat else chunk, spec.embedding_dim**-0.5
            scale = scale if self.append_weights == "inside" else 1.0
            picks = [self._weight(spec, j) for j in range(k)]
            row_lookups += [RowLookup(w.table, w.transform, column=start + j, scale=scale) for j, w in enumerate(picks)]
        return LookupProgram(tuple(tables), tuple(row_lookups))

    @classmethod
    def max_size(cls, spec: FeatureSpec, **params: Any) -> int:
        config = cls.from_params({k: v for k, v in params.items() if k != "frequent_share"} | {"num_buckets": 1})
        chunks = config.num_hashes if config.combine == "concat" and not config.separate else 1
        return min(MAX_ROWS, max(1, spec.num_ids - config.num_frequent) * chunks)

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, frequent_share: float | None = None, **params: Any) -> Self:
        """The configuration of ``size`` rows, of which ``frequent_share`` (in [0, 1)) are for frequent ids."""
        options = cls.current_options(params) | {"num_buckets": size}
        share = options.pop("frequent_share", frequent_share)
        if share is not None:
            if not isinstance(share, (int, float)) or not 0 <= share < 1 or "num_frequent" in options:
                raise ConfigError(
                    f"`frequent_share` must be a number in [0, 1), and not beside `num_frequent`; got {share!r}"
                )
            options["num_frequent"] = int(size * share)
            options["num_buckets"] = size - options["num_frequent"]
        config = cls.from_params(options)
        if config.weights is None or config.num_weights is not None:
            return config
        pool = size * max(1, config._chunk(spec)) * config._tables
        most = MAX_ROWS // config.num_hashes
        return cls.from_params({**options, "num_weights": min(most, max(1, pool // config.num_hashes))})


class MultihashEmbedding(CompressedEmbedding):
    """Drop-in over several hashed rows per id; takes any int64 id.

    >>> import torch
    >>> emb = MultihashEmbedding(1_000_000, 16, num_buckets=50_000, num_hashes=2, weights="original")
    >>> emb(torch.tensor([1, 2**40])).shape
    torch.Size([2, 16])
    >>> MultihashEmbedding(1_000_000, 16, num_buckets=5000, preset="thinc", seed=7).config.hash
    'murmur'
    """

    config_cls = MultihashConfig

    def fit_(self, weight: Tensor, counts: Tensor | None = None) -> None:
        """As :meth:`CompressedEmbedding.fit_`; columns beyond ``embedding_dim`` have nothing to fit and raise."""
        if self.output_dim != self.embedding_dim:
            raise ConfigError(
                f"fitting needs an output of the table's width {self.embedding_dim}; got {self.output_dim} with "
                f"append_weights='outside' (feature {self.spec.name!r}); use 'inside' or None"
            )
        super().fit_(weight, counts)
