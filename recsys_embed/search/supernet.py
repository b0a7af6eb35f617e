"""A click model whose vectors pass through a layer on their way to the network: what searches train and evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.collection.bags import Bags, to_bags
from recsys_embed.collection.unpooled_bags import UnpooledBags
from recsys_embed.core.footprint import Footprint
from recsys_embed.data.data_source import BatchSource
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.native.masks import Masking
from recsys_embed.kernels.places import absent_ids
from recsys_embed.models import RetrievalModel
from recsys_embed.models.base import CTRModel
from recsys_embed.search.layers import OptembedLayer
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.loop import Trainer
from recsys_embed.utils.types import BagIds, Ids

LAYER = "search_layer"
"""Name of the layer in a retrieval model."""


class MasksIds(Protocol):
    """A layer that masks the vectors of ids before they are pooled, see :meth:`OptembedLayer.mask_ids`."""

    def mask_ids(self, vectors: Tensor, ids: Tensor, feature: Tensor | int, row: Tensor | None) -> Tensor: ...


class Supernet(nn.Module):
    """A CTR model over full tables with a search layer between its collection and its network.

    It trains, saves and evaluates like the model, which needs no changes; its state dict includes the layer's.

    Args:
        model: built with a full plan of one width.
        layer: called with vectors ``[B, F, D]`` and ids ``[B, F]``. Its ``mask_ids`` gets the vectors of lists and
            sequences, and of features that share tables, before they are pooled.

    Raises:
        ConfigError: the model has no vectors, or they are of several widths, or not full tables.
    """

    def __init__(self, model: CTRModel, layer: nn.Module) -> None:
        super().__init__()
        vectors = model.vectors
        methods = {vectors.plan[name].method for name in vectors.plan}
        if vectors.output_dim is None or methods != {"full"}:
            raise ConfigError(
                f"a search starts from full tables of one width; got methods {sorted(methods)}, width "
                f"{vectors.output_dim}"
            )
        self.model, self.layer = model, layer
        # Applied to the vectors in place of the layer while candidates are evaluated, see `replay`.
        self.stand_in: Callable[[Tensor], Tensor] | None = None
        # A layer that kernels support is fused into the lookup of one id per feature; others run on its output.
        self._fused = hasattr(layer, "mask_parameters")
        self._unpooled: UnpooledBags | None = None
        # Ids of each feature in each row of the batch that is at work, where features have any number of them.
        self._lengths: Tensor | None = None
        vectors.__dict__["forward"], vectors.__dict__["lookup"] = self._look_up, self._look_up_ids
        if isinstance(model, RetrievalModel):
            _hold(model, layer)

    def takes_matrix(self, ids: Ids) -> bool:
        """Whether ids are one per feature and row, of features with a table each, so that fields are features."""
        schema = self.vectors.schema
        return isinstance(ids, Tensor) and ids.dim() == 2 and schema.first_readers is schema

    def _look_up(self, ids: Ids, offsets: Tensor | None = None, *rest: Any, **options: Any) -> Tensor:
        """What the collection's lookup gives, masked: it stands in its place."""
        vectors, plain = self.vectors, type(self.vectors).forward
        if self.stand_in is not None:
            return self.stand_in(plain(vectors, ids, offsets, *rest, **options))
        if offsets is None and self.takes_matrix(ids):
            if self._fused:
                return plain(vectors, ids, offsets, *rest, **options, mask=cast("Masking", self.layer))
            masked: Tensor = self.layer(plain(vectors, ids, offsets, *rest, **options), ids)
            return masked
        return self._of_bags(self._bags(ids, offsets))

    def _bags(self, ids: Ids, offsets: Tensor | None) -> Bags:
        vectors = self.vectors
        if offsets is None and isinstance(ids, Tensor) and ids.dim() == 2:
            ids, offsets = ids.T.reshape(-1), torch.arange(ids.numel() + 1, device=ids.device)
        given = vectors.bundle.given(ids, vectors) if isinstance(ids, Mapping) else ids
        return to_bags(vectors.schema, given, offsets, None)

    def _of_bags(self, bags: Bags) -> Tensor:
        """Pooled vectors ``[B, F, D]`` of masked rows."""
        unpooled = self._rows()
        entries = unpooled.entries(bags)
        vectors = unpooled.vectors(entries.ids, entries.feature)
        with self._drawn(bags.batch, None):
            masked = cast("MasksIds", self.layer).mask_ids(vectors, entries.ids, entries.feature, entries.row)
        return unpooled.pool(masked, entries, bags)

    def _look_up_ids(self, feature: str, ids: Tensor) -> Tensor:
        """What the collection gives for ids of one feature, masked: it stands in its place."""
        vectors = self.vectors
        out = type(vectors).lookup(vectors, feature, ids)
        number = vectors.bundle.position(feature)
        known = vectors.bundle.unseen.resolve(ids.reshape(-1).long(), number)
        absent = absent_ids(known)
        known = known if absent is None else known.masked_fill(absent, 0)
        rows = None
        if self._lengths is not None and int(self._lengths[number].sum()) == len(known):
            # All of the batch, in order: each has the widths of its row.
            count = self._lengths.shape[1]
            rows = torch.repeat_interleave(torch.arange(count, device=known.device), self._lengths[number])
        masked: Tensor = cast("MasksIds", self.layer).mask_ids(out.reshape(len(known), -1), known, number, rows)
        masked = masked if absent is None else masked.masked_fill(absent.unsqueeze(1), 0)
        return masked.view_as(out)

    def _rows(self) -> UnpooledBags:
        if self._unpooled is None:
            self._unpooled = UnpooledBags(self.vectors)
        return self._unpooled

    @contextmanager
    def _drawn(self, batch: int, lengths: Tensor | None) -> Iterator[None]:
        """Inside, the vectors of a row that read one table have one width, where widths are drawn."""
        layer = self.layer
        if not isinstance(layer, OptembedLayer) or layer.drawn is not None:
            yield
            return
        layer.draw(batch)
        self._lengths = lengths
        try:
            yield
        finally:
            layer.draw(0)
            self._lengths = None

    def forward(self, dense: Tensor, ids: Ids) -> Tensor:
        """Logits ``[B]``."""
        if isinstance(ids, BagIds):
            lengths = ids.offsets.diff().view(len(self.vectors.schema), -1)
            with self._drawn(lengths.shape[1], lengths):
                return self.model(dense, ids)
        return self.model(dense, ids)

    # What a trainer asks of a model.

    @property
    def vectors(self) -> EmbeddingCollection:
        """The collection that the layer reads."""
        return self.model.vectors

    def collections(self) -> dict[str, EmbeddingCollection]:
        """Those of the model."""
        return self.model.collections()

    def trainable(self) -> list[nn.Parameter]:
        """Those of the model: a layer's parameters have steps of their own."""
        return self.model.trainable()

    def footprint(self) -> Footprint:
        """That of the model."""
        return self.model.footprint()

    @property
    def embedding_lr(self) -> float:
        """Learning rate of the fused optimizer of every collection."""
        return self.model.embedding_lr

    @embedding_lr.setter
    def embedding_lr(self, value: float) -> None:
        self.model.embedding_lr = value

    # What searches ask of a supernet.

    def table(self, name: str) -> Tensor:
        """The full table that a feature reads: ``[ids, D]``, a view."""
        return self.vectors.table(f"{self.vectors.schema[name].table_name}.weight")

    def catch_up_(self) -> None:
        """Bring all rows to the present step, where the optimizer makes up for missed steps when it next reads them."""
        for collection in self.collections().values():
            catch_up = getattr(collection, "catch_up_", None)
            if catch_up is not None:
                catch_up()

    @contextmanager
    def network_evaluated(self) -> Iterator[None]:
        """Inside, all but the collections is in evaluation mode; these catch up the rows that they look up, no others.

        In evaluation mode they would catch up whole tables. They step where something is differentiated towards them.
        """
        tables = {id(m) for c in self.collections().values() for m in c.modules()}
        training = [m for m in self.modules() if m.training and id(m) not in tables]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def replay(self, looked_up: dict[str, Tensor]) -> Iterator[None]:
        """Inside, no collection looks up: each hands out the vectors of the batch that are given."""
        with ExitStack() as stack:
            for key, collection in self.collections().items():
                out, own = looked_up[key], collection is self.vectors
                stack.enter_context(replaced(collection, forward=partial(self._again, out, own)))
            yield

    def _again(self, out: Tensor, own: bool, *_: Any) -> Tensor:
        return self.stand_in(out) if own and self.stand_in is not None else out


@contextmanager
def replaced(module: nn.Module, **methods: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, some methods of a module are others."""
    before = {name: module.__dict__.get(name) for name in methods}
    module.__dict__.update(methods)
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = method


def _hold(model: CTRModel, layer: nn.Module) -> None:
    """Make the layer a part of a retrieval model, which trainers and metrics take itself, not a supernet.

    The layer's parameters have steps of their own.
    """
    own = {id(p) for p in layer.parameters()}
    model.add_module(LAYER, layer)
    model.__dict__["trainable"] = lambda: [p for p in type(model).trainable(model) if id(p) not in own]


def as_model(net: Supernet) -> CTRModel:
    """The supernet typed as a model, because it has all members that a trainer uses.

    Of a retrieval model the model itself, since losses of users and items ask it for more.
    """
    return net.model if isinstance(net.model, RetrievalModel) else cast("CTRModel", net)


class OptembedTrainer(Trainer):
    """Trains a supernet with an :class:`OptembedLayer`: thresholds by plain SGD, all else as :class:`Trainer` does.

    Args:
        net: the supernet.
        data, config: see :class:`Trainer`.
        threshold_lr: rate of the thresholds.
        pull: of the regulariser, the sum of exp(-t).
        **options: see :class:`Trainer`.
    """

    def __init__(
        self, net: Supernet, data: BatchSource, config: TrainConfig, *, threshold_lr: float, pull: float, **options: Any
    ) -> None:
        self.net, self.threshold_lr, self.pull = net, threshold_lr, pull
        super().__init__(as_model(net), data, config, **options)

    def _dense_optimizer(self) -> tuple[torch.optim.Adam, list[nn.Parameter]]:
        optimizer, dense = super()._dense_optimizer()
        layer = cast("OptembedLayer", self.net.layer)
        if layer.oov is not None:
            c = self.config
            decay = c.embedding_weight_decay
            optimizer.add_param_group({"params": [layer.oov], "peak": self.table_lr, "weight_decay": decay})
        return optimizer, dense

    def _apply_gradients(self) -> None:
        super()._apply_gradients()
        cast("OptembedLayer", self.net.layer).step(self.threshold_lr, self.pull)

    def _validate(self, stop: Any) -> None:
        # Deferred updates are applied first: a row's norm must not depend on when the row was last read.
        self.net.catch_up_()
        super()._validate(stop)


def batch_norms(net: nn.Module) -> Sequence[nn.modules.batchnorm._BatchNorm]:
    """Modules that hold running statistics of batches."""
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
