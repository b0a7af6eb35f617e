"""What a trial of a study trains on, and who watches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from recsys_embed.errors import DataError
from recsys_embed.train.loop import Trainer


class Untested:
    """A data set that names no test split, so that no trainer of a study ends with a test."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self.splits = {s: data.splits[s] if isinstance(data.splits, Mapping) else None for s in ("train", "valid")}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def batches(self, split: str, *args: Any, **options: Any) -> Any:
        """Those of the data set.

        Raises:
            DataError: the test split was asked for.
        """
        if split not in self.splits:
            raise DataError(f"a study sees no rows of {split!r}")
        return self._data.batches(split, *args, **options)


class Hopeless(Exception):
    """Others do better with as few bytes."""


class Watched(Trainer):
    """A trainer that tells each validation but the last to ``watch(step, auc)``, which may end it."""

    watch: Callable[[int, float], None]

    def _validate(self, stop: Any) -> None:
        before = len(self.state.history)
        super()._validate(stop)
        if len(self.state.history) > before and not self._finished():
            self.watch(self.state.step, float(self.state.history[-1]["auc"]))
