"""Which tests run when: all but those marked ``slow`` by default (``make test``), everything with ``--tier all``.

``@pytest.mark.crossed`` is for tests over a product of parameters: by default run as few of its combinations as show
every value of each parameter once, ``@pytest.mark.crossed(2)`` as few as show every pair of values of two parameters
together. The others are slow. Which ones is the same in every run.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import pytest

TIERS = ("fast", "slow", "all")


def covering(cases: Sequence[tuple[Hashable, ...]], strength: int = 1) -> list[int]:
    """Positions of cases that hold every combination of values of any ``strength`` columns that some case holds.

    Greedy, so not the fewest; ties go to an order drawn with a fixed seed, so that all values turn up equally often.
    """
    columns = list(itertools.combinations(range(len(cases[0])), min(strength, len(cases[0]))))
    shown = [{(at, tuple(case[i] for i in at)) for at in columns} for case in cases]
    missing = set().union(*shown)
    order = random.Random(0).sample(range(len(cases)), len(cases))
    kept = []
    while missing:
        best = max(order, key=lambda i: len(shown[i] & missing))
        missing -= shown[best]
        kept.append(best)
    return sorted(kept)


def slow_but(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Values of a parameter for ``parametrize``, all slow but those named."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def case_of(item: pytest.Function) -> tuple[Hashable, ...]:
    """What one test of a product holds: one value per ``parametrize``, told apart by identity, and per fixture."""
    values = {name: id(value) for name, value in item.callspec.params.items()}
    columns: list[Hashable] = []
    for marker in item.iter_markers("parametrize"):
        names = marker.args[0]
        names = names.replace(" ", "").split(",") if isinstance(names, str) else names
        columns.append(tuple(values.pop(name) for name in names))
    return (*columns, *(values[name] for name in sorted(values)))


def mark_crossed(items: Sequence[pytest.Item]) -> None:
    """Mark as slow what the fast tier leaves out of products of parameters."""
    tests: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("crossed"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        marker = cases[0].get_closest_marker("crossed")
        found = [case_of(item) for item in cases]
        if len(found[0]) < 2:
            raise pytest.UsageError(f"{cases[0].nodeid}: `crossed` needs two parameters or more; use slow_but for one")
        kept = set(covering(found, *marker.args))
        for position, item in enumerate(cases):
            if position not in kept:
                item.add_marker(pytest.mark.slow)


def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests of the tier that was asked for."""
    mark_crossed(items)
    tier = config.getoption("tier")
    if tier == "all":
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    items[:], left = (fast, slow) if tier == "fast" else (slow, fast)
    if left:
        config.hook.pytest_deselected(items=left)


class Deadline:
    """Skips what would begin after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.end = seconds, time.monotonic() + seconds

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() > self.end:
            pytest.skip(f"the {self.seconds:g} s of this run are over")
