"""Conversion of a torch.export program to an ONNX file: keeps assertions, drops paths, and writes external data."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.fx import Graph, Node

from recsys_embed.errors import ExportError
from recsys_embed.exports.onnx_ops import translations
from recsys_embed.exports.onnx_opset import OPSET, PURPOSE
from recsys_embed.utils.optional import require

# A protocol buffer holds less than 2 GiB, of which the tables may not take all.
EXTERNAL_BYTES = 3 * 2**29
EXTERNAL_FROM = 1024
DATA_NAME = re.compile(r"\.[0-9a-f]{16}\.data")

_REFUSES = "refuses: "
_ASSERTIONS = (torch.ops.aten._assert_async.msg, torch.ops.aten._assert_async.default)


def refuse_bad_ids(program: ExportedProgram) -> None:
    """Replace assertions in ``program``, in place, by reads that fail for the same inputs.

    ONNX has no assertion and its exporter drops those of torch, after which an id beyond its feature's range would
    read a row of another feature. Element 1 of a tensor of one element stands for a failed assertion: onnxruntime's CPU
    kernels refuse to read it and name the node, whose name is the assertion's message. (Its CUDA kernels return 0.)
    Every output adds what was read, so that no optimizer removes the read.
    """
    graph, aten = program.graph, torch.ops.aten
    asserted = [n for n in graph.nodes if n.op == "call_function" and n.target in _ASSERTIONS]
    if not asserted:
        return
    last = next(n for n in graph.nodes if n.op == "output")
    guard = None
    for node in asserted:
        with graph.inserting_before(node):
            held = node.args[0]
            text = node.args[1] if len(node.args) > 1 else "an assertion of the model failed"
            failed = _call(graph, aten.logical_not.default, held)
            index = _call(
                graph, aten.reshape.default, _call(graph, aten._to_copy.default, failed, dtype=torch.int64), [1]
            )
            zero = _call(graph, aten.new_zeros.default, index, [1])
            read = _call(graph, aten.index_select.default, zero, 0, index)
            # Of all that a node knows, this text is what the exporter hands on to the ONNX node.
            read.meta["stack_trace"] = _REFUSES + str(text)
        graph.erase_node(node)
        with graph.inserting_before(last):
            guard = read if guard is None else _call(graph, aten.add.Tensor, guard, read)
    renamed = {}
    with graph.inserting_before(last):
        scalar = _call(graph, aten.reshape.default, guard, [])
        for spec in program.graph_signature.output_specs:
            if spec.kind is not OutputKind.USER_OUTPUT or not isinstance(spec.arg, TensorArgument):
                continue
            if spec.arg.name not in renamed:
                out = next(n for n in last.all_input_nodes if n.name == spec.arg.name)
                zero = _call(graph, aten._to_copy.default, scalar, dtype=out.meta["val"].dtype)
                join = aten.logical_or.default if out.meta["val"].dtype is torch.bool else aten.add.Tensor
                renamed[out.name] = _call(graph, join, out, zero)
            spec.arg.name = renamed[spec.arg.name].name
    last.args = torch.fx.map_arg(last.args, lambda n: renamed.get(n.name, n))
    graph.lint()
    program.graph_module.recompile()


def translate(program: ExportedProgram) -> Any:
    """``program``, which is changed, as a ``torch.onnx.ONNXProgram`` of the same input names.

    Raises:
        ExportError: torch gives no graph.
        Exception: what torch raises, as where an operator has no translation.
        MissingDependencyError: onnx or onnxscript is not installed.
    """
    refuse_bad_ids(program)
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    count = kinds.count(OutputKind.USER_OUTPUT)
    names = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registry.level
    registry.setLevel(logging.ERROR)  # it warns that torchvision, which nobody asked for, is absent
    try:
        graph = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            output_names=names,
            custom_translation_table=translations(),
            verbose=False,
        )
    finally:
        registry.setLevel(level)
    if graph is None:
        raise ExportError("torch.onnx.export returned no graph")
    model = graph.model
    axes = {str(d.value): f"{v.name}_{i}" for v in model.graph.inputs for i, d in _symbolic(v)}
    graph.rename_axes({old: "batch" if len(axes) == 1 else new for old, new in axes.items()})
    _drop_notes(model)
    _rewrite_slow_operations(model)
    return graph


def _symbolic(value: Any) -> list[tuple[int, Any]]:
    return [(i, d) for i, d in enumerate(value.shape) if not isinstance(d, int)]


def write(graph: Any, file: Path, external_data: bool | None) -> list[Path]:
    """Write what :func:`translate` returns; with its tensors in a second file if asked to or above 1.5 GiB.

    The second file's name holds a digest of its content, so that a graph never meets another graph's tensors, even if
    writing was cut off between the two.

    Returns:
        The files, the graph first.
    """
    ir = require("onnxscript", extra="onnx", purpose=PURPOSE).ir
    held = [v.const_value for v in graph.model.graph.initializers.values()]
    if external_data is None:
        external_data = sum(t.nbytes for t in held) > EXTERNAL_BYTES
    if not external_data:
        ir.save(graph.model, file)
        return [file]
    digest = hashlib.blake2b(digest_size=8)
    for tensor in held:
        digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor.numpy()).view(np.uint8).data)
    data = file.with_name(f"{file.name}.{digest.hexdigest()}.data")
    ir.save(graph.model, file, external_data=data.name, size_threshold_bytes=EXTERNAL_FROM)
    return [file, data]


def _drop_notes(model: Any) -> None:
    """Name the nodes of :func:`refuse_bad_ids` by their messages; drop notes that hold paths of this machine.

    Args:
        model: an ``onnx_ir.Model``, changed in place.
    """
    graphs = [model.graph, *model.functions.values()]
    model.graph.metadata_props.clear()
    seen: dict[str, int] = {}
    for node in (n for g in graphs for n in g.all_nodes()):
        note = node.metadata_props.get("pkg.torch.onnx.stack_trace", "")
        if node.op_type == "Gather" and note.startswith(_REFUSES):
            text = note.removeprefix(_REFUSES)
            seen[text] = seen.get(text, 0) + 1
            node.name = text if seen[text] == 1 else f"{text} ({seen[text]})"  # names are unique
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


_PAIRS = {"Add", "Sub", "Mul", "Div", "Mod", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor"}
_PAIRS |= {"Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "Max", "Min"}


def _rewrite_slow_operations(model: Any) -> None:
    """Rewrite, in place, operations that are slow in onnxruntime's CPU kernels.

    A scalar meets a tensor whose last dimension is 1 element by element, 14 times slower than as ``[1, 1]``; a split
    into one part is a copy.
    """
    ir = require("onnxscript", extra="onnx", purpose=PURPOSE).ir
    wide: dict[str, Any] = {}
    for node in list(model.graph):
        if node.op_type == "Split" and len(node.outputs) == 1:
            # An output of the graph keeps its name, and so its node.
            if not node.outputs[0].is_graph_output():
                ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
                model.graph.remove(node, safe=True)
            continue
        if node.op_type not in _PAIRS or len(node.inputs) != 2:
            continue
        for i, (scalar, other) in enumerate([node.inputs, node.inputs[::-1]]):
            held, shape = scalar.const_value, other.shape
            if held is None or held.size != 1 or shape is None or len(shape) < 2 or shape[-1] != 1:
                continue
            if len(held.shape) < 2:
                if scalar.name not in wide:
                    value = ir.tensor(held.numpy().reshape(1, 1), name=f"{scalar.name}_1x1")
                    new = ir.Value(
                        name=value.name, shape=value.shape, type=ir.TensorType(value.dtype), const_value=value
                    )
                    model.graph.register_initializer(new)
                    wide[scalar.name] = new
                node.replace_input_with(i, wide[scalar.name])
    for name in wide:
        old = model.graph.initializers.get(name)
        if old is not None and not old.uses():
            model.graph.initializers.pop(name)


def _call(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Add a call together with the (fake) value that the exporter's passes expect at every node."""
    node = graph.create_node("call_function", target, args, kwargs)
    values = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta["val"] = target(*values[0], **values[1])
    return node
