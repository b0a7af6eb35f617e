"""What stands beside a trained collection: drop-ins, exports, plans as texts, and other numbers of threads."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, Plan
from tests.fuzz.check import (
    Arguments,
    Disagreement,
    arguments,
    build,
    close,
    direction,
    direction_seed,
    every_lookup,
    flat,
    restarted,
    same,
    set_rate,
    take_step,
)
from tests.fuzz.programs import Feature, Program


def check_beside(program: Program, native: EmbeddingCollection) -> None:
    """The extras of a program, given its trained collection."""
    schema, plan = program.schema(), program.plan()
    if Plan.from_dict(json.loads(plan.to_json())) != plan:
        raise Disagreement("plan", "its JSON is not read back as it was")
    last = arguments(program.steps[-1], schema.names, torch.float32)
    native.eval()
    if "threads" in program.extras:
        _check_threads(program, native)
    with torch.no_grad():
        wanted = last(native)
    if "drop_in" in program.extras:
        for i in range(len(program.features)):
            _check_drop_in(program, native, wanted, i)
    if "export" in program.extras:
        with torch.no_grad():
            _check_exports(program, native, last, wanted)


def _check_threads(program: Program, native: EmbeddingCollection) -> None:
    """The same bits of tables and states for another number of threads; about the same where torch multiplies matrices.

    The bits of torch's products of matrices depend on the number of threads, and heads are such products.
    """
    exact = all(p.head is None for p in native.bundle.programs.values())
    torch.set_num_threads(1 + program.threads % 3)
    again = build(program, "native")
    names = program.schema().names
    for number, step in enumerate(program.steps):
        if step.before == "restart":
            again = restarted(program, again, "native")
        call = every_lookup(step, names, torch.float32)
        if step.before == "look":
            call(again.eval())
            again.train()
        set_rate(again, step.lr)
        out = call(again)
        if out.requires_grad:
            (out * direction(direction_seed(program, number), out.shape)).sum().backward()
            take_step(again)
        again.catch_up_()
    for (name, a), (_, b) in zip(native.state_dict().items(), again.state_dict().items(), strict=True):
        what = f"threads: {name.rstrip('0123456789')}"
        if exact or not a.is_floating_point():
            same(what, b, a)
        else:
            close(what, b, a, 1e-4)


def _drop_in(feature: Feature, native: EmbeddingCollection, **options: Any) -> Any:
    """The module of one feature with the collection's tables."""
    spec = feature.make()
    module = rse.make_embedding(
        feature.method,
        spec.num_embeddings,
        spec.embedding_dim,
        config=feature.config(),
        name=spec.table_name,
        **options,
    )
    if feature.counts is not None:
        generator = torch.Generator().manual_seed(feature.counts)
        module.assign_(torch.randint(0, 1 + spec.num_embeddings, (spec.num_embeddings,), generator=generator))
    dense = native.bundle.dense_tables()
    with torch.no_grad():
        for table in module.program.tables:
            key = table.name if table.shared else f"{spec.table_name}.{table.name}"
            module.table(table.name).copy_(dense[key] if key in dense else native.table(key))
    return module


def _check_drop_in(program: Program, native: EmbeddingCollection, wanted: Tensor, number: int) -> None:
    """It gives the collection's vectors, its gradients are those in float64, and padding is no id."""
    step, feature = program.steps[-1], program.features[number]
    spec, bags = feature.make(), step.ids[number]
    if spec.ids == "raw" or f"feature_{spec.table_name}" in getattr(native.bundle, "own", {}):
        return
    single = step.form == "matrix"
    padding = spec.padding_idx
    # A drop-in of full tables has torch's padding, which is a row; to hashing ones -1 is another id beside padding.
    if padding is not None and ((single and feature.method == "full") or any(-1 in bag for bag in bags)):
        return
    options: dict[str, Any] = {"mode": None if single else spec.pooling, "unseen": spec.unseen, "padding_idx": padding}
    if not single:
        options["include_last_offset"] = True
    values, offsets = flat([bags], step)
    given = (values,) if single else (values, offsets)
    module = _drop_in(feature, native, sparse=program.sparse and spec.pooling != "max", **options)
    got = module(*given)
    if step.weights is None:
        column = wanted.flatten(1).split(native.bundle.widths, 1)[number]
        close("drop-in vectors", got, column, 2e-5)
    w, twin = direction(direction_seed(program, 999), got.shape), copy.deepcopy(module).double()
    if got.requires_grad:
        (got * w).sum().backward()
        (twin(*given) * w.double()).sum().backward()
    for (name, p), (_, q) in zip(module.named_parameters(), twin.named_parameters(), strict=True):
        if p.grad is not None or q.grad is not None:
            pair = [torch.zeros(p.shape) if g is None else g.to_dense() for g in (p.grad, q.grad)]
            close(f"drop-in gradient of {name.rstrip('0123456789')}", *pair, 2e-4)
    some = next((i for bag in bags for i in bag if 0 <= i < spec.num_embeddings), None)
    if (
        some is not None and padding is None and (not single or feature.method != "full")
    ):  # torch's padding has a row, which lookups give
        _check_padding(program, native, number, some, given, options)


def _check_padding(
    program: Program, native: EmbeddingCollection, number: int, padding: int, given: Any, options: dict[str, Any]
) -> None:
    """Vectors without it, which are zeros where an id has one of its own."""
    step, feature = program.steps[-1], program.features[number]
    bags: Sequence[Sequence[int]] = [[i for i in bag if i != padding] for bag in step.ids[number]]
    got = _drop_in(feature, native, **{**options, "padding_idx": padding})(*given)
    alone = _drop_in(feature, native, **{**options, "mode": feature.make().pooling, "include_last_offset": True})
    close("drop-in vectors with padding", got, alone(*flat([bags], replace(step, form="bags"))), 2e-5)


def _check_exports(program: Program, native: EmbeddingCollection, call: Arguments, wanted: Tensor) -> None:
    """What is loaded from an export gives the vectors of its source, and backends decode alike."""
    precision: Any = ("fp32", "fp16", "bf16", "int8", "int4")[program.seed % 5]
    backends: tuple[Any, ...] = ("auto", "torch")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.safetensors"
        rse.export(native, path, precision)
        loaded = {backend: rse.load(path, backend=backend) for backend in backends}
        if precision == "fp32":
            close("export: vectors beside the source's", call(loaded["auto"]), wanted, 1e-6)
        close("export: vectors of auto beside torch's", call(loaded["auto"]), call(loaded["torch"]), 1e-5)
