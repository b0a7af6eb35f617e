"""Settings of the searches: frozen dataclasses, checked as training settings are."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from recsys_embed.search.evolution import Evolution
from recsys_embed.search.layers import Granularity, RowThresholds
from recsys_embed.search.retrain import Start
from recsys_embed.utils.settings import Settings, param


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
        size_weight: candidates are compared by validation AUC (minus RMSE of real labels, NDCG of retrieval
            models) less this times their share of the full tables' bytes; 0: by that alone, as the paper.
        evaluation_rows: validation rows on which candidates are compared; None: all, 0: as many as make the evolution
            cost about one training.
        finalists: the best so many candidates are compared on all validation rows at the end, where fewer were used.
        recalibrate: batches from which batch-norm statistics are taken anew for every candidate; 0: not at all.
        retrain_from: start the retraining from the search's initial weights, or from the supernet's.

    Raises:
        ConfigError: a setting is out of range; all faults at once.
    """

    rows: RowThresholds = "field"
    dims: bool = True
    norm: Literal[1, 2] = 1
    oov: bool = False
    threshold_lr: float = param(0.1, low=0)
    pull: float = param(1e-4, low=0)
    generations: int = param(30, low=1)
    population: int = param(20, low=2)
    mutations: int = param(10, low=0)
    crossovers: int = param(10, low=0)
    keep: int = param(0, low=0)
    parents: int = param(15, low=2)
    mutation_rate: float = param(0.1, above=0, high=1)
    size_weight: float = param(0.0, low=0)
    evaluation_rows: int | None = param(0, low=0)
    finalists: int = param(10, low=0)
    recalibrate: int = param(0, low=0)
    retrain_from: Start = "init"

    def conflicts(self) -> list[str]:
        faults = self.evolution.conflicts()
        if self.rows == "none" and not self.dims:
            faults.append("nothing is left to search with rows 'none' and dims false")
        return faults

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

    blocks: int = param(6, low=1)
    scope: Literal["field", "global"] = "global"
    balance: Literal["mass", "count"] = "mass"
    held_out: float = param(0.2, low=0, below=1)
    search_epochs: int | None = param(None, low=0)
    alpha_lr: float = param(1e-2, low=0)
    l1: float = param(1e-5, low=0)
    second_order: bool = False
    structure: Literal["blocks", "elements"] = "blocks"
    importance: Literal["size", "traffic"] = "size"
    shared: bool = False
    sparsity: float = param(0.95, low=0, below=1)
    retrain_from: Start = "supernet"


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
    threshold_lr: float | None = param(None, low=0)
    # Nothing else moves thresholds: without decay nothing would be pruned.
    threshold_decay: float = param(1e-5, above=0)
    check_every: int = param(20, low=1)
    snapshots: tuple[float, ...] = param((), low=1)
    shared: bool = False
    retrain_from: Start = "init"
