"""Fit a compressed embedding to a trained table: least squares, one table at a time.

The output of a lookup program is linear in each of its tables with the others held fixed. So each table's best values
solve a linear least-squares problem, which conjugate gradients (Hestenes and Stiefel 1952) solve with the module's own
forward and backward as the matrix; sweeping over the tables is alternating least squares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from recsys_embed.core.program import LookupProgram
from recsys_embed.kernels.low_precision_table import LowPrecisionTable


class Fittable(Protocol):
    """What fitting needs of a module, which is a :class:`recsys_embed.embedding.CompressedEmbedding`."""

    padding_idx: int | None
    program: LookupProgram

    @property
    def mode(self) -> str | None: ...

    @property
    def output_dim(self) -> int: ...

    def table(self, name: str) -> Tensor: ...

    def parameter_name(self, table: str) -> str: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def _outputs(module: Fittable, values: dict[str, Tensor], ids: Tensor) -> Tensor:
    # A pooling module sees each id as a bag of one.
    given = ids if module.mode is None else ids.unsqueeze(1)
    out: Tensor = torch.func.functional_call(cast("nn.Module", module), values, (given,))
    return out


def _floats(parameter: Tensor) -> Tensor:
    values = parameter.detach()
    return values.to_dense() if isinstance(values, LowPrecisionTable) else values


def _solve_table(module: Fittable, name: str, target: Tensor, row_weight: Tensor, steps: int, tolerance: float) -> None:
    """Minimise the weighted squared error over one table, from its present values.

    With the other tables fixed the output is ``A t + base``, so the minimum solves ``A' W A t = A' W (target - base)``,
    ``W`` being ``row_weight``. ``A`` is never formed: the module's forward applies it, and its backward applies ``A'``.
    This is conjugate gradients on the residual of the outputs (CGLS), preconditioned by a diagonal.
    """
    table, name = module.table(name), module.parameter_name(name)
    ids = torch.arange(target.shape[0], device=target.device)
    # Half precision has neither the range nor the digits for sums over all ids.
    # Low-precision rows would be rounded in each step; the solution is, once.
    fixed = {key: _floats(p).to(target.dtype) for key, p in module.named_parameters()}
    start = fixed[name].clone().requires_grad_(True)
    out = _outputs(module, {**fixed, name: start}, ids)

    def error(residual: Tensor) -> Tensor:
        return (residual.square() * row_weight).sum(dtype=torch.float64)

    def adjoint(residual: Tensor) -> Tensor:
        """``A' W`` times a residual of the outputs: the negative gradient, but for a factor of two."""
        (grad,) = torch.autograd.grad(out, start, residual * row_weight, retain_graph=True)
        return grad.to_dense() if grad.is_sparse else grad

    with torch.no_grad():
        # What the other tables add to the output; subtracting it makes the forward linear instead of affine.
        base = _outputs(module, {**fixed, name: torch.zeros_like(start)}, ids)

        def normal(change: Tensor) -> Tensor:
            """The normal matrix times ``change``."""
            return adjoint(_outputs(module, {**fixed, name: change}, ids) - base)

        # The preconditioner. Rows are read with weights that differ by orders of magnitude, so each element is scaled
        # by the norm of its row of the normal matrix N. Random signs s estimate it, since the mean of (N s)**2 is that
        # row's squared norm; the estimate is exact where no two elements share an output (one hash).
        generator = torch.Generator().manual_seed(0)
        signs = [torch.randint(0, 2, start.shape, generator=generator).to(start) * 2 - 1 for _ in range(4)]
        scale = torch.stack([normal(s).square() for s in signs]).mean(0).sqrt()
        scale.masked_fill_(scale == 0, 1.0)  # rows that no id reads
        residual = target - out.detach()
        gradient = adjoint(residual)
        direction = gradient / scale
        norm = (gradient * direction).sum()
        first = norm.clone()
        for _ in range(steps):
            if norm <= tolerance * first or norm == 0:
                break
            moved = _outputs(module, {**fixed, name: direction}, ids) - base
            curvature = error(moved)  # direction' N direction
            if curvature <= 0:
                break
            step = norm / curvature
            reached = residual - moved * float(step)
            # In exact arithmetic every step lowers the error. One that does not is rounding error, and later steps
            # would diverge.
            if not error(reached) < error(residual):
                break
            start.add_(direction, alpha=float(step))
            residual = reached
            gradient = adjoint(residual)
            scaled = gradient / scale
            previous, norm = norm, (gradient * scaled).sum()
            # The next direction is conjugate to all earlier ones: no step undoes what those have gained.
            direction.mul_(float(norm / previous)).add_(scaled)
        table.copy_(start)


def fit_tables(
    module: Fittable,
    weight: Tensor,
    counts: Tensor | None = None,
    sweeps: int = 5,
    steps: int = 50,
    names: Sequence[str] | None = None,
) -> None:
    """Set the module's tables so that ``materialize()`` approximates ``weight [num_embeddings, width]``.

    Args:
        counts: ``[num_embeddings]`` weight of each id's squared error; equal when None.
        sweeps: passes over the tables; one is enough where the program has a single table.
        steps: conjugate-gradient steps per table and pass.
        names: parameters to fit, each of which the output must be linear in; by default the program's tables.
    """
    width = module.output_dim
    if weight.shape[1] != width:
        weight = weight.repeat(1, width // weight.shape[1])
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    importance = torch.ones(len(weight)) if counts is None else counts.to(torch.float64)
    row_weight = (importance / importance.mean()).to(weight).unsqueeze(1)
    names = names or [t.name for t in module.program.tables]
    for _ in range(1 if len(names) == 1 else sweeps):
        for name in names:
            _solve_table(module, name, weight, row_weight, steps, tolerance=1e-10)


def importance_of(module: Fittable, weight: Tensor, counts: Tensor | None = None) -> Tensor:
    """How much the squared error of each row of ``weight`` counts: float64 ``[len(weight)]``, 0 for padding."""
    importance = torch.ones(len(weight)) if counts is None else counts.detach()
    importance = importance.to(weight.device, torch.float64)
    if module.padding_idx is None:
        return importance
    return importance.index_fill(0, importance.new_tensor([module.padding_idx], dtype=torch.int64), 0.0)


def principal_axes(weight: Tensor, importance: Tensor, count: int, ids: Iterable[Tensor]) -> Tensor:
    """The directions whose span holds most of some rows' weighted squares: float64 ``[width, count]``, orthonormal.

    These are the leading right singular vectors of the rows scaled by the square roots of ``importance``, so that
    coordinates along them are the best approximation of that rank (Eckart and Young 1936).

    Args:
        weight: ``[rows, width]``.
        importance: float64 ``[rows]``.
        count: of directions, at most ``width``.
        ids: the rows, in parts.
    """
    width = weight.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
    for part in ids:
        rows = weight[part].double()
        gram += rows.T @ (rows * importance[part].unsqueeze(1))
    # Eigenvalues ascend, so the last columns lead.
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]
