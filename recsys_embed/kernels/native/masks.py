"""Masks in the native kernels: rows pruned by norm, columns cut off, vectors scaled by block of ids (ops/cpu).

A lookup can apply a mask in the same call; for other vectors the mask is a call of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from recsys_embed.errors import ConfigError, IdRangeError
from recsys_embed.kernels import pointers
from recsys_embed.kernels.derivatives import needs_torch_gradients
from recsys_embed.kernels.native.library import Mask, Matrix, loaded
from recsys_embed.kernels.native.lookup import runs_on
from recsys_embed.kernels.native.output_pool import OutputPool
from recsys_embed.kernels.native.row_steps import checked
from recsys_embed.kernels.pointers import checked_address


@dataclass(frozen=True)
class MaskParameters:
    """Parameters of a mask of vectors ``[B, F, D]``: either ``scales``, or pruning.

    ``scales`` multiply each vector by the factors of its id's block. Pruning replaces a row whose norm is at most its
    threshold by ``fallback``, and sets columns of the others to zero from ``widths`` on.

    Args:
        width: D.
        starts: int64 ``[F + 1]``, first id of each field among those of all; thresholds and blocks are then per id.
        thresholds: float32 ``[F]``, or ``[ids]`` per id; None: no row is pruned.
        norm: 1 or 2.
        widths: int64 ``[B, F]`` or ``[F]``, number of columns kept; None: all.
        fallback: float32 ``[F, D]``, replaces pruned rows; None: zeros.
        scales: float32 ``[blocks, D]``.
        blocks: uint8 or int32 ``[ids]``.
    """

    width: int
    starts: Tensor | None = None
    thresholds: Tensor | None = None
    norm: int = 1
    widths: Tensor | None = None
    fallback: Tensor | None = None
    scales: Tensor | None = None
    blocks: Tensor | None = None

    @property
    def learned(self) -> tuple[Tensor | None, Tensor | None]:
        """Parameters with gradients: thresholds, and ``fallback`` or ``scales``."""
        return self.thresholds, self.fallback if self.scales is None else self.scales

    @property
    def learns(self) -> bool:
        """Whether a parameter requires a gradient."""
        return any(t is not None and t.requires_grad for t in self.learned)

    def fits(self, ids: Tensor, shape: Sequence[int]) -> bool:
        """Whether the kernels may read the memory of ids and parameters, and all of these fit vectors of ``shape``."""
        learned = [t for t in self.learned if t is not None]
        others = [t for t in (self.starts, self.widths, self.blocks) if t is not None]
        return (
            not torch.compiler.is_compiling()
            and ids.dtype in (torch.int32, torch.int64)
            and runs_on(ids, learned)
            and all(t.is_cpu and t.is_contiguous() for t in others)
            and self._agrees(ids.shape, shape)
        )

    def _agrees(self, ids: torch.Size, shape: Sequence[int]) -> bool:
        """Whether shapes agree exactly; kernels would read beyond a parameter that torch broadcasts."""
        if len(ids) != 2 or tuple(shape) != (*ids, self.width):
            return False
        fields = number = ids[1]
        if self.starts is not None:
            if self.starts.shape != (fields + 1,) or self.starts.dtype != torch.int64:
                return False
            number = int(self.starts[-1])
        thresholds, widths, fallback, scales, blocks = (
            self.thresholds,
            self.widths,
            self.fallback,
            self.scales,
            self.blocks,
        )
        return (
            (thresholds is None or thresholds.shape == (number,))
            and (widths is None or (widths.dtype == torch.int64 and widths.shape in (ids, (fields,))))
            and (fallback is None or fallback.shape == (fields, self.width))
            and (scales is None or (scales.dim() == 2 and scales.shape[1] == self.width))
            and (blocks is None or (blocks.dtype in (torch.uint8, torch.int32) and blocks.shape == (number,)))
        )

    def record(self, ids: Tensor, vectors: Tensor, out: Tensor) -> Mask:
        """The call's record; it holds pointers to the arguments, which :meth:`fits` has checked.

        Args:
            ids: ``[B, F]``.
            vectors, out: ``[B, F, D]``, contiguous; may share memory.
        """
        thresholds, rest = self.learned
        batch, fields = ids.shape
        mask = Mask(batch=batch, fields=fields, width=self.width, norm=self.norm)
        mask.vectors, mask.out = _matrix(vectors), _matrix(out)
        if self.starts is not None:
            mask.starts, mask.ids, mask.ids_are_32 = (
                checked_address(self.starts),
                checked_address(ids),
                ids.dtype == torch.int32,
            )
            mask.sample_stride, mask.feature_stride = ids.stride()
        if thresholds is not None:
            mask.thresholds = checked_address(thresholds)
        if self.widths is not None:
            mask.widths, mask.widths_stride = checked_address(self.widths), fields if self.widths.dim() == 2 else 0
        if self.scales is not None and self.blocks is not None:
            mask.scales, mask.block_count = checked_address(self.scales), self.scales.shape[0]
            mask.blocks, mask.blocks_are_8 = checked_address(self.blocks), self.blocks.dtype == torch.uint8
        elif rest is not None:
            mask.fallback = checked_address(rest)
        return mask


_POOL = OutputPool()
"""Memory for masks that are calls of their own."""


class Masking(Protocol):
    """A layer that masks vectors ``[B, F, D]``, which a lookup may apply in its kernels."""

    def mask_parameters(self, ids: Tensor) -> MaskParameters:
        """The mask of the vectors of ``ids [B, F]`` in this call."""

    def through(self, parameters: MaskParameters, vectors: Tensor, ids: Tensor) -> Tensor:
        """``vectors [B, F, D]`` of ``ids`` masked, by the kernels if they can."""


class _Context(Protocol):
    """What a mask saves for backward."""

    mask: MaskParameters
    pool: OutputPool

    @property
    def saved_tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]: ...

    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _Masked(Function):
    """``done``: the masked vectors, if a lookup has computed them. It is not an argument that autograd sees, because an
    output that is an input counts as a view."""

    @staticmethod
    def forward(
        ctx: _Context,
        vectors: Tensor,
        thresholds: Tensor | None,
        rest: Tensor | None,
        parameters: MaskParameters,
        ids: Tensor,
        done: tuple[Tensor | None],
        pool: OutputPool,
    ) -> Tensor:
        ctx.mask, ctx.pool = parameters, pool
        ctx.save_for_backward(vectors, ids, thresholds, rest, parameters.widths, parameters.blocks)
        if done[0] is not None:
            return done[0]
        out = pool.take(vectors.shape)
        record = parameters.record(ids, vectors, out)
        if not checked(loaded().handle.rse_mask(pointers.of_record(record), torch.get_num_threads())):
            raise IdRangeError("an id lies outside the ids that the mask's parameters are for")
        return out

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        vectors, ids, thresholds, rest, *_ = ctx.saved_tensors
        grad = grads[0].contiguous()
        if needs_torch_gradients(grads):
            raise ConfigError(
                "masks in the kernels have no second derivatives (create_graph=True) and no batched gradients; take "
                "these of vectors in float64, which torch's operations mask"
            )
        found = pointers.faults(grad, (torch.float32,), vectors.numel(), "a gradient")
        found += pointers.faults(vectors, (torch.float32,), ids.numel() * ctx.mask.width, "vectors")
        if not ctx.mask.fits(ids, vectors.shape):
            found.append("parameters of a mask must be float32 (integers as they were), contiguous and on the CPU")
        pointers.check(found)
        wanted = ctx.needs_input_grad
        record = ctx.mask.record(ids, vectors, vectors)
        record.gradient = _matrix(grad)
        moved = ctx.pool.take(vectors.shape) if wanted[0] else None
        of_thresholds = torch.zeros_like(thresholds) if wanted[1] else None
        of_rest = torch.zeros_like(rest) if wanted[2] else None
        slopes = None
        if moved is not None:
            record.of_vectors = _matrix(moved)
        if of_thresholds is not None:
            record.of_thresholds = checked_address(of_thresholds)
            if ctx.mask.starts is not None:
                slopes = grad.new_empty(ids.shape)
                record.slopes = checked_address(slopes)
        if of_rest is not None:
            record.of_rest = checked_address(of_rest)
        if not checked(loaded().handle.rse_mask_backward(pointers.of_record(record), torch.get_num_threads())):
            raise RuntimeError("ids changed between forward and backward")
        return moved, of_thresholds, of_rest, None, None, None, None


def _matrix(tensor: Tensor) -> Matrix:
    return Matrix(checked_address(tensor), tensor.stride(0))


def masked(
    parameters: MaskParameters, ids: Tensor, vectors: Tensor, pool: OutputPool, done: Tensor | None = None
) -> Tensor:
    """``vectors [B, F, D]`` of ``ids [B, F]`` masked, differentiable in them and in the parameters of the mask.

    Args:
        pool: allocates the result.
        done: the masked vectors, if they are already computed.

    Raises:
        IdRangeError: an id has no parameters.
    """
    out: Tensor = _Masked.apply(vectors, *parameters.learned, parameters, ids, (done,), pool)
    return out


def mask_vectors(parameters: MaskParameters, ids: Tensor, vectors: Tensor) -> Tensor | None:
    """``vectors [B, F, D]`` masked by the kernels; None if they cannot read these tensors."""
    if not parameters.fits(ids, vectors.shape) or vectors.dtype != torch.float32 or not runs_on(vectors, []):
        return None
    return masked(parameters, ids, vectors.contiguous(), _POOL)
