"""Compare a written graph with the model that it came from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recsys_embed.errors import ExportError, RecsysEmbedError
from recsys_embed.exports.graph_inputs import Inputs, batches, example_inputs, plain_bags, tensors
from recsys_embed.kernels.unseen_ids import UnseenIds
from recsys_embed.models import CTRModel
from recsys_embed.utils.optional import require

# Largest difference that other orders of summation explain, relative to the largest output (at least 1).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


class GraphCheck(NamedTuple):
    """Comparison of a graph with its model: largest absolute difference of outputs, and the batch sizes compared."""

    max_difference: float
    batches: tuple[int, ...]


@contextmanager
def serving(model: nn.Module) -> Iterator[None]:
    """Put every module of ``model`` in eval mode without counts of unseen ids, and restore their state afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    counters = [(module, module.counting) for module in model.modules() if isinstance(module, UnseenIds)]
    model.eval()
    for counter, _ in counters:
        counter.counting = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for counter, counting in counters:
            counter.counting = counting


@contextmanager
def without_exporter_warnings() -> Iterator[None]:
    """Suppress deprecation warnings from inside torch's exporters, which callers cannot act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        yield


@contextmanager
def refused_by(step: str, model: nn.Module, made_up: bool) -> Iterator[None]:
    """What exporters and runtimes raise, in one sentence that says what to do.

    Args:
        step: what they do with the model, "written as ONNX".
        model: of the graph.
        made_up: whether its inputs are not the caller's.
    """
    try:
        yield
    except (ExportError, ImportError, MemoryError, OSError):
        raise
    except Exception as e:
        if isinstance(e, RecsysEmbedError) and not (made_up and isinstance(model, CTRModel)):
            raise
        cause: BaseException = e
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        why = (lines[0] if lines else type(cause).__name__)[:300].rstrip(".:")
        name = f"model {model.key!r}" if isinstance(model, CTRModel) else f"a {type(model).__name__}"
        cure = "serve it from Python with recsys_embed.export and recsys_embed.load"
        if made_up and isinstance(model, CTRModel):
            cure = f"give a batch of its data, `inputs=(batch.dense, batch.inputs)`, or {cure}"
        raise ExportError(f"{name} cannot be {step}: {why}; {cure}") from e


def check_graph(
    path: str | os.PathLike[str],
    model: nn.Module,
    inputs: Inputs | Tensor | None = None,
    *,
    vary: bool = True,
    tolerance: float | None = None,
) -> GraphCheck:
    """Run the graph at ``path`` and ``model`` (in eval mode) on the same inputs and compare all outputs.

    Args:
        path: a ``.pt2`` or ``.onnx`` file.
        inputs: arguments of ``model``. Without, those of the library's own modules are made up in batches of 1, 5 and
            300, with ids at the ends of their range, or anywhere in int64 for methods that hash.
        vary: given inputs are compared with one sample and repeated, too, where their first dimension is the batch.
        tolerance: allowed difference relative to the largest output (at least 1): by default 1e-5 for float32 outputs,
            more for halves, less for doubles. Other outputs must be equal.

    Raises:
        ExportError: outputs differ in number, shape or dtype, or by more than the tolerance, or the graph does not run.
    """
    path = Path(path)
    run = _torch_runner(path) if path.suffix == ".pt2" else _onnx_runner(path)
    worst, sizes = 0.0, []
    made_up = inputs is None
    for batch in batches(model, example_inputs(model, inputs), made_up, vary):
        with serving(model):
            wanted = tensors(model(*batch))
        sizes.append(next((t.shape[0] for t in tensors(batch) if t.dim()), 1))
        with refused_by("run as it was written", model, made_up):
            got = run(batch)
        worst = max(worst, _compare(got, wanted, tolerance, f"{path.name}, batch of {sizes[-1]}"))
    return GraphCheck(worst, tuple(sizes))


def _torch_runner(path: Path) -> Callable[[Inputs], list[Tensor]]:
    with without_exporter_warnings():
        module = torch.export.load(path).module()

    def run(inputs: Inputs) -> list[Tensor]:
        with torch.no_grad():
            return tensors(module(*plain_bags(inputs)))

    return run


def _onnx_runner(path: Path) -> Callable[[Inputs], list[Tensor]]:
    runtime = require("onnxruntime", extra="onnx", purpose="running an ONNX graph")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> list[Tensor]:
        given = [t.detach().cpu().numpy() for t in tensors(inputs)]
        feed = dict(zip((i.name for i in session.get_inputs()), given, strict=True))
        return [torch.from_numpy(out) for out in session.run(None, feed)]

    return run


def _compare(got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float | None, where: str) -> float:
    """The largest absolute difference; raises if the structure of outputs differs."""
    kinds = [[(tuple(t.shape), t.dtype) for t in side] for side in (got, wanted)]
    if kinds[0] != kinds[1]:
        raise ExportError(f"the graph's outputs must be {kinds[1]} as the model's; got {kinds[0]} ({where})")
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        a, b = a.cpu().double(), b.cpu().double()
        difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).nan_to_num(nan=torch.inf)
        most = float(difference.max()) if difference.numel() else 0.0
        kind = kinds[0][0][1]
        size = float(b.nan_to_num(0.0, 0.0, 0.0).abs().max()) if b.numel() else 0.0
        allowed = (TOLERANCE.get(kind, 0.0) if tolerance is None else tolerance) * max(1.0, size)
        if most > allowed:
            raise ExportError(
                f"the graph's outputs may differ from the model's by {allowed:.3g}; they differ by {most:.3g} ({where})"
            )
        worst = max(worst, most)
    return worst
