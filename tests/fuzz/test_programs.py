"""A minute of random programs: every backend gives what the float64 oracle gives. ``make fuzz`` runs hours of them."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from recsys_embed.optim import list_rules
from recsys_embed.registry import list_methods
from tests.fuzz.few_bits import WAYS, draw_few_bits
from tests.fuzz.programs import FEW_BITS, FORMS, Program, draw
from tests.fuzz.shrink import explain, shrink
from tests.tiers import slow_but

CHUNKS, FAST, SIZE = 12, 2, 100
FEW = 30
"""Programs of a chunk whose rows train in few bits."""


@pytest.mark.parametrize("chunk", slow_but(range(CHUNKS), *range(FAST)))
def test_backends_agree(chunk: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = [text for seed in range(chunk * SIZE, (chunk + 1) * SIZE) if (text := explain(draw(seed)))]
    finally:
        torch.set_num_threads(before)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("chunk", slow_but(range(CHUNKS), 0))
def test_backends_agree_on_rows_of_few_bits(chunk: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = [text for seed in range(chunk * FEW, (chunk + 1) * FEW) if (text := explain(draw_few_bits(seed)))]
    finally:
        torch.set_num_threads(before)
    assert not found, "\n".join(found)


def test_every_method_that_can_draws_rows_of_few_bits() -> None:
    features = [f for seed in range(400) for f in draw_few_bits(seed).features]
    drawn = {f.method for f in features if f.options.get("quantization", "ptq") != "ptq"}
    assert {f.options.get("quantization") for f in features} == {None, *WAYS}
    for method in list_methods():
        computed = all(f.config().computes for f in features if f.method == method.name)
        assert (method.name in drawn) is not computed, method.name


def test_programs_hold_everything_that_is_registered() -> None:
    programs = [draw(seed) for seed in range(CHUNKS * SIZE)]
    features = [f for p in programs for f in p.features]
    assert {f.method for f in features} == {m.name for m in list_methods()}
    assert {p.rule for p in programs} == {None, *list_rules()}
    assert {s.form for p in programs for s in p.steps} == set(FORMS)
    assert {f.method for f in features if f.spec.get("table")} == {m.name for m in list_methods()}
    assert {f.method for f in features if f.spec.get("padding_idx") is not None} == {m.name for m in list_methods()}
    for method in list_methods():
        those = [f for f in features if f.method == method.name]
        options = {k for f in those for k in f.options}
        # Rows that are computed have no precision, and some tables have their own.
        own = method.config_cls.has_own_precisions or those[0].config().computes
        declared = {f.name for f in fields(method.config_cls)} - ({"precision"} if own else set()) - set(FEW_BITS)
        assert declared == options, f"never drawn: options {sorted(declared - options)} of {method.name!r}"


def test_a_seed_is_a_program() -> None:
    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_failing_programs_become_small() -> None:
    """Down to the one feature, step and id that the fault needs."""

    def fails(program: Program) -> tuple[str, str] | None:
        step = program.steps[-1]
        at = [i for i, f in enumerate(program.features) if f.method == "hash"]
        return ("found", "") if any(any(bag) for i in at for bag in step.ids[i]) else None

    program = next(p for p in map(draw, range(1000)) if len(p.features) > 2 and len(p.steps) > 1 and fails(p))
    small = shrink(program, "found", fails)
    assert [f.method for f in small.features] == ["hash"]
    assert len(small.steps) == 1
    assert sum(len(bag) for bag in small.steps[0].ids[0]) == 1
    assert small.rule is None
