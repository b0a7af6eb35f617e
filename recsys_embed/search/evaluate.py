"""Joint evaluation of candidates on a frozen supernet: data is read and embeddings are looked up once for all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from recsys_embed.data.batch import Batch, as_batch
from recsys_embed.data.data_source import BatchSource
from recsys_embed.errors import ConfigError, DataError
from recsys_embed.models import RetrievalModel
from recsys_embed.search.batch_lookups import BatchLookups
from recsys_embed.search.evolution import Candidate
from recsys_embed.search.layers import OptembedLayer
from recsys_embed.search.supernet import Supernet, batch_norms
from recsys_embed.train.checkpoint import CheckpointTimer, load_checkpoint, save_checkpoint
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.evaluation import evaluate
from recsys_embed.train.losses import LOSSES
from recsys_embed.train.metrics import BinaryMetrics, Metrics, RealMetrics
from recsys_embed.train.quality import quality_of
from recsys_embed.train.retrieval_metrics import Seen
from recsys_embed.train.stop_request import Interrupted, StopRequest

_HELD = ("running_mean", "running_var", "momentum", "num_batches_tracked")
Statistics = list[tuple[Any, ...]]
"""What each batch-norm module holds, in the order of the modules."""


@dataclass
class _Pass:
    """An evaluation: what it has found, and the batch and the candidate that come next."""

    sums: list[BinaryMetrics | RealMetrics]
    batch: int = 0
    candidate: int = 0


class CandidateEvaluator:
    """Validation metrics of widths per field, with the supernet's weights and its pruned rows as they are.

    Args:
        net: a supernet with an :class:`OptembedLayer`, trained; it is put into evaluation mode.
        data: the data set.
        config: settings that the supernet was trained by: their loss, and how lists of items are told of.
        split: where candidates are evaluated.
        rows: evaluate on the first so many rows only; None: all.
        recalibrate: batches of the training split from which each candidate's batch-norm statistics are taken anew,
            since those of the supernet are of random widths; 0 keeps the supernet's.
        batch_size: rows at once.
        seed: of the training batches.
        stop: ends an evaluation early, by :class:`Interrupted`.
        keep: file with the logits of the rows so far, so that an evaluation that was stopped goes on when the same
            candidates are asked for again, once their statistics are taken anew; None: it begins anew.

    Raises:
        CheckpointError: that file is damaged or cannot be written.
        ConfigError: the split has no rows, or those of one class only, so that no candidate is better than another.

    >>> from tempfile import TemporaryDirectory
    >>> from recsys_embed import Plan
    >>> from recsys_embed.data import make_synthetic, open_dataset
    >>> from recsys_embed.models import build_model
    >>> with TemporaryDirectory() as folder:
    ...     _ = make_synthetic(folder, rows=1000)
    ...     data = open_dataset(folder)
    ...     schema = data.schema(4).with_init("normal:1")
    ...     model = build_model("dnn", schema, Plan.full(schema), num_dense=data.num_dense, hidden=(8,))
    ...     evaluator = CandidateEvaluator(Supernet(model, OptembedLayer(len(schema), 4)), data, rows=64)
    ...     narrow, wide = evaluator.metrics([(1,) * len(schema), (4,) * len(schema)])
    >>> narrow.samples, narrow.auc != wide.auc
    (64, True)
    """

    def __init__(
        self,
        net: Supernet,
        data: BatchSource,
        config: TrainConfig | None = None,
        *,
        split: str = "valid",
        rows: int | None = None,
        recalibrate: int = 0,
        batch_size: int = 4096,
        seed: int = 0,
        device: torch.device | str | None = None,
        stop: StopRequest | None = None,
        keep: Path | None = None,
    ) -> None:
        if split not in data.splits:
            raise ConfigError(
                f"a search needs a split {split!r} to compare candidates on; got {', '.join(data.splits)}"
            )
        self.net, self.data, self.split, self.rows = net.eval(), data, split, rows
        self.config = config or TrainConfig(model=net.model.key)
        self.quality = quality_of(self.config)
        # What the users of splits have seen, of retrieval models.
        self._seen: Seen = {}
        self.recalibrate, self.batch_size, self.seed, self.device, self.stop = (
            recalibrate, batch_size, seed, device, stop
        )  # fmt: skip
        self.keep, self._cadence = keep, CheckpointTimer()
        self.layer = cast("OptembedLayer", net.layer)
        self.norms = batch_norms(net)
        if recalibrate and self.norms and isinstance(net.model, RetrievalModel):
            raise ConfigError(
                "`recalibrate` is for models that score rows; set it to 0 (search.recalibrate=0) with retrieval "
                f"models, such as {net.model.key!r}"
            )

    def _batches(self, start: int) -> Iterator[Batch]:
        """Batches of the first ``rows`` rows of the split, from the one with index ``start`` on."""
        left = (self.rows if self.rows is not None else float("inf")) - start * self.batch_size
        options: dict[str, Any] = {"shuffle": False, "device": self.device, "start_batch": start}
        yield from _first(self.data.batches(self.split, self.batch_size, **options), left)

    def _run(
        self,
        batch: Any,
        columns: Sequence[Tensor],
        before: Callable[[int], None] = lambda number: None,
        after: Callable[[int, Tensor], None] = lambda number, logits: None,
        first: int = 0,
    ) -> None:
        """Logits of a batch for candidates from ``first`` on, handed to ``after(number, logits)``."""
        net = self.net
        inputs = batch.inputs if isinstance(batch, Batch) else batch.ids
        if not net.takes_matrix(inputs):
            once = BatchLookups(net)
            for number in range(first, len(columns)):
                self._refuse_to_go_on()
                before(number)
                with once.with_columns(columns[number]):
                    after(number, net(batch.dense, inputs))
            return
        found = {key: c for key, c in net.collections().items() if c is not net.vectors}
        # Pruned rows are the same for all candidates; only columns differ.
        net.stand_in = lambda out: self.layer.prune(out, batch.ids)
        looked_up = {"embedding": net.vectors(batch.ids), **{key: c(batch.ids) for key, c in found.items()}}
        with net.replay(looked_up):
            for number in range(first, len(columns)):
                self._refuse_to_go_on()
                net.stand_in = columns[number].mul
                before(number)
                after(number, net(batch.dense, batch.ids))
        net.stand_in = None

    def _refuse_to_go_on(self) -> None:
        if self.stop is not None and self.stop.requested:
            raise Interrupted("stopped while candidates were evaluated; run the same command again to go on")

    @torch.no_grad()
    def metrics(self, candidates: Sequence[Candidate]) -> list[Metrics]:
        """Metrics of every candidate; one pass over the rows, whatever their number."""
        if not candidates:
            return []
        if isinstance(self.net.model, RetrievalModel):
            return [self._of_items(self.net.model, candidate) for candidate in candidates]
        device = self.net.table(self.net.vectors.schema.names[0]).device
        columns = [self.layer.columns(torch.tensor(c, device=device)) for c in candidates]
        statistics = self._statistics(columns) if self.recalibrate and self.norms else None
        kept = self._present()
        seen = self._known(candidates)
        try:
            for batch in self._batches(seen.batch):

                def before(number: int) -> None:
                    if statistics is not None:
                        self._set(statistics[number])

                def after(number: int, logits: Tensor, label: Tensor = batch.label) -> None:
                    seen.sums[number].update(logits, label)
                    seen.candidate = number + 1
                    if self._cadence.due():
                        self._note(candidates, seen)

                self._run(batch, columns, before, after, seen.candidate)
                seen.batch, seen.candidate = seen.batch + 1, 0
        except Interrupted:
            self._note(candidates, seen)
            raise
        finally:
            self._set(kept)
            self.net.stand_in = None
        found = [s.compute() for s in seen.sums]
        if self.quality.key == "auc" and not 0 < found[0].positives < found[0].samples:
            raise DataError(
                f"the {found[0].samples} rows of split {self.split!r} that candidates are compared on are of one "
                "class; use more of them"
            )
        return found

    def _of_items(self, model: RetrievalModel, candidate: Candidate) -> Metrics:
        """Metrics of one candidate by a pass of its own: every user's items are ranked anew."""
        config, data = self.config, self.data
        device = model.in_catalogue.device
        self.layer.widths = torch.tensor(candidate, device=device)
        try:
            found = evaluate(
                model, data if self.rows is None else FirstRows(data, self.split, self.rows), self.split,
                batch_size=self.batch_size, device=self.device, stop=self.stop, loss=config.loss, top_k=config.top_k,
                exclude_seen=config.exclude_seen, seen=self._seen,
            )  # fmt: skip
        finally:
            self.layer.widths = None
        if found is None:
            self._refuse_to_go_on()
            raise DataError(f"the split {self.split!r} has no rows")
        return found

    def _asked(self, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """What the logits in ``keep`` are of."""
        return {
            "candidates": [list(c) for c in candidates],
            "split": self.split,
            "rows": self.rows,
            "recalibrate": self.recalibrate,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def _note(self, candidates: Sequence[Candidate], seen: _Pass) -> None:
        if self.keep is not None:
            with self._cadence.writing():
                sums = [s.tensors() for s in seen.sums]
                place = {"batch": seen.batch, "candidate": seen.candidate}
                save_checkpoint(self.keep, self._asked(candidates), sums=sums, **place)

    def _known(self, candidates: Sequence[Candidate]) -> _Pass:
        """The evaluation of these candidates that was stopped, or a new one."""
        seen = _Pass([LOSSES[self.config.loss].metrics() for _ in candidates])
        saved = load_checkpoint(self.keep) if self.keep is not None and self.keep.exists() else {}
        if saved.get("config") == self._asked(candidates):
            seen.batch, seen.candidate = saved["batch"], saved["candidate"]
            for known, tensors in zip(seen.sums, saved["sums"], strict=True):
                known.add(*tensors)
        return seen

    def auc(self, candidates: Sequence[Candidate]) -> list[float]:
        """AUC of every candidate."""
        return [m.auc for m in self.metrics(candidates)]

    def scores(self, candidates: Sequence[Candidate]) -> list[float]:
        """The quality of every candidate, larger is better: AUC, minus RMSE of real labels, or NDCG of items."""
        return [self.quality.score(self.quality.of(m)) for m in self.metrics(candidates)]

    def _present(self) -> Statistics:
        return [tuple(getattr(m, name) for name in _HELD) for m in self.norms]

    def _set(self, statistics: Statistics) -> None:
        for module, values in zip(self.norms, statistics, strict=True):
            for name, value in zip(_HELD, values, strict=True):
                setattr(module, name, value)

    def _statistics(self, columns: Sequence[Tensor]) -> list[Statistics]:
        """Batch-norm statistics of every candidate: means over the same training batches, which are read once."""
        found: list[Statistics] = []
        kept = self._present()
        for _ in columns:
            fresh = [
                (torch.zeros_like(mean), torch.ones_like(var), None, torch.zeros_like(n)) for mean, var, _, n in kept
            ]
            found.append(fresh)

        def keep(number: int, logits: Tensor) -> None:
            found[number] = self._present()

        batches = self.data.batches("train", self.batch_size, shuffle=True, seed=self.seed, device=self.device)
        try:
            for module in self.norms:
                module.train()
            for batch in islice(iter(batches), self.recalibrate):
                if len(batch.label) < 2:
                    continue  # one row has no variance
                self._run(batch, columns, lambda number: self._set(found[number]), keep)
        finally:
            for module in self.norms:
                module.eval()
            self._set(kept)
            self.net.stand_in = None
        return [[(mean, var, momentum, n) for (mean, var, _, n), (_, _, momentum, _) in zip(s, kept, strict=True)]
                for s in found]  # fmt: skip


def _first(batches: Iterable[Batch], rows: float) -> Iterator[Batch]:
    """The batches of the first rows; the last one may be cut."""
    for batch in batches:
        if rows <= 0:
            return
        n = int(min(rows, len(batch.label)))
        rows -= n
        yield batch if n == len(batch.label) else as_batch(batch).map(lambda part, n=n: part[:n])  # type: ignore[misc]


class FirstRows:
    """A data set with the first rows of one split in place of all of them."""

    def __init__(self, data: BatchSource, split: str, rows: int) -> None:
        self._data, self._split, self._rows = data, split, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    @property
    def splits(self) -> Collection[str]:
        """Those of the data set."""
        return self._data.splits

    def batches(self, split: str, *args: Any, **options: Any) -> Any:
        """Those of the data set."""
        found = self._data.batches(split, *args, **options)
        return list(_first(found, self._rows)) if split == self._split else found
