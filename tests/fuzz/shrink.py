"""A failing program made smaller, step by step, for as long as it fails in the same way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.fuzz.check import Disagreement, run
from tests.fuzz.programs import Feature, Program, Step


def failure(program: Program) -> tuple[str, str] | None:
    """What is wrong: its kind, and in words; None if nothing is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            run(program)
    except Disagreement as e:
        return e.what, str(e)
    except Exception as e:
        return type(e).__name__, f"{type(e).__name__}: {e}"
    return None


def _without_features(p: Program) -> Iterator[Program]:
    for i in range(len(p.features) if len(p.features) > 1 else 0):
        steps = tuple(_without_feature(s, i) for s in p.steps)
        yield replace(p, features=p.features[:i] + p.features[i + 1 :], steps=steps)


def _without_feature(step: Step, i: int) -> Step:
    at = step.unpooled
    at = None if at is None or at == i else at - (at > i)
    return replace(step, ids=step.ids[:i] + step.ids[i + 1 :], unpooled=at)


def _without_steps(p: Program) -> Iterator[Program]:
    for i in range(len(p.steps) if len(p.steps) > 1 else 0):
        yield replace(p, steps=p.steps[:i] + p.steps[i + 1 :])


def _without_samples(p: Program) -> Iterator[Program]:
    for i, step in enumerate(p.steps):
        batch = len(step.ids[0])
        size = (batch + 1) // 2
        while size:
            for start in range(0, batch, size):
                ids = tuple(bags[:start] + bags[start + size :] for bags in step.ids)
                yield _with_step(p, i, replace(step, ids=ids))
            size //= 2


def _without_ids(p: Program) -> Iterator[Program]:
    for i, step in enumerate(p.steps):
        if step.form == "matrix":
            continue
        for f, bags in enumerate(step.ids):
            for b, bag in enumerate(bags):
                for k in range(len(bag)):
                    shorter = (*bags[:b], bag[:k] + bag[k + 1 :], *bags[b + 1 :])
                    yield _with_step(p, i, replace(step, ids=(*step.ids[:f], shorter, *step.ids[f + 1 :])))


def _simpler(p: Program) -> Iterator[Program]:
    for changes in ({"extras": ()}, {"rule": None, "rule_options": None}, {"sparse": False}, {"threads": 1}):
        yield replace(p, **changes)  # type: ignore[arg-type]
    for key in sorted({*(p.rule_options or ())} - {"lr", "eps"}):
        yield replace(p, rule_options={k: v for k, v in (p.rule_options or {}).items() if k != key})
    for i, s in enumerate(p.steps):
        for changes in (
            {"unpooled": None},
            {"weights": None},
            {"lr": None},
            {"before": ""},
            {"strided": False},
            {"int32": False},
        ):
            yield _with_step(p, i, replace(s, **changes))  # type: ignore[arg-type]
        if s.form in ("dict", "jagged"):
            yield _with_step(p, i, replace(s, form="bags"))
    for i, f in enumerate(p.features):
        for key in [k for k in f.options if k in ("seed", "order", "hash", "sign")]:
            options = {k: v for k, v in f.options.items() if k != key}
            yield _with_feature(p, i, replace(f, options=options))
        yield _with_feature(p, i, replace(f, counts=None))
        for key in ("unseen", "init", "pooling", "ids", "table", "padding_idx"):
            if f.spec.get(key) is not None:
                yield _with_feature(p, i, replace(f, spec={k: v for k, v in f.spec.items() if k != key}))
        yield _with_feature(p, i, replace(f, method="full", options={}))


def _with_step(p: Program, i: int, step: Step) -> Program:
    return replace(p, steps=(*p.steps[:i], step, *p.steps[i + 1 :]))


def _with_feature(p: Program, i: int, feature: Feature) -> Program:
    return replace(p, features=(*p.features[:i], feature, *p.features[i + 1 :]))


PASSES = (_without_features, _without_steps, _without_samples, _simpler, _without_ids)


def shrink(
    program: Program, kind: str, fails: Callable[[Program], tuple[str, str] | None] = failure, most: int = 400
) -> Program:
    """The smallest program found in ``most`` runs that fails with the same kind."""
    runs, again = 0, True
    while again and runs < most:
        again = False
        for smaller in PASSES:
            moved = True
            while moved and runs < most:
                moved = False
                for candidate in smaller(program):
                    if candidate == program:
                        continue
                    runs += 1
                    found = fails(candidate)
                    if found is not None and found[0] == kind:
                        program, moved, again = candidate, True, True
                        break
                    if runs >= most:
                        break
    return program


def snippet(program: Program) -> str:
    """Python that runs the program."""
    return (
        f"from tests.fuzz.check import run\nfrom tests.fuzz.programs import Feature, Program, Step\n\nrun({program!r})"
    )


def explain(program: Program) -> str | None:
    """What is wrong with a program, with the smallest that fails so and how to run it; None if nothing is."""
    found = failure(program)
    if found is None:
        return None
    small = shrink(program, found[0])
    text = failure(small)
    return f"seed {program.seed}: {found[1]}\n\nmade smaller: {text and text[1]}\n\n{snippet(small)}\n"
