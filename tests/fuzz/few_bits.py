"""Random programs whose rows train in few bits: the native backend beside torch's, since no oracle rounds at random.

One step of both may differ by a code where the last bits of a gradient decide how a number is rounded; later steps then
drift apart, so they are only run.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from recsys_embed import EmbeddingCollection
from recsys_embed.core.row_format import Quantization
from recsys_embed.errors import RecsysEmbedError
from recsys_embed.kernels.low_precision_table import LowPrecisionTable
from recsys_embed.registry import get_method
from tests.fuzz.check import (
    BACKENDS,
    build,
    close,
    direction,
    direction_seed,
    every_lookup,
    nearly_tied,
    restarted,
    same,
    set_rate,
    take_step,
)
from tests.fuzz.programs import Feature, Program, draw

PRECISIONS = ("int8", "int4", "int2", "fp16", "bf16")
WAYS = [q for q in get_args(Quantization) if q != "ptq"]


def draw_few_bits(seed: int) -> Program:
    """The program of a seed, with rows of few bits wherever its methods take them, half of the time with such state."""
    program, rng = draw(seed), random.Random(f"bits of {seed}")
    quantization, precision = rng.choice(WAYS), rng.choice(PRECISIONS)
    options = {"precision": precision, "quantization": quantization, "rounding": rng.choice(("stochastic", "nearest"))}
    if quantization == "lsq":  # such rows are stored unrounded
        del options["rounding"]
    features = tuple(_in_few_bits(f, options) for f in program.features)
    rule_options = program.rule_options
    if program.rule is not None and rng.random() < 0.5:
        rule_options = {**(rule_options or {}), "state_precision": rng.choice(("bf16", "8bit"))}
    return replace(program, features=features, rule_options=rule_options, extras=(), few_bits=True)


def _in_few_bits(feature: Feature, options: Mapping[str, Any]) -> Feature:
    own = get_method(feature.method).config_cls
    given = {k: v for k, v in feature.options.items() if k != "precision"}
    found = replace(feature, options={**given, **options})
    if own.has_own_precisions:
        # Tiers at two precisions, the rest as it was.
        found = replace(feature, options={**given, "quantization": "lpt", "precisions": ("int8", "int4", "bf16")})
    try:
        return feature if found.config().check(found.make()) else found
    except RecsysEmbedError:
        return feature


def run_few_bits(program: Program) -> None:
    """All checks of such a program.

    Raises:
        Disagreement: says what differs between the backends.
    """
    names = program.schema().names
    colls = {backend: build(program, backend) for backend in BACKENDS}
    for number, step in enumerate(program.steps):
        if nearly_tied(step, list(colls.values())):
            return
        outs: dict[str, Tensor] = {}
        for backend in BACKENDS:
            if step.before == "restart":
                before = _stored(colls[backend])
                colls[backend] = restarted(program, colls[backend], backend)
                for name, stored in before.items():
                    same(f"{backend}: rows of few bits after a restart", _stored(colls[backend])[name], stored)
            coll = colls[backend]
            set_rate(coll, step.lr)
            coll.zero_grad()
            outs[backend] = every_lookup(step, names, torch.float32)(coll)
        if number == 0:
            close("vectors of rows of few bits", outs["native"], outs["torch"], 1e-4)
        if not outs["torch"].requires_grad:
            return
        for backend, out in outs.items():
            (out * direction(direction_seed(program, number), out.shape)).sum().backward()
            take_step(colls[backend])
        if number == 0:
            for name in colls["torch"].storages:
                _check_stepped(colls["native"].get_parameter(name), colls["torch"].get_parameter(name))


def _stored(coll: EmbeddingCollection) -> dict[str, Tensor]:
    return {n: p.stored.clone() for n, p in coll.named_parameters() if isinstance(p, LowPrecisionTable)}


def _check_stepped(native: Tensor, torchs: Tensor) -> None:
    """After one step of both, rows differ by no more than how a number of few bits is rounded."""
    apart, rounded = torch.full(torchs.shape, 1e-4) + torchs.detach().to_dense().abs() * 1e-3, torchs.detach()
    if isinstance(rounded, LowPrecisionTable):
        format = rounded.format
        apart += rounded.distances() * 1.01 if format.bits else rounded.to_dense().abs() * 2.0**-7
    got = native.detach().to_dense()
    excess = ((got - rounded.to_dense()).abs() - apart).clamp_min(0)
    # Squares and roots of infinite gradients are infinite or no numbers on both.
    close("rows of few bits after a step", excess.nan_to_num(0.0, 0.0), torch.zeros_like(excess), 0.0)
