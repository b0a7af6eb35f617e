"""The fast tier leaves out combinations, never a value; what it leaves out is what the slow tier runs."""

from __future__ import annotations

import itertools

import pytest

from tests.tiers import covering

pytest_plugins = "pytester"
SIZES = [(5,), (3, 4), (14, 3, 2), (7, 7, 7), (2, 2, 2, 2, 2)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("strength", [1, 2, 3])
def test_every_combination_of_values_stays(sizes: tuple[int, ...], strength: int) -> None:
    cases = list(itertools.product(*map(range, sizes)))
    kept = covering(cases, strength)
    for at in itertools.combinations(range(len(sizes)), min(strength, len(sizes))):
        assert {tuple(cases[k][i] for i in at) for k in kept} == set(itertools.product(*(range(sizes[i]) for i in at)))
    fewest = 1
    for size in sorted(sizes)[-strength:]:
        fewest *= size
    assert fewest <= len(kept) <= max(fewest, 2 * fewest * (len(sizes) > strength))
    assert kept == covering(cases, strength), "the same in every run"
    if strength == 1 < len(sizes):
        assert len(kept) == fewest


def test_products_with_holes_are_covered_as_far_as_they_go() -> None:
    assert covering([(0, 0), (1, 1), (1, 0)], 1) in ([0, 1], [1, 2], [0, 1, 2])
    assert covering([(0, 0), (1, 1), (1, 0)], 2) == [0, 1, 2]


def test_both_tiers_together_are_all_tests(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        "from tests.conftest import pytest_addoption, pytest_collection_modifyitems, pytest_configure"
    )
    pytester.makepyfile("""
        import pytest

        @pytest.mark.slow
        def test_slow(): ...

        @pytest.mark.crossed
        @pytest.mark.parametrize(("a", "c"), [(0, 1), (1, 1), (2, 1)])
        @pytest.mark.parametrize("b", "xyz")
        def test_product(a, c, b): ...

        def test_plain(): ...
    """)

    def run(*args: str) -> dict[str, int]:
        return pytester.runpytest("-p", "no:cacheprovider", *args).parseoutcomes()

    assert run() == {"passed": 4, "deselected": 7}
    assert run("--tier=slow") == {"passed": 7, "deselected": 4}
    assert run("--tier=all") == {"passed": 11}
    assert run("--tier=all", "--seconds=1e-9") == {"skipped": 11}
