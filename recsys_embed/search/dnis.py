"""DNIS end to end: warm start, bilevel search, pruning of the merged tables, retraining."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from recsys_embed.data.data_source import HELD_OUT, DataSource
from recsys_embed.errors import ConfigError
from recsys_embed.plan import Plan
from recsys_embed.search.base import Search
from recsys_embed.search.bilevel import BilevelTrainer
from recsys_embed.search.checks import need_rows, need_validation
from recsys_embed.search.extract import chunks, make_plan
from recsys_embed.search.frequency_blocks import block_maps, block_sizes, order_of
from recsys_embed.search.layers import DnisLayer, table_numbers
from recsys_embed.search.pruning import FieldBlocks, choose_elements, importance_of, keep_columns, keep_elements
from recsys_embed.search.registry import register_search
from recsys_embed.search.retrain import StartWeights
from recsys_embed.search.settings import DnisSettings
from recsys_embed.search.supernet import Supernet, as_model
from recsys_embed.train.loop import Trainer


@register_search
@dataclass
class DnisSearch(Search):
    """One search; see :class:`Search` for what all have in common.

    >>> from tempfile import TemporaryDirectory
    >>> from recsys_embed.data import make_synthetic, open_dataset
    >>> from recsys_embed.search import DnisSearch, DnisSettings, run_search
    >>> from recsys_embed.train import TrainConfig
    >>> with TemporaryDirectory() as folder:
    ...     _ = make_synthetic(folder, rows=3000)
    ...     config = TrainConfig(model="dnn", model_args={"hidden": [8]}, embedding_dim=4, ratio=10)
    ...     found = run_search(DnisSearch, config, open_dataset(folder), DnisSettings(blocks=2))
    >>> {found.plan[name].method for name in found.plan} <= {"dnis", "full"}
    True
    """

    settings: DnisSettings

    method = "dnis"
    summary = "DNIS: learn which columns blocks of frequent and rare ids need, prune the merged table, train on."
    settings_cls = DnisSettings
    redo = ()
    stages = ("warm", "search", "retrain")

    def check(self) -> None:
        """Refuse data without rows to choose by."""
        need_validation(self.data, self.config)
        if not self.held_out:
            return
        if not hasattr(self.data, "held_out"):
            raise ConfigError(
                f"`held_out` needs data with a method held_out(share), as data folders have; got "
                f"{type(self.data).__name__}. With held_out=0 the selection is fitted on the validation rows"
            )
        otherwise = "or set it to 0, which fits the selection on the validation rows"
        need_rows(self.seen, self.config, HELD_OUT, "fit the selection on", f"Raise `held_out`, {otherwise}")
        need_rows(self.seen, self.config, "train", "train on", f"Lower `held_out`, {otherwise}")

    @property
    def held_out(self) -> float:
        """Share of the training rows that the selection is fitted on, where it is fitted at all."""
        return self.settings.held_out if self.settings.search_epochs != 0 else 0.0

    @cached_property
    def seen(self) -> DataSource:
        """The data as warm start and search see it."""
        return self.data.held_out(self.held_out) if self.held_out else self.data

    @cached_property
    def sizes(self) -> list[list[int]]:
        """Ids of each block of each feature."""
        s = self.settings
        return block_sizes(self.counts, s.blocks, s.scope, s.balance)

    def build(self) -> Supernet:
        """The supernet, untrained."""
        layer = DnisLayer(block_maps(self.counts, self.sizes, self.settings.scope), self.config.embedding_dim,
                          table_numbers(self.schema))  # fmt: skip
        layer.alpha.requires_grad_(False)
        return Supernet(self.full_model(), layer.to(self.device or "cpu"))

    @cached_property
    def net(self) -> Supernet:
        """The supernet, searched; its selection is multiplied into its tables."""
        s, net = self.settings, self.build()
        self.run_stage("warm", self.trainer(Trainer, as_model(net), "warm", data=self.seen))
        epochs = -(-self.config.epochs // 2) if s.search_epochs is None else s.search_epochs
        if epochs:
            # The selection moves for as long as the search lasts, so what counts is where it ends.
            config = self.config.replace(epochs=epochs, patience=None, keep_best=False)
            options: dict[str, Any] = {"data": self.seen, "upper": HELD_OUT if self.held_out else "valid"}
            options |= {"alpha_lr": s.alpha_lr, "l1": s.l1, "second_order": s.second_order}
            self.run_stage("search", self.trainer(BilevelTrainer, net, "search", config, **options))
        self.folder.put("selection", {"alpha": cast("DnisLayer", net.layer).alpha.tolist()})
        self._merge(net)
        return net

    @torch.no_grad()
    def _merge(self, net: Supernet) -> None:
        """In place, since there may be no room for a copy of the tables."""
        layer = cast("DnisLayer", net.layer)
        for field, name in enumerate(self.first_readers.names):
            blocks = layer.blocks_of(field)
            for start, rows in chunks(net.table(name)):
                rows.mul_(layer.alpha[blocks[start : start + len(rows)]])
        layer.alpha.fill_(1.0)

    @cached_property
    def tables(self) -> dict[str, Tensor]:
        """The tables of the searched supernet, by the first feature that reads each: ``[num_ids, D]`` each."""
        return {name: self.net.table(name).detach() for name in self.first_readers.names}

    def search(self) -> Plan:
        """Warm start, alternating steps, pruning."""
        s, schema = self.settings, self.first_readers
        pruned = "oov" if s.shared else "zero"
        limits: dict[str, Any] = {"budget": self.vector_budget, "sparsity": s.sparsity}
        if s.structure == "elements":
            masks = keep_elements(schema, list(self.tables.values()), pruned, **limits)
            chosen = {spec.name: choose_elements(spec, k, pruned) for spec, k in zip(schema, masks, strict=True)}
            reasons = {spec.name: f"kept {int(k.sum()):,} of {k.numel():,} elements"
                       for spec, k in zip(schema, masks, strict=True)}  # fmt: skip
            return make_plan(self.schema, chosen, reasons)
        fields = [self._blocks(f) for f in range(len(schema))]
        chosen = keep_columns(fields, pruned, **limits)
        return make_plan(self.schema, chosen, {f.spec.name: _words(f, chosen[f.spec.name][0]) for f in fields})

    def _blocks(self, field: int) -> FieldBlocks:
        spec, counts = self.first_readers.features[field], self.counts[field]
        order = order_of(counts)
        sizes = [n for n in self.sizes[field] if n]
        ranks = torch.arange(spec.num_ids) if order is None else order
        members = list(ranks.split(sizes))
        importance = importance_of(self.tables[spec.name], members)
        if self.settings.importance == "traffic":
            share = torch.stack([counts[m].double().mean() for m in members])
            importance = importance * share.unsqueeze(1).sqrt()
        return FieldBlocks(spec, sizes, members, order, importance)

    def start_weights(self) -> StartWeights:
        """The initial weights, or the merged tables beside the network as it was trained."""
        if self.settings.retrain_from == "init":
            return super().start_weights()
        return self.trained_weights(self.net, self.tables)


def _words(field: FieldBlocks, config: Any) -> str:
    """What is kept of a feature's blocks."""
    if config.method == "full":
        return "kept whole"
    sizes = [*(config.blocks or ())]
    sizes.append(field.spec.num_ids - sum(sizes))
    parts = [f"{bits.bit_count()} columns of {n:,} ids" for bits, n in zip(config.columns, sizes, strict=True)]
    return "kept " + ", ".join(parts)
