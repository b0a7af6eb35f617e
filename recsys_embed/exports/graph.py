"""Whole models as graphs that run without this library: a torch.export program, or ONNX.

Either file holds the dense part and the lookup with its tables, takes batches of any size, and is run once against the
model it came from before the function returns.
"""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from recsys_embed.data.serving.stored import StoredEncoders
from recsys_embed.errors import ConfigError, ExportError
from recsys_embed.exports import onnx_file
from recsys_embed.exports.encoders import FileScorer, encoders_for, rows_json, write_rows_json
from recsys_embed.exports.graph_check import GraphCheck, check_graph, refused_by, serving, without_exporter_warnings
from recsys_embed.exports.graph_inputs import Inputs, example_inputs, plain_bags, tensors
from recsys_embed.kernels.low_precision_states import low_precision_tables
from recsys_embed.models import CTRModel
from recsys_embed.utils.files import move_into_place
from recsys_embed.utils.optional import require
from recsys_embed.utils.types import DynamicShapes

if TYPE_CHECKING:
    from recsys_embed.data.loader import Dataset

__all__ = ["GraphCheck", "GraphFile", "check_graph", "to_onnx", "to_torch_export"]


@dataclass(frozen=True)
class GraphFile:
    """A written graph and its largest difference from the model.

    Attributes:
        files: the graph, then the file of its tables where they stand apart.
        nbytes: of all files.
        check: None if it was not asked for.
    """

    files: tuple[Path, ...]
    nbytes: int
    check: GraphCheck | None


def _trace(model: nn.Module, inputs: Inputs, dynamic_shapes: DynamicShapes, made_up: bool) -> ExportedProgram:
    """The model in eval mode as an exported program with a dynamic batch size and without dead code."""
    short = [tuple(t.shape) for t in tensors(inputs) if dynamic_shapes is None and t.dim() and t.shape[0] < 2]
    if short:
        raise ConfigError(
            f"example inputs need a first dimension of 2 or more to let it vary; got shapes {short}. Where an input "
            "has no batch dimension, say with `dynamic_shapes` (as torch.export takes it) which dimensions vary"
        )
    if dynamic_shapes is None:
        vary = {0: Dim.DYNAMIC}
        dynamic_shapes = pytree.tree_map(lambda t: vary if isinstance(t, Tensor) and t.dim() else None, inputs)
    with refused_by("traced by torch.export", model, made_up), serving(model), without_exporter_warnings():
        program = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes)
    _prune(program)
    for node in program.graph.nodes:
        # Where in whose files a line of Python stood is no business of a serving machine.
        node.meta.pop("stack_trace", None)
    return program


def _prune(program: ExportedProgram) -> None:
    """Drop tensors that no operation reads, such as the state of an optimizer."""
    stored = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    for spec in list(program.graph_signature.input_specs):
        node = nodes[spec.arg.name]
        if spec.kind in stored and not node.users:
            program.graph.erase_node(node)
            program.graph_signature.input_specs.remove(spec)
            program.state_dict.pop(cast("str", spec.target), None)
            program.constants.pop(cast("str", spec.target), None)
    program.graph_module.recompile()


def to_torch_export(
    model: nn.Module,
    path: str | os.PathLike[str],
    inputs: Inputs | Tensor | None = None,
    *,
    dynamic_shapes: DynamicShapes = None,
    check: bool = True,
    tolerance: float | None = None,
) -> GraphFile:
    """Write ``model`` as a torch.export program; ``torch.export.load(path).module()`` runs it with torch alone.

    It computes what the model computes in eval mode, with the model's own operators. An id out of range that raises
    :class:`IdRangeError` in the model raises ``RuntimeError`` in the program. Batches of any size pass, an empty one
    included; a collection's bags in the form ``(values, offsets)`` take two samples or more.

    Ahead-of-time compilation asks for example inputs, which the file does not hold: set ``program.example_inputs =
    (inputs, {})`` of what ``torch.export.load`` returns before ``torch._inductor.aoti_compile_and_package``.

    The file is a zip archive of torch's: the program as JSON, tensors as raw bytes, and nothing pickled.
    ``torch.export.load`` compiles Python from it (its shape guards), so load only files you trust.

    Args:
        model: a :class:`CTRModel`, :class:`EmbeddingCollection`, drop-in or any module that holds some; on any device.
        path: ends in ``.pt2``; replaced in one step once the new file is whole.
        inputs: example arguments of ``model``, tensors or nested containers of them. Of the library's own modules they
            are made up: ``(dense [B, num_dense], ids [B, F])`` of models, ids ``[B, F]`` of collections, ids ``[B]`` of
            drop-ins, ids ``[n]`` and offsets ``[bags]`` of drop-ins with a mode. Of a model with lists of ids that was
            not loaded with its encoders, give a batch of its data: ``(batch.dense, batch.inputs)``; the
            program takes bags as a pair, ``(values, offsets)``.
        dynamic_shapes: which dimensions vary, as ``torch.export.export`` takes it; the first of every input by default.
        check: run the file against the model; see :func:`check_graph`.

    Raises:
        ConfigError: no example inputs for a module of somebody else's, or none of which the batch could vary.
        ExportError: the exporter refuses the model, or the file's outputs are not those of the model; nothing is left
            at ``path`` but what was there.

    >>> import recsys_embed as rse
    >>> emb = rse.make_embedding("hash", 1000, 4, num_buckets=50)
    >>> folder = getfixture("tmp_path")
    >>> to_torch_export(emb, folder / "emb.pt2").check.max_difference
    0.0
    >>> ids = torch.tensor([3, 2**40, -1])
    >>> torch.equal(torch.export.load(folder / "emb.pt2").module()(ids), emb(ids))
    True
    """
    target = _target(path, ".pt2")
    example = plain_bags(example_inputs(model, inputs))
    program = _trace(model, example, dynamic_shapes, inputs is None)
    program.example_inputs = None  # torch would pickle them into the file

    def write(file: Path) -> list[Path]:
        with without_exporter_warnings():
            torch.export.save(program, file)
        return [file]

    def compare(file: Path) -> GraphCheck:
        return check_graph(file, model, inputs, vary=dynamic_shapes is None, tolerance=tolerance)

    return _publish(target, write, compare if check else None)


def to_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    inputs: Inputs | Tensor | None = None,
    *,
    dynamic_shapes: DynamicShapes = None,
    external_data: bool | None = None,
    check: bool = True,
    tolerance: float | None = None,
    encoders: Dataset | str | Path | Literal[False] | None = None,
) -> GraphFile:
    """Write ``model`` as an ONNX graph of opset 18, hashes and rows exact for every int64 id.

    The graph takes ids. A model with encoders of raw rows gets a JSON file beside it, ``PATH.json``, that says how to
    make ids and numbers of them (docs/serving.md); the features that are lists then take bags of ids.

    ``torch.onnx.export`` cannot do this: it has no ONNX for operators by which quantised rows are read, such as
    ``view.dtype``, which takes bytes for numbers of another type; here these are written in terms of ones it has.

    It computes what the model computes in eval mode. ONNX has no assertions: where the model raises
    :class:`IdRangeError`, a node named after the message reads beyond a tensor, so that onnxruntime's CPU kernels
    refuse the batch. Its GPU kernels do not; check ids before they arrive there. Models that multiply a matrix and a
    vector (fm, deepfm and others with first-order weights) refuse an empty batch in onnxruntime.

    Args:
        model: as :func:`to_torch_export`; so are ``inputs``, ``dynamic_shapes`` and ``check``.
        path: ends in ``.onnx``; replaced in one step once the new file is whole.
        external_data: put the tables into a file beside it; None does so beyond 1.5 GiB, which ONNX demands at 2.
        encoders: as :func:`recsys_embed.export`.

    Raises:
        ConfigError: no example inputs for a module of somebody else's, or none of which the batch could vary.
        ExportError: the exporter refuses the model, or the file's outputs are not those of the model; nothing is left
            at ``path`` but what was there.
        MissingDependencyError: onnx or onnxscript, or for the check onnxruntime, is not installed.

    >>> import recsys_embed as rse
    >>> emb = rse.make_embedding("hash", 1000, 4, num_buckets=50)
    >>> to_onnx(emb, getfixture("tmp_path") / "emb.onnx").check.max_difference
    0.0
    """
    target = _target(path, ".onnx")
    for library in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
        require(library, extra="onnx", purpose=onnx_file.PURPOSE)
    if any(name for module in model.modules() for name, _ in low_precision_tables(module)):
        raise ExportError(
            "rows that train in few bits (`quantization`) have no ONNX; export the model first, then write "
            "to_onnx(recsys_embed.load(path))"
        )
    stored = encoders_for(model, encoders, None)
    with _with_encoders(model, stored):
        example = example_inputs(model, inputs)
        program = _trace(model, example, dynamic_shapes, inputs is None)
        with refused_by("written as ONNX", model, inputs is None), without_exporter_warnings():
            graph = onnx_file.translate(program)

    def write(file: Path) -> list[Path]:
        files = onnx_file.write(graph, file, external_data)
        return files if stored is None else [*files, write_rows_json(file, stored, graph)]

    def compare(file: Path) -> GraphCheck:
        with _with_encoders(model, stored):
            return check_graph(file, model, inputs, vary=dynamic_shapes is None, tolerance=tolerance)

    written = _publish(target, write, compare if check else None)
    if stored is None:
        rows_json(target).unlink(missing_ok=True)
    return written


@contextmanager
def _with_encoders(model: nn.Module, stored: StoredEncoders | None) -> Iterator[None]:
    """A model that knows its lists meanwhile."""
    former = getattr(model, "scorer", None)
    if stored is not None and isinstance(model, CTRModel):
        model.scorer = FileScorer(stored)
    try:
        yield
    finally:
        if stored is not None and isinstance(model, CTRModel):
            model.scorer = former


def _target(path: str | os.PathLike[str], suffix: str) -> Path:
    target = Path(path)
    if target.suffix != suffix or os.path.isdir(target) or "\0" in str(target):
        raise ConfigError(f"`path` must be a file that ends in {suffix}; got {str(path)!r}")
    return target


def _publish(
    target: Path, write: Callable[[Path], list[Path]], compare: Callable[[Path], GraphCheck] | None
) -> GraphFile:
    """Write files into a folder beside ``target``, compare, and only then move them into place, the graph last."""
    checked = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            files = write(Path(folder) / target.name)
            if compare:
                checked = compare(files[0])
            move_into_place(files, target.parent)
        files = [target.parent / file.name for file in files]
        for stale in target.parent.glob(f"{glob.escape(target.name)}.*.data"):
            if stale not in files and onnx_file.DATA_NAME.fullmatch(stale.name.removeprefix(target.name)):
                stale.unlink()
    except OSError as e:
        raise ExportError(f"{target} could not be written: {e.strerror or e}") from e
    return GraphFile(tuple(files), sum(f.stat().st_size for f in files), checked)
