"""Output layers whose weight is an embedding table, as language models and sequential recommenders tie them."""

from __future__ import annotations

from typing import Any, ClassVar, Self
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_embed.embedding.compressed_embedding import CompressedEmbedding
from recsys_embed.embedding.plain_table import PlainView
from recsys_embed.embedding.stored_parameters import StoredParameters
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.hidden_buffers import HiddenBuffers
from recsys_embed.kernels.recording import refuse_scripting

_COMPUTED = (
    "the weight of this output layer is computed by a compressed embedding{what}; turn the table back into a plain one "
    "first: recsys_embed.materialize_(model)"
)


class _Parameters(StoredParameters):
    """The bias, if there is one."""

    def refuse(self) -> None:
        raise ConfigError(_COMPUTED.format(what=" and is no parameter"))


class TiedLinear(nn.Module):
    """Scores of all ids by the rows of a compressed table: ``nn.Linear`` whose weight a drop-in computes.

    The table is the drop-in's alone: its parameters are in the state dict once, at the drop-in's path, and the layer
    lasts as long as the drop-in. ``weight`` reads as ``[num_embeddings, embedding_dim]``, computed with gradients at
    each call, and cannot be set.

    >>> import torch, recsys_embed as rse
    >>> model = nn.ModuleDict({"item": nn.Embedding(500, 8), "scores": nn.Linear(8, 500, bias=False)})
    >>> model["scores"].weight = model["item"].weight
    >>> _ = rse.compress_(model, {"item": rse.HashConfig(num_buckets=50)})
    >>> scores = model["scores"](torch.ones(1, 8))
    >>> torch.allclose(scores[0], model["item"].weight.sum(1), atol=1e-6), sum(p.numel() for p in model.parameters())
    (True, 400)
    """

    # What finding the tables of a model takes these modules for.
    table_kind: ClassVar[str] = "output_layer"
    __prepare_scriptable__ = refuse_scripting

    in_features: int
    out_features: int
    _table: ref[CompressedEmbedding]

    @property
    def table(self) -> CompressedEmbedding:
        """The drop-in whose rows give the scores.

        Raises:
            ConfigError: it has been put out of the model, so nothing would train, move or save its parameters.
        """
        table = self._table()
        if table is None:
            raise ConfigError(
                "the compressed table that this output layer scored by is gone: the model has another in its place, "
                "or is gone itself; turn tables back before you exchange them, recsys_embed.materialize_(model), and "
                "keep the model whose layer you call"
            )
        return table

    def scores_by(self, module: nn.Module) -> bool:
        """Whether ``module`` is the drop-in whose rows give the scores."""
        return self._table() is module

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of a model hold its table, which the layer finds there.
        return {**vars(self), "_table": (self.table,)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_table": ref(state["_table"][0])})
        self._refuse_weight_as_parameter()

    @property
    def weight(self) -> Tensor:
        """The plain table, as the drop-in's ``weight``."""
        return self.table.weight

    def forward(self, input: Tensor) -> Tensor:
        """Scores ``[..., num_embeddings]`` of vectors ``[..., embedding_dim]``."""
        weight = self.weight
        if weight.is_meta and not input.is_meta:
            weight = self._offloaded(input)
        return F.linear(input, weight, self._parameters.get("bias"))

    def _offloaded(self, input: Tensor) -> Tensor:
        """All rows of a table without memory, which hooks of the drop-in bring back while it is called."""
        ids = torch.arange(self.table.num_embeddings, device=input.device)
        return self.table(ids if self.table.mode is None else ids.unsqueeze(1))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise ConfigError(_COMPUTED.format(what=", so setting it would change nothing"))
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if isinstance(param, PlainView):  # pruning registers what it takes over under a new name
            raise ConfigError(_COMPUTED.format(what=f", so registering it as {name!r} would change nothing"))
        super().register_parameter(name, param)

    def _refuse_weight_as_parameter(self) -> None:
        """Let utilities that put a computed tensor in a parameter's place hear that ``weight`` is none."""
        stored, shown = _Parameters(self._parameters), HiddenBuffers({"weight": None})
        shown.update(self._buffers)
        shown.refuse = stored.refuse
        vars(self).update(_parameters=stored, _buffers=shown)

    def _replicate_for_data_parallel(self) -> Self:
        raise ConfigError(
            "DataParallel would score with the table of the first device alone; use DistributedDataParallel"
        )

    def extra_repr(self) -> str:
        bias = self._parameters.get("bias") is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, tied"


def tied_output(layer: nn.Module, table: nn.Module) -> nn.Module:
    """An output layer like ``layer`` (hooks, attributes, bias) that scores by ``table``.

    Args:
        layer: an ``nn.Linear`` or a :class:`TiedLinear`; it stays as it is.
        table: a drop-in, or an ``nn.Embedding`` or ``nn.EmbeddingBag`` whose weight becomes the layer's.
    """
    compressed = isinstance(table, CompressedEmbedding)
    new: Any = object.__new__(TiedLinear if compressed else nn.Linear)
    # A RemovableHandle refers to the dictionaries of hooks, so the new layer takes the same objects.
    vars(new).update({k: v for k, v in vars(layer).items() if k != "_table"})
    bias = {k: v for k, v in layer._parameters.items() if k != "weight"}
    if isinstance(table, CompressedEmbedding):
        vars(new).update(_parameters=bias, _table=ref(table))
        new._refuse_weight_as_parameter()
    else:
        vars(new).update(_parameters={"weight": table._parameters["weight"], **bias}, _buffers=dict(layer._buffers))
    return new
