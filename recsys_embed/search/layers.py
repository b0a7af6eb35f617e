"""Search layers: learned masks and scales between the lookup and the network, for any model with embeddings.

Each takes the vectors of all fields ``[B, F, D]``, from a collection or several ``nn.Embedding``, and returns them
masked or scaled. ``mask_ids`` does so with the vectors ``[n, D]`` of the ids of bags before these are pooled; features
that share a table are one field there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.collection.unpooled_bags import UnpooledBags
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.features import Schema
from recsys_embed.kernels.native.masks import MaskParameters, mask_vectors
from recsys_embed.optim import Adam
from recsys_embed.utils.deprecated import earlier_names

RowThresholds = Literal["field", "row", "none"]
Granularity = Literal["global", "dimension", "field", "field_dimension", "feature", "feature_dimension"]


def long_tailed(u: Tensor) -> Tensor:
    """Long-tailed surrogate derivative of the unit step at ``u`` (Dynamic Sparse Training, arXiv 2005.06870).

    >>> long_tailed(torch.tensor([0.0, -0.2, 0.4, 1.0, 1.1]))
    tensor([2.0000, 1.2000, 0.4000, 0.4000, 0.0000])
    """
    far = u.abs()
    return torch.where(far <= 0.4, 2 - 4 * far, 0.4 * (far <= 1).to(u.dtype))


class _UnitStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return grads[0] * long_tailed(u)


def unit_step(u: Tensor) -> Tensor:
    """1 where ``u`` > 0, else 0; its gradient is :func:`long_tailed`."""
    out: Tensor = _UnitStep.apply(u)
    return out


class OptembedLayer(nn.Module):
    """Thresholds on the norms of rows, and widths, of every field (OptEmbed, Lyu et al., arXiv 2208.04482).

    A row whose norm is at most its threshold gives zeros, or the field's own ``oov`` vector. In training every sample
    and field keeps a prefix of its columns, of a width drawn uniformly from 1 to D at every step; in evaluation all
    columns, or those of ``widths``. A pruned row still gets the gradient of the step's estimator, so it may come back.

    Rows are pruned because weight decay shrinks **all** rows at every step (dense Adam with L2); the regulariser of
    the thresholds alone is far too weak. A sparse or lazy optimizer without such decay never prunes.

    Args:
        fields: F.
        width: D.
        rows: a threshold per ``"field"``, per ``"row"`` (needs ``sizes``), or ``"none"``: none is pruned (OptEmbed-D).
        dims: whether columns are masked (False: OptEmbed-E).
        norm: 1 or 2, of a whole row.
        oov: learn a vector per field that stands for pruned rows; Xavier-uniform over ``[F, D]`` to begin with.
        sizes: ids of each field.
        field_of: of each feature, its field: features that share a table have one threshold and one width; None: every
            feature is a field.

    The thresholds are for plain SGD without weight decay, see :meth:`step`; all else is for Adam with L2.

    >>> layer = OptembedLayer(fields=2, width=4)
    >>> layer(torch.ones(3, 2, 4)).shape
    torch.Size([3, 2, 4])
    """

    def __init__(
        self,
        fields: int,
        width: int,
        *,
        rows: RowThresholds = "field",
        dims: bool = True,
        norm: int = 1,
        oov: bool = False,
        sizes: Sequence[int] | None = None,
        field_of: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        faults = []
        if rows not in ("field", "row", "none"):
            faults.append(f"`rows` must be field, row or none; got {rows!r}")
        if norm not in (1, 2):
            faults.append(f"`norm` must be 1 or 2; got {norm!r}")
        if rows == "row" and (sizes is None or len(sizes) != fields):
            faults.append(f"`rows='row'` needs `sizes`, the number of ids of each of {fields} fields; got {sizes!r}")
        if rows == "none" and not dims:
            faults.append("one of `rows` and `dims` must be searched; got rows='none', dims=False")
        raise_faults(faults, "OptembedLayer")
        self.fields, self.width, self.rows, self.dims, self.norm = fields, width, rows, dims, norm
        self.thresholds: nn.Parameter | None = None
        if rows != "none":
            self.thresholds = nn.Parameter(torch.zeros(fields if rows == "field" else sum(sizes or ())))
        starts = [0, *accumulate(sizes or [0] * fields)]
        self.register_buffer("starts", torch.tensor(starts), persistent=False)
        self.oov: nn.Parameter | None = None
        if oov and rows != "none":
            self.oov = nn.Parameter(nn.init.xavier_uniform_(torch.empty(fields, width)))
        self.register_buffer("field_of", _numbers(field_of, fields), persistent=False)
        # Columns that evaluation keeps of each field; None keeps all.
        self.widths: Tensor | None = None
        # Widths of each row and field of the batch that is at work, see `draw`.
        self.drawn: Tensor | None = None

    def threshold_of(self, ids: Tensor | None) -> Tensor:
        """Thresholds that broadcast with norms ``[B, F]`` of the rows of ``ids [B, F]``."""
        if self.thresholds is None:
            raise ConfigError("this layer prunes no rows")
        if self.rows == "field":
            return self.thresholds
        if ids is None:
            raise ConfigError("thresholds per row need the ids of the vectors")
        starts: Tensor = self.get_buffer("starts")
        return nn.functional.embedding((ids + starts[:-1]).long(), self.thresholds.unsqueeze(1)).squeeze(-1)

    def keep(self, vectors: Tensor, thresholds: Tensor) -> Tensor:
        """1 for rows ``[..., D]`` whose norm exceeds its threshold, else 0: ``[...]``; differentiable by estimation."""
        norms = vectors.abs().sum(-1) if self.norm == 1 else vectors.square().sum(-1).clamp_min(1e-30).sqrt()
        return unit_step(norms - thresholds)

    def prune(self, vectors: Tensor, ids: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """Vectors without pruned rows; ``columns`` ``[..., D]`` of 0 and 1 mask what is left."""
        if self.thresholds is None:
            return vectors if columns is None else vectors * columns
        return self._pruned(vectors, self.threshold_of(ids), self.oov, columns)

    def _pruned(self, vectors: Tensor, thresholds: Tensor, oov: Tensor | None, columns: Tensor | None) -> Tensor:
        kept = vectors if columns is None else vectors * columns
        keep = self.keep(vectors, thresholds).unsqueeze(-1)
        if oov is None:
            return keep * kept
        fallback = oov if columns is None else oov * columns
        return keep * kept + (1 - keep) * fallback

    def draw(self, batch: int) -> None:
        """Draw the widths of each row and field of a batch, for all its vectors until the next draw; 0 forgets them."""
        device = self.get_buffer("starts").device
        training = self.training and self.dims and batch > 0
        self.drawn = torch.randint(1, self.width + 1, (batch, self.fields), device=device) if training else None

    def mask_ids(self, vectors: Tensor, ids: Tensor, feature: Tensor | int, row: Tensor | None) -> Tensor:
        """Masked vectors ``[n, D]``, before they are pooled.

        Prefixes commute with pooling, so bags of one width are those of vectors of one width.

        Args:
            vectors: ``[n, D]``.
            ids: int64 ``[n]``.
            feature: position of the feature of each, int64 ``[n]``, or of all.
            row: the row of the batch of each, int64 ``[n]``, whose widths :meth:`draw` has drawn; None: each has its
                own width.
        """
        field = self.get_buffer("field_of")[feature]
        columns, widths = None, self._widths_of(field, row, len(ids))
        if widths is not None:
            columns = self.columns(widths)
        if self.thresholds is None:
            return vectors if columns is None else vectors * columns
        at = field if self.rows == "field" else self.get_buffer("starts")[field] + ids
        thresholds = self.thresholds.index_select(0, at.expand(len(ids)))
        oov = None if self.oov is None else self.oov[field]
        if oov is None and columns is None:
            found = self._by_kernels(vectors, thresholds, None)
        elif oov is None and widths is not None:
            found = self._by_kernels(vectors, thresholds, widths.expand(len(ids)))
        else:
            found = None
        return self._pruned(vectors, thresholds, oov, columns) if found is None else found

    def _widths_of(self, field: Tensor, row: Tensor | None, count: int) -> Tensor | None:
        """Columns that vectors of fields keep, ``[n]`` or one for all; None: all."""
        if self.training and self.dims:
            if row is not None and self.drawn is not None:
                return self.drawn[row, field]
            return torch.randint(1, self.width + 1, (count,), device=field.device)
        return None if self.widths is None else self.widths.to(field.device)[field]

    def _by_kernels(self, vectors: Tensor, thresholds: Tensor, widths: Tensor | None) -> Tensor | None:
        """As :meth:`_pruned` without ``oov``: each vector as a row of its own of one field."""
        count = len(vectors)
        numbers = torch.arange(count, device=vectors.device).unsqueeze(1)
        starts = torch.tensor([0, count], device=vectors.device)
        columns = None if widths is None else widths.contiguous().unsqueeze(1)
        parameters = MaskParameters(self.width, starts, thresholds, self.norm, columns)
        found = mask_vectors(parameters, numbers, vectors.unsqueeze(1))
        return None if found is None else found.squeeze(1)

    def columns(self, widths: Tensor) -> Tensor:
        """Prefix masks ``[..., D]`` of ``widths [...]``.

        >>> OptembedLayer(1, 3).columns(torch.tensor([1, 3]))
        tensor([[1., 0., 0.],
                [1., 1., 1.]])
        """
        places = torch.arange(self.width, device=widths.device)
        return (places < widths.unsqueeze(-1)).to(torch.float32)

    def forward(self, vectors: Tensor, ids: Tensor | None = None) -> Tensor:
        """Masked vectors.

        Args:
            vectors: ``[B, F, D]``.
            ids: int64 ``[B, F]``, for thresholds per row.
        """
        parameters = self.mask_parameters(vectors[..., 0] if ids is None else ids)
        return self.through(parameters, vectors, ids)

    def mask_parameters(self, ids: Tensor) -> MaskParameters:
        """The mask of this call for the vectors of ``ids [B, F]``; in training its widths are drawn."""
        widths = self.widths
        if self.training and self.dims:
            widths = torch.randint(1, self.width + 1, ids.shape, device=ids.device)
        starts = self.get_buffer("starts") if self.rows == "row" else None
        return MaskParameters(self.width, starts, self.thresholds, self.norm, widths, self.oov)

    def through(self, parameters: MaskParameters, vectors: Tensor, ids: Tensor | None) -> Tensor:
        """``vectors [B, F, D]`` of ``ids [B, F]`` masked."""
        found = None if ids is None else mask_vectors(parameters, ids, vectors)
        if found is not None:
            return found
        return self.prune(vectors, ids, None if parameters.widths is None else self.columns(parameters.widths))

    @torch.no_grad()
    def step(self, lr: float, pull: float) -> None:
        """One step of plain SGD on the thresholds, for the loss plus ``pull`` times the sum of exp(-t)."""
        if self.thresholds is None or self.thresholds.grad is None:
            return
        self.thresholds.grad.sub_((-self.thresholds).exp(), alpha=pull)
        self.thresholds.sub_(self.thresholds.grad, alpha=lr)
        self.thresholds.grad = None


class DnisLayer(nn.Module):
    """Soft selection: a learned scale in [0, 1] per block of ids and column (DNIS, AutoSrh).

    Args:
        blocks: of each field, the block of each id: int64 ``[ids]``; blocks are numbered through all fields.
        width: D.
        field_of: of each feature, its field, the table that it reads; None: every feature is a field.

    >>> layer = DnisLayer([torch.tensor([0, 1])], width=4)
    >>> layer(torch.ones(3, 1, 4), torch.tensor([[0], [1], [1]])).shape, layer.alpha.shape
    (torch.Size([3, 1, 4]), torch.Size([2, 4]))
    """

    def __init__(self, blocks: Sequence[Tensor], width: int, field_of: Sequence[int] | None = None) -> None:
        super().__init__()
        self.width = width
        joined = torch.cat([b.long() for b in blocks])
        count = int(joined.max()) + 1
        self.alpha = nn.Parameter(torch.ones(count, width))
        # One byte per id where possible. The map is not in the state dict, because it follows from the counts.
        self.register_buffer("block", joined.to(torch.uint8 if count <= 256 else torch.int32), persistent=False)
        self.register_buffer("starts", torch.tensor([0, *accumulate(len(b) for b in blocks)]), persistent=False)
        self.register_buffer("field_of", _numbers(field_of, len(blocks)), persistent=False)
        self.sizes = [len(b) for b in blocks]

    def blocks_of(self, field: int) -> Tensor:
        """Block of each id of a field: int64 ``[ids]``."""
        start = int(self.get_buffer("starts")[field])
        return self.get_buffer("block")[start : start + self.sizes[field]].long()

    def forward(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """``vectors [B, F, D]`` of ``ids [B, F]``, scaled."""
        return self.through(self.mask_parameters(ids), vectors, ids)

    def mask_parameters(self, ids: Tensor) -> MaskParameters:
        """The scales of this call for the vectors of ``ids [B, F]``."""
        return MaskParameters(self.width, self.get_buffer("starts"), scales=self.alpha, blocks=self.get_buffer("block"))

    def through(self, parameters: MaskParameters, vectors: Tensor, ids: Tensor) -> Tensor:
        """``vectors [B, F, D]`` of ``ids`` masked."""
        found = mask_vectors(parameters, ids, vectors)
        if found is not None:
            return found
        block = self.get_buffer("block")[ids + self.get_buffer("starts")[:-1]].long()
        return vectors * nn.functional.embedding(block, self.alpha)

    def mask_ids(self, vectors: Tensor, ids: Tensor, feature: Tensor | int, row: Tensor | None) -> Tensor:
        """``vectors [n, D]`` of ``ids [n]`` before they are pooled, scaled; see :meth:`OptembedLayer.mask_ids`."""
        starts, blocks = self.get_buffer("starts"), self.get_buffer("block")
        places = starts[self.get_buffer("field_of")[feature]] + ids
        # All fields as one, whose ids are numbered through.
        ends = torch.tensor([0, len(blocks)], device=ids.device)
        parameters = MaskParameters(self.width, ends, scales=self.alpha, blocks=blocks)
        found = mask_vectors(parameters, places.unsqueeze(1), vectors.unsqueeze(1))
        if found is not None:
            return found.squeeze(1)
        return vectors * nn.functional.embedding(blocks[places].long(), self.alpha)

    @torch.no_grad()
    def step(self, grad: Tensor, lr: float, second: Tensor | None = None) -> None:
        """Move against ``grad`` and stay in [0, 1].

        Every block's row is divided by its mean absolute gradient, so that all blocks move at one speed, however rare
        their ids are; without that only the most frequent block moves. ``second`` comes on top as it is.
        """
        move = normalised(grad)
        if second is not None:
            move = move + second
        self.alpha.sub_(move, alpha=lr).clamp_(0.0, 1.0)


def normalised(grad: Tensor) -> Tensor:
    """Rows divided by their mean absolute value.

    >>> normalised(torch.tensor([[1.0, -3.0], [0.0, 0.0]]))
    tensor([[ 0.5000, -1.5000],
            [ 0.0000,  0.0000]])
    """
    return grad / (grad.abs().mean(-1, keepdim=True) + 1e-8)


def soft_threshold(vectors: Tensor, thresholds: Tensor) -> Tensor:
    """``sign(v) * relu(|v| - sigmoid(s))`` (PEP, Liu et al., arXiv 2101.07577).

    >>> soft_threshold(torch.tensor([2.0, -2.0, 0.3]), torch.tensor(0.0))
    tensor([ 1.5000, -1.5000,  0.0000])
    """
    return vectors.sign() * (vectors.abs() - thresholds.sigmoid()).relu()


class PepLayer(nn.Module):
    """Learned soft thresholds on the elements of vectors (PEP).

    The sigmoid of a raw threshold is subtracted from absolute values. Raw thresholds start so low that they prune
    nothing, and rise by their L2 penalty alone until they reach the weights; without that penalty nothing is pruned.

    Args:
        schema: the fields.
        granularity: what has a threshold of its own, see :class:`PepSettings`.
        init: of the raw thresholds.
        lr, decay: of those per row or element, which step inside backward, all rows at every step; the few others are
            ``few`` and for Adam.

    >>> from recsys_embed import FeatureSpec, Schema
    >>> layer = PepLayer(Schema([FeatureSpec("C1", 9, 4)]), "field", init=0.0, lr=0.01, decay=1e-5)
    >>> layer(torch.ones(2, 1, 4), torch.tensor([[3], [8]]))[0]
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]], grad_fn=<SelectBackward0>)
    """

    def __init__(self, schema: Schema, granularity: Granularity, *, init: float, lr: float, decay: float) -> None:
        super().__init__()
        width, fields = schema.features[0].embedding_dim, len(schema.by_table)
        self.register_buffer("field_of", torch.tensor(table_numbers(schema)), persistent=False)
        self.few: nn.Parameter | None = None
        self.many: EmbeddingCollection | None = None
        if granularity in ("feature", "feature_dimension"):
            narrow = schema.with_dim(1 if granularity == "feature" else width)
            self.many = EmbeddingCollection(narrow, optimizer=Adam(lr=lr, weight_decay=decay, rows="all"))
            self._rows = UnpooledBags(self.many)
            with torch.no_grad():
                for name in self.many.storages:
                    self.many.get_parameter(name).fill_(init)
            return
        shapes = {"global": (1, 1), "dimension": (1, width), "field": (fields, 1), "field_dimension": (fields, width)}
        self.few = nn.Parameter(torch.full(shapes[granularity], init))

    def forward(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """``vectors [B, F, D]`` of ``ids [B, F]``, thresholded."""
        return soft_threshold(vectors, self.few if self.few is not None else self._many(ids))

    def mask_ids(self, vectors: Tensor, ids: Tensor, feature: Tensor | int, row: Tensor | None) -> Tensor:
        """``vectors [n, D]`` of ``ids [n]`` before they are pooled; see :meth:`OptembedLayer.mask_ids`."""
        if self.few is None:
            return soft_threshold(vectors, self._rows.vectors(ids, feature))
        if len(self.few) == 1:
            return soft_threshold(vectors, self.few)
        field = self.get_buffer("field_of")[feature]
        return soft_threshold(vectors, self.few.index_select(0, field.reshape(-1)))

    def _many(self, ids: Tensor) -> Tensor:
        if self.many is None:
            raise ConfigError("this layer has no thresholds per row")
        out: Tensor = self.many(ids)
        return out

    def of(self, field: int, table: str) -> Tensor:
        """Raw thresholds that broadcast with a field's table ``[ids, D]``, of the name that the schema has for it."""
        if self.many is not None:
            return self.many.table(f"{table}.weight")
        if self.few is None:
            raise ConfigError("this layer has no thresholds")
        return self.few[field if len(self.few) > 1 else 0]


def _numbers(field_of: Sequence[int] | None, fields: int) -> Tensor:
    return torch.arange(fields) if field_of is None else torch.tensor(list(field_of))


def table_numbers(schema: Schema) -> list[int]:
    """Of each feature the number of its table, in the order of the first features that read them.

    >>> from recsys_embed import FeatureSpec
    >>> item, user = FeatureSpec("item", 9, 4), FeatureSpec("user", 9, 4)
    >>> table_numbers(Schema([item, user, FeatureSpec("seen", 9, 4, table="item")]))
    [0, 1, 0]
    """
    numbers = {table: number for number, table in enumerate(schema.by_table)}
    return [numbers[spec.table_name] for spec in schema]


__getattr__ = earlier_names(__name__, {"Rows": "search.layers.RowThresholds"})
