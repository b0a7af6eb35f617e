"""A click model whose vectors pass through a layer on their way to the network: what searches train and evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.core.footprint import Footprint
from recsys_embed.data.data_source import BatchSource
from recsys_embed.errors import ConfigError
from recsys_embed.models.base import CTRModel
from recsys_embed.search.layers import OptembedLayer
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.loop import Trainer


class Supernet(nn.Module):
    """A CTR model over full tables with a search layer between its collection and its network.

    It trains, saves and evaluates like the model, which needs no changes; its state dict includes the layer's.

    Args:
        model: built with a full plan of one width.
        layer: called with vectors ``[B, F, D]`` and ids ``[B, F]``.

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
        # A layer that kernels support is fused into the lookup; others run on its output.
        self._fused = hasattr(layer, "mask_parameters")
        vectors.register_forward_pre_hook(self._hand_in, with_kwargs=True)
        vectors.register_forward_hook(self._tap)

    def _hand_in(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._fused and self.stand_in is None:
            return args, {**kwargs, "mask": self.layer}
        return None

    def _tap(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if self.stand_in is not None:
            return self.stand_in(out)
        masked: Tensor = out if self._fused else self.layer(out, args[0])
        return masked

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        """Logits ``[B]``."""
        logits: Tensor = self.model(dense, ids)
        return logits

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
        """The full table of a feature: ``[ids, D]``, a view."""
        return self.vectors.table(f"{name}.weight")

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
        collections = self.collections()
        for key, collection in collections.items():
            collection.__dict__["forward"] = lambda *_, out=looked_up[key]: out
        try:
            yield
        finally:
            for collection in collections.values():
                del collection.__dict__["forward"]


def as_model(net: Supernet) -> CTRModel:
    """The supernet typed as a model, because it has all members that a trainer uses."""
    return cast("CTRModel", net)


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
