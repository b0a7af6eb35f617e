"""Which features batched kernels leave to torch, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from recsys_embed.core.program import LookupProgram
from recsys_embed.features import FeatureSpec
from recsys_embed.kernels.native.records import supported
from recsys_embed.kernels.places import Place


def features_for_torch(
    specs: Sequence[FeatureSpec],
    programs: Sequence[LookupProgram],
    places: Sequence[Mapping[str, Place]],
    *,
    bags: bool,
) -> set[int]:
    """Positions of features whose transforms the kernels lack; for bags, also of those that kernels cannot pool.

    These are pooled by maxima, or have a head that applies to every id. Features whose rows are computed
    (:attr:`recsys_embed.core.heads.Head.generates`) are looked up by distinct ids of their own, so that only their
    transforms count. A feature that shares a table with one of
    these goes with it: an optimizer steps a row once per backward, by the gradients of all that read it.
    """
    out = {i for i, p in enumerate(programs) if not supported(p)}
    if bags:
        pooled = {i for i, s in enumerate(specs) if s.pooling == "max"}
        pooled |= {i for i, p in enumerate(programs) if p.head is not None and p.head.pools == "ids"}
        out |= pooled - {i for i, p in enumerate(programs) if p.generates}
    readers = _readers(places)
    before = -1
    while before != len(out):
        before = len(out)
        for together in readers.values():
            if not out.isdisjoint(together):
                out |= together
    return out


def _readers(places: Sequence[Mapping[str, Place]]) -> dict[Place, set[int]]:
    """The features that read each table."""
    readers: dict[Place, set[int]] = {}
    for i, tables in enumerate(places):
        for place in tables.values():
            readers.setdefault(place, set()).add(i)
    return readers


def readers_of_shared_places(places: Sequence[Mapping[str, Place]]) -> set[int]:
    """Positions of the features that read a table beside others."""
    return {i for together in _readers(places).values() if len(together) > 1 for i in together}


def unknown_transforms(program: LookupProgram) -> list[str]:
    """Names of the transforms of a program that the kernels lack."""
    row_lookups = [p for p in program.row_lookups if not supported(replace(program, row_lookups=(p,)))]
    names = {
        type(t).__name__: None
        for p in row_lookups
        for t in p.transforms
        if not supported(replace(program, row_lookups=(replace(p, transform=t, weight=None),)))
    }
    return list(names)
