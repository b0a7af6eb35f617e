"""Settings of the searches: frozen dataclasses, checked as training settings are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from recsys_embed.errors import raise_faults, unknown_name
from recsys_embed.search.evolution import Evolution
from recsys_embed.search.layers import Granularity, Rows
from recsys_embed.search.retrain import Start


class Settings:
    """What the settings of all searches share."""

    def __post_init__(self) -> None:
        raise_faults(self._faults(), type(self).__name__)

    def _faults(self) -> list[str]:
        faults = []
        for key, hint in get_type_hints(type(self)).items():
            value = getattr(self, key)
            kinds = (hint,) if get_origin(hint) is tuple else get_args(hint) or (hint,)
            if all(isinstance(k, str) for k in kinds):
                if value not in kinds:
                    faults.append(f"`{key}` must be one of {', '.join(kinds)}; got {value!r}")
            elif value is None and type(None) in kinds:
                continue
            elif any(get_origin(k) is tuple for k in kinds):
                if not isinstance(value, tuple) or not all(type(v) in (int, float) and v >= 1 for v in value):
                    faults.append(f"`{key}` must be numbers of at least 1; got {value!r}")
            elif bool in kinds:
                if not isinstance(value, bool):
                    faults.append(f"`{key}` must be true or false; got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, (int, float) if float in kinds else int):
                faults.append(f"`{key}` must be {'a number' if float in kinds else 'an integer'}; got {value!r}")
            elif key not in _SIGNED and not value >= 0:
                faults.append(f"`{key}` must not be negative; got {value!r}")
        return faults

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from plain values; an unknown key is an error that names the nearest one.

        >>> OptembedSettings.from_dict({"generation": 3})
        Traceback (most recent call last):
        recsys_embed.errors.UnknownNameError: unknown setting of OptembedSettings 'generation'; ...
        """
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        for key in data:
            if key not in known:
                raise unknown_name(f"setting of {cls.__name__}", key, known)
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)  # type: ignore[call-overload]


_SIGNED = ("threshold_init",)


@dataclass(frozen=True)
class OptembedSettings(Settings):
    """OptEmbed: the supernet, the evolution and the retraining.

    Args:
        rows: thresholds per field, per row, or none (dimensions only).
        dims: search widths; False keeps all columns (rows only), and nothing is left to evolve.
        norm: of rows, 1 or 2.
        oov: pruned ids share a learned vector; otherwise they are zeros.
        threshold_lr: rate of the thresholds, plain SGD.
        pull: weight of the regulariser, the sum of exp(-t) over all thresholds.
        generations, population, mutations, crossovers, keep, parents, mutation_rate: see :class:`Evolution`.
        size_weight: candidates are compared by validation AUC less this times their share of the plain tables' bytes;
            0: AUC alone, as the paper.
        evaluation_rows: validation rows on which candidates are compared; None: all, 0: as many as make the evolution
            cost about one training.
        finalists: the best so many candidates are compared on all validation rows at the end, where fewer were used.
        recalibrate: batches from which batch-norm statistics are taken anew for every candidate; 0: not at all.
        retrain_from: start the retraining from the search's initial weights, or from the supernet's.

    Raises:
        ConfigError: a setting is out of range; all faults at once.
    """

    rows: Rows = "field"
    dims: bool = True
    norm: int = 1
    oov: bool = False
    threshold_lr: float = 0.1
    pull: float = 1e-4
    generations: int = 30
    population: int = 20
    mutations: int = 10
    crossovers: int = 10
    keep: int = 0
    parents: int = 15
    mutation_rate: float = 0.1
    size_weight: float = 0.0
    evaluation_rows: int | None = 0
    finalists: int = 10
    recalibrate: int = 0
    retrain_from: Start = "init"

    def __post_init__(self) -> None:
        super().__post_init__()
        faults = [] if self.norm in (1, 2) else [f"`norm` must be 1 or 2; got {self.norm!r}"]
        if self.rows == "none" and not self.dims:
            faults.append("nothing is left to search with rows 'none' and dims false")
        raise_faults(faults, type(self).__name__)
        _ = self.evolution

    @property
    def evolution(self) -> Evolution:
        """Its options."""
        return Evolution(**{f.name: getattr(self, f.name) for f in fields(Evolution)})


@dataclass(frozen=True)
class DnisSettings(Settings):
    """DNIS: warm start, bilevel search, pruning and retraining.

    Args:
        blocks: of ids by frequency.
        scope: blocks of all fields together ("global"), as in the paper, or of each field by itself ("field"): many
            more numbers to fit.
        balance: blocks of equal shares of the lookups ("mass") or of equally many ids ("count").
        held_out: share of the training rows, the last, on which the selection is fitted and which warm start and
            search do not train on, though blocks are by the counts of all; the retraining sees them. 0: on the
            validation rows, which then choose twice: the selection, and when to stop.
        search_epochs: passes over the training rows with alternating steps, after the warm start of `epochs`; None:
            half as many as the warm start may take, rounded up; 0: none, so that warm tables are pruned by size alone.
        alpha_lr: rate of the selection, plain SGD on normalised gradients.
        l1: weight of the selection's absolute values in the loss that it is fitted by.
        second_order: add the second-order term (a finite difference; reads and writes whole tables at every step).
        structure: keep whole columns of blocks, or single elements.
        importance: columns of blocks are ranked by the size of their elements, or by that times how often blocks are
            looked up.
        shared: columns that a block lacks are of a vector that all ids add; otherwise zeros.
        sparsity: share of the elements to prune, where no budget is given.
        retrain_from: start the retraining from the search's initial weights, or from the merged table.

    Raises:
        ConfigError: a setting is out of range; all faults at once.
    """

    blocks: int = 6
    scope: Literal["field", "global"] = "global"
    balance: Literal["mass", "count"] = "mass"
    held_out: float = 0.2
    search_epochs: int | None = None
    alpha_lr: float = 1e-2
    l1: float = 1e-5
    second_order: bool = False
    structure: Literal["blocks", "elements"] = "blocks"
    importance: Literal["size", "traffic"] = "size"
    shared: bool = False
    sparsity: float = 0.95
    retrain_from: Start = "supernet"

    def __post_init__(self) -> None:
        super().__post_init__()
        faults = [] if self.blocks >= 1 else [f"`blocks` must be at least 1; got {self.blocks}"]
        if not self.held_out < 1:
            faults.append(f"`held_out` must be in [0, 1); got {self.held_out!r}")
        if not self.sparsity < 1:
            faults.append(f"`sparsity` must be in [0, 1); got {self.sparsity!r}")
        raise_faults(faults, type(self).__name__)


@dataclass(frozen=True)
class PepSettings(Settings):
    """PEP: training with soft thresholds, snapshots, retraining.

    Args:
        granularity: what has a threshold of its own: everything together, a column, a field, a field's column, a row
            ("feature"), or an element ("feature_dimension").
        threshold_init: of the raw thresholds, whose sigmoid is subtracted from absolute values. The authors begin at
            -150, where no data gradient is felt in float32 and weight decay alone moves them, for about 1e5 steps.
        threshold_lr: their rate; None: such that decay alone takes them from a `threshold_init` below that to a sigmoid
            of 0.01 in a third of the steps.
        threshold_decay: L2 of the raw thresholds. Without it they never move.
        check_every: steps between counts of what is left, at most; fewer where thresholds rise so fast that the budget
            would be passed in between.
        snapshots: compressions at which what is left is written as a plan, besides the budget of the search.
        shared: pruned elements are of a vector that all ids of a field add; otherwise zeros.
        retrain_from: start the retraining from the true initial weights, or from the thresholded ones.

    Raises:
        ConfigError: a setting is out of range; all faults at once.
    """

    granularity: Granularity = "feature_dimension"
    threshold_init: float = -15.0
    threshold_lr: float | None = None
    threshold_decay: float = 1e-5
    check_every: int = 20
    snapshots: tuple[float, ...] = ()
    shared: bool = False
    retrain_from: Start = "init"

    def __post_init__(self) -> None:
        super().__post_init__()
        faults = []
        if not self.threshold_decay > 0:
            faults.append(
                "`threshold_decay` must be above 0: nothing else moves thresholds, so nothing would be pruned"
            )
        if self.check_every < 1:
            faults.append(f"`check_every` must be at least 1; got {self.check_every}")
        raise_faults(faults, type(self).__name__)
