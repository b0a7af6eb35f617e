"""OptEmbed end to end: train a supernet, evolve the widths on it, extract a plan, retrain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from recsys_embed.errors import ConfigError
from recsys_embed.optim import Adam
from recsys_embed.plan import Plan
from recsys_embed.search.base import Search
from recsys_embed.search.checks import need_validation
from recsys_embed.search.evaluate import CandidateEvaluator
from recsys_embed.search.evolution import Candidate, WidthSpace, evolve, ranked
from recsys_embed.search.extract import choose, chunks, full_bytes, make_plan, widths_text
from recsys_embed.search.layers import OptembedLayer, table_numbers
from recsys_embed.search.registry import register_search
from recsys_embed.search.retrain import StartWeights
from recsys_embed.search.settings import OptembedSettings
from recsys_embed.search.supernet import OptembedTrainer, Supernet
from recsys_embed.train.build import make_optimizer
from recsys_embed.train.stop_request import StopRequest

_LEAST_ROWS = 2048


@register_search
@dataclass
class OptembedSearch(Search):
    """One search; see :class:`Search` for what all have in common.

    >>> from tempfile import TemporaryDirectory
    >>> from recsys_embed.data import make_synthetic, open_dataset
    >>> from recsys_embed.search import OptembedSearch, OptembedSettings, run_search
    >>> from recsys_embed.train import TrainConfig
    >>> with TemporaryDirectory() as folder:
    ...     _ = make_synthetic(folder, rows=3000)
    ...     config = TrainConfig(model="dnn", model_args={"hidden": [8]}, embedding_dim=4, embedding_weight_decay=1e-3)
    ...     found = run_search(OptembedSearch, config, open_dataset(folder), OptembedSettings(generations=2))
    >>> {found.plan[name].method for name in found.plan} <= {"optembed", "full"}
    True
    """

    settings: OptembedSettings

    method = "optembed"
    summary = "OptEmbed: train a supernet whose rare rows die, evolve the widths of fields on it, retrain what is left."
    settings_cls = OptembedSettings
    redo = ("evolution",)

    def check(self) -> None:
        """Refuse settings that would prune nothing."""
        c, rule = self.config, make_optimizer(self.config)
        # Adam alone divides a decay by its own size. Under SGD it stays a tiny share of a weight, and Adagrad divides
        # by all gradients that a row ever had.
        dies = c.embedding_weight_decay > 0
        if rule is not None:
            dies = type(rule) is Adam and rule.rows == "all" and rule.weight_decay > 0
        if self.settings.rows != "none" and not dies:
            got = f"'dense_adam' with {c.embedding_weight_decay:g}" if rule is None else repr(rule)
            raise ConfigError(
                "rows are pruned because weight decay shrinks all of them by a step of Adam at every step; "
                "expected `embedding_optimizer` 'adam' or 'dense_adam' and `embedding_weight_decay` above 0, without "
                f"other `rows` in `embedding_optimizer_args`; got {got}. Set these, or search dimensions only (rows "
                "'none')"
            )
        need_validation(self.data, self.config)

    def search(self) -> Plan:
        """Supernet, evolution, extraction."""
        net = self.net
        kept = kept_rows(net)
        space = self._space(kept)
        widths = self._evolve(net, space) if self.settings.dims else (space.most,) * space.fields
        return self._extract(kept, widths)

    def start_weights(self) -> StartWeights:
        """The initial weights, or those of the supernet."""
        if self.settings.retrain_from == "init":
            return {**super().start_weights(), "shared": self._oov(self._layer())}
        tables = {name: self.net.table(name).detach() for name in self.first_readers.names}
        return {**self.trained_weights(self.net, tables), "shared": self._oov(cast("OptembedLayer", self.net.layer))}

    def _oov(self, layer: OptembedLayer) -> dict[str, Tensor] | None:
        """Vectors of pruned ids, by feature."""
        return None if layer.oov is None else dict(zip(self.first_readers.names, layer.oov.detach(), strict=True))

    # -- supernet -------------------------------------------------------------------------------------------------

    def build(self) -> Supernet:
        """The supernet, untrained."""
        return Supernet(self.full_model(), self._layer().to(self.device or "cpu"))

    def _layer(self) -> OptembedLayer:
        """Its layer, a function of the seed."""
        s, tables = self.settings, self.first_readers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return OptembedLayer(
                len(tables), self.config.embedding_dim, rows=s.rows, dims=s.dims, norm=s.norm, oov=s.oov,
                sizes=[f.num_ids for f in tables], field_of=table_numbers(self.schema),
            )  # fmt: skip

    @cached_property
    def net(self) -> Supernet:
        """The supernet, trained."""
        net = self.build()
        trainer = self.trainer(OptembedTrainer, net, "supernet",
                               threshold_lr=self.settings.threshold_lr, pull=self.settings.pull)  # fmt: skip
        self.run_stage("supernet", trainer)
        net.catch_up_()
        return net

    # -- evolution ------------------------------------------------------------------------------------------------

    def _space(self, kept: Sequence[Tensor]) -> WidthSpace:
        """Widths, and what they cost where the rows ``kept`` are."""
        costs, fixed, oov = [], 0, "oov" if self.settings.oov else "zero"
        for spec, rows in zip(self.first_readers, kept, strict=True):
            config, _ = choose(spec, rows, 1, oov)
            footprint = config.footprint(spec)
            costs.append(footprint.weights)
            fixed += footprint.index
        return WidthSpace(len(self.first_readers), self.config.embedding_dim, tuple(costs), fixed, self.vector_budget)

    def _rows(self) -> int | None:
        """Validation rows on which candidates are compared."""
        s = self.settings
        if s.evaluation_rows is None or s.evaluation_rows > 0:
            return s.evaluation_rows
        # Forward alone is a third of a training step's work; the candidates together get one training's worth.
        work = 3 * (self.rows("train") or 0) * self.config.epochs
        candidates = s.population + (s.generations - 1) * (s.mutations + s.crossovers)
        return max(_LEAST_ROWS, work // max(1, candidates)) if work else None

    @property
    def _logits(self) -> Path | None:
        """What candidates that are being compared have come to; gone once the evolution is over."""
        return self.folder.inside("evolution.pt")

    def _evolve(self, net: Supernet, space: WidthSpace) -> Candidate:
        best = (self.folder.get("evolution") or {}).get("best") or self._fittest(net, space)
        if self._logits is not None:
            self._logits.unlink(missing_ok=True)
        return tuple(best)

    def _fittest(self, net: Supernet, space: WidthSpace) -> Candidate:
        rows, s = self._rows(), self.settings
        whole = full_bytes(self.schema)
        saved = self.folder.get("evolution") or {"generation": 0, "ends": [], "scores": []}
        ends = list(saved["ends"])
        scores = {tuple(c): score for c, score in saved["scores"]}
        with self.folder.clock("evolution"), StopRequest() as stop:
            options: dict[str, Any] = {"recalibrate": s.recalibrate, "seed": self.config.seed, "device": self.device}
            options |= {"batch_size": self.config.eval_batch_size, "stop": stop, "keep": self._logits}
            evaluator = CandidateEvaluator(net, self.data, self.config, rows=rows, **options)

            def score(many: Sequence[Candidate], judge: CandidateEvaluator = evaluator) -> list[float]:
                found = zip(many, judge.scores(many), strict=True)
                return [value - s.size_weight * space.bytes(c) / whole for c, value in found]

            def done(number: int, known: Mapping[Candidate, float]) -> None:
                ends.append(len(known))
                found = [[list(c), v] for c, v in known.items()]
                self.folder.put("evolution", {"generation": number + 1, "ends": ends, "scores": found})
                self.progress("evolution", number + 1, s.generations, f"best {max(known.values()):.4f}")

            scores = evolve(
                s.evolution, space, score, seed=self.config.seed, scores=scores, generation=saved["generation"],
                on_generation=done,
            )  # fmt: skip
            best = ranked(scores)
            total = self.rows("valid")
            if rows is not None and (total is None or rows < total) and s.finalists > 1:
                final = best[: s.finalists]
                judge = CandidateEvaluator(net, self.data, self.config, rows=None, **options)
                best = ranked(dict(zip(final, score(final, judge), strict=True)))
            self.folder.put("evolution", {**self.folder.get("evolution"), "best": list(best[0])})
        return best[0]

    # -- extraction -----------------------------------------------------------------------------------------------

    def _extract(self, kept: Sequence[Tensor], widths: Sequence[int]) -> Plan:
        oov = "oov" if self.settings.oov else "zero"
        chosen = {
            spec.name: choose(spec, rows, width, oov)
            for spec, rows, width in zip(self.first_readers, kept, widths, strict=True)
        }
        return make_plan(self.schema, chosen, widths_text(self.first_readers, kept, widths))


@torch.no_grad()
def kept_rows(net: Supernet) -> list[Tensor]:
    """Per table, the rows whose norm exceeds their threshold: bool ``[num_ids]`` on the CPU."""
    layer = net.layer
    if not isinstance(layer, OptembedLayer):
        raise ConfigError(f"rows are pruned by an OptembedLayer; got {type(layer).__name__}")
    out = []
    for field, spec in enumerate(net.vectors.schema.first_readers):
        if layer.thresholds is None:
            out.append(torch.ones(spec.num_ids, dtype=torch.bool))
            continue
        parts = []
        for start, rows in chunks(net.table(spec.name)):
            at = layer.thresholds[field]
            if layer.rows == "row":
                first = int(layer.get_buffer("starts")[field]) + start
                at = layer.thresholds[first : first + len(rows)]
            parts.append(layer.keep(rows, at).bool().cpu())
        out.append(torch.cat(parts))
    return out
