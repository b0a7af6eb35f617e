"""Id frequencies from every supported source: counts, curves, a data folder, its ``stats.json``, a data set.

Planners, reports and compression all read statistics through this module, so each accepts every source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeGuard, cast

import numpy as np
import torch
from torch import Tensor

from recsys_embed.errors import ConfigError, DataError, raise_faults
from recsys_embed.planning.curves import FrequencyCurve
from recsys_embed.typing import CountedData, FrequencySource, Statistics
from recsys_embed.utils.settings import FilePart, fault, param
from recsys_embed.utils.strict_json import read_object
from recsys_embed.utils.types import Counts, JSONMapping


def is_counted(source: object) -> TypeGuard[CountedData]:
    """Whether ``source`` is a data set that counts ids."""
    return callable(getattr(source, "counts", None)) and callable(getattr(source, "schema", None))


def is_stats_json(source: object) -> TypeGuard[JSONMapping]:
    """Whether it is the content of a data folder's ``stats.json``."""
    return isinstance(source, Mapping) and isinstance(source.get("fields"), Mapping) and "splits" in source


class CountsByFeature(Mapping[str, Tensor]):
    """Counts per id of a data set's features, read on access; features with raw ids are left out.

    Raises:
        ConfigError: not a data set that counts ids.
    """

    def __init__(self, data: object) -> None:
        if not is_counted(data):
            raise ConfigError(f"expected counts by feature, or an opened data set; got {type(data).__name__}")
        self._data = data
        self._names = [f.name for f in data.schema(1) if f.ids != "raw"]

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        counts = self._data.counts(name) if name in self._names else None
        if counts is None:
            raise KeyError(name)
        return counts


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Statistics of one feature.

    Args:
        given: counts per id, ``(ids, counts)``, a :class:`FrequencyCurve` or an object with one as ``curve``; None
            where only ``coarse`` is known.
        coarse: the curve of summary statistics.
        seen_once: values that occur once, where known.
        unseen: per split, the share of its occurrences whose value training did not know.
    """

    given: FrequencySource | None = None
    coarse: FrequencyCurve | None = None
    seen_once: int | None = None
    unseen: Mapping[str, float] | None = None

    def curve(self) -> FrequencyCurve:
        """How the lookups of the feature spread over its ids."""
        if self.given is None and self.coarse is not None:
            return self.coarse
        found = getattr(self.given, "curve", self.given)
        if isinstance(found, FrequencyCurve):
            return found
        ids, counts = self.counted
        curve = FrequencyCurve.from_counts(cast("Counts", counts))
        # That counts fall says how ids are numbered only where they are counts of the first ids.
        first = ids is None or torch.equal(ids, torch.arange(len(ids)))
        return curve if first else replace(curve, ranked=False)

    @cached_property
    def counted(self) -> tuple[Tensor | None, object]:
        """Distinct ids in rising order, or None for the first ones, and their counts.

        Raises:
            ConfigError: ``given`` is ``(ids, counts)`` of other shapes or types.
        """
        pair = self.given if isinstance(self.given, tuple) and len(self.given) == 2 else (None, self.given)
        if pair[0] is None:
            return None, pair[1]
        ids, counts = (np.asarray(p.detach().cpu() if isinstance(p, Tensor) else p) for p in pair)
        if ids.ndim != 1 or ids.shape != counts.shape or ids.dtype.kind not in "iu" or counts.dtype.kind not in "iuf":
            raise ConfigError(
                "counts of some ids are (ids [n], counts [n]) with integer ids; got shapes "
                f"{ids.shape} and {counts.shape} of {ids.dtype} and {counts.dtype}"
            )
        if not (counts >= 0).all():  # sums could hide them
            raise ConfigError(f"counts must be finite and not negative; got {counts.min()}")
        distinct, place = np.unique(ids.astype(np.int64), return_inverse=True)
        return torch.from_numpy(distinct), np.bincount(place, counts)


def read_statistics(source: Statistics) -> Iterator[tuple[str, FeatureStatistics]]:
    """Statistics of each feature in ``source``; a data set's counts are read one feature at a time.

    Args:
        source: a mapping of features to counts per id, ``(ids, counts)`` or curves; the content of a data folder's
            ``stats.json``, or the folder; a data set, whose counts are exact.

    Raises:
        ConfigError: none of these.
        DataError: the folder has no statistics.
    """
    if isinstance(source, (str, Path)):
        yield from _of_file(Path(source)).items()
    elif is_counted(source):
        yield from _of_data(source)
    elif is_stats_json(source):
        yield from _of_stats(source).items()
    elif isinstance(source, Mapping):
        for name, value in source.items():
            yield name, FeatureStatistics(value)
    else:
        raise ConfigError(
            "`stats` must be a mapping of feature names to counts, the content of a stats.json, an opened data set or "
            f"its folder; got {type(source).__name__}"
        )


def curves_from(stats: Statistics) -> dict[str, FrequencyCurve]:
    """Frequency curves by feature; for the sources see :func:`read_statistics`.

    Raises:
        ConfigError: no statistics, or a feature's counts are none.
        DataError: the folder has no statistics.

    >>> sorted(curves_from({"C1": [5, 3], "C2": FrequencyCurve.zipf(100)}))
    ['C1', 'C2']
    """
    curves, faults = {}, []
    for name, known in read_statistics(stats):
        try:
            curves[name] = known.curve()
        except (ConfigError, TypeError, ValueError) as e:
            faults.append(f"{e} (feature {name!r})")
    raise_faults(faults, "statistics")
    return curves


_MANY = 1 << 60  # numbers of rows and of distinct values, which curves take logarithms of


@dataclass(frozen=True)
class _Statistics(FilePart):
    splits: Mapping[str, object]
    fields: Mapping[str, object]


@dataclass(frozen=True)
class _Split(FilePart):
    rows: float = param(0.0, low=0, high=_MANY)


@dataclass(frozen=True)
class _Field(FilePart):
    """Numbers of a field, of which those that a sketch estimates may be no integers.

    ``occurrences`` of values, where they are not as many as training rows: of lists, and of columns that share ids.
    """

    distinct: float = param(MISSING, low=0, high=_MANY)
    num_embeddings: int = param(MISSING, low=1, high=_MANY)
    kept: int | None = param(None, low=0, high=_MANY)
    seen_once: float | None = param(None, low=0, high=_MANY)
    oov_rate: Mapping[str, float] | None = None
    coverage: object = None
    occurrences: float | None = param(None, low=0, high=_MANY)

    def conflicts(self) -> list[str]:
        faults = []
        if not all(isinstance(rate, int | float) for rate in (self.oov_rate or {}).values()):
            faults.append(fault("oov_rate", "numbers by split", self.oov_rate))
        shares = {} if self.coverage is None else self.coverage
        try:
            right = isinstance(shares, Mapping) and all(float(k) >= 0 and float(v) >= 0 for k, v in shares.items())
        except (TypeError, ValueError):
            right = False
        return faults if right else [*faults, fault("coverage", "shares by number of ids", shares)]


def _of_file(path: Path) -> dict[str, FeatureStatistics]:
    path = path / "stats.json" if path.is_dir() else path
    try:
        return _of_stats(read_object(path))
    except (OSError, ConfigError) as e:
        raise DataError(f"{path} holds no statistics of a data folder; make one with 'recsys-embed data'. {e}") from e


def _of_stats(stats: JSONMapping) -> dict[str, FeatureStatistics]:
    whole = _Statistics.read(stats, "statistics of a data folder")
    split = whole.splits.get("train", next(iter(whole.splits.values()), {}))
    rows = _Split.read(split, "split of the statistics").rows
    found, faults = {}, []
    for name, values in whole.fields.items():
        place = f"field {name!r}"
        try:
            field = _Field.read(values, place)
            once = None if field.seen_once is None else int(field.seen_once)
            unseen = {split: float(rate) for split, rate in (field.oov_rate or {}).items()}
            total = rows if field.occurrences is None else field.occurrences
            found[name] = FeatureStatistics(coarse=_curve_of_field(field, total), seen_once=once, unseen=unseen)
        except ConfigError as e:
            faults.append(str(e) if place in str(e) else f"{e} ({place})")
    raise_faults(faults, whole.where())
    return found


def _of_data(data: CountedData) -> Iterator[tuple[str, FeatureStatistics]]:
    """Exact counts, and what the data's statistics say besides."""
    stats = getattr(data, "stats", None)
    coarse = _of_stats(stats) if is_stats_json(stats) else {}
    for spec in data.schema(1):
        counts, rest = data.counts(spec.name), coarse.get(spec.name, FeatureStatistics())
        if counts is not None:
            yield spec.name, FeatureStatistics(counts, rest.coarse, rest.seen_once, rest.unseen)
        elif rest.coarse is not None:
            yield spec.name, rest


def _curve_of_field(field: _Field, rows: float) -> FrequencyCurve:
    """The curve of table ids: values too rare to be kept share one id."""
    distinct, once = max(1, int(field.distinct)), int(field.seen_once or 0)
    shares = cast("Mapping[str, float]", field.coverage or {})
    # Vocabularies number values by falling frequency; raw ids are numbers of any kind.
    curve = FrequencyCurve.from_coverage(shares, distinct, once, rows, ranked=field.kept is not None)
    if field.kept is None:
        return curve
    return curve.resized(min(field.num_embeddings, field.kept + 1)).resized(field.num_embeddings)
