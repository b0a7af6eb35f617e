"""What a trial of a study trains on, who watches it, and where it goes on if its process is killed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from recsys_embed.data.data_source import DataSource
from recsys_embed.data.folder import LOCK_FILE, FolderHeldError, lock
from recsys_embed.errors import DataError
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.loop import Trainer


def without_test(data: DataSource) -> DataSource:
    """The data set without its test split."""
    return cast("DataSource", Untested(data))


class Untested:
    """A data set that names no test split, so that no trainer of a study ends with a test."""

    def __init__(self, data: DataSource) -> None:
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
    """A trainer that tells each validation but the last to ``watch(step, auc)``, which may end it.

    One that goes on from a checkpoint tells those before it too, as whoever watches now may not have heard of them.
    """

    watch: Callable[[int, float], None]

    def _train(self, stop: Any) -> None:
        over = self._finished() and not self.state.pending_validation
        for known in self.state.history[: -1 if over else None]:
            self.watch(int(known["step"]), float(known["auc"]))
        super()._train(stop)

    def _validate(self, stop: Any) -> None:
        before = len(self.state.history)
        super()._validate(stop)
        if len(self.state.history) > before and not self._finished():
            self.watch(self.state.step, float(self.state.history[-1]["auc"]))


def key_of(config: TrainConfig) -> str:
    """Short name of a training: its settings decide all it comes to.

    >>> key_of(TrainConfig()) == key_of(TrainConfig(seed=0)) != key_of(TrainConfig(seed=1))
    True
    """
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


class Trainings:
    """Folders with the checkpoints of trainings that are not over, each named for what it trains.

    Args:
        folder: where they are; None: nothing is kept.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     kept = Trainings(Path(folder))
    ...     with kept.place("a") as mine, kept.place("a") as theirs:
    ...         print(mine.name, theirs)
    ...     kept.forget("a")
    ...     print(list(Path(folder).iterdir()))
    a None
    []
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @contextmanager
    def place(self, key: str) -> Iterator[Path | None]:
        """The folder of a training, for this process alone.

        None where another process is at the same training: this one then keeps nothing, and begins at the beginning.
        """
        folder = None if self._folder is None else self._folder / key
        with ExitStack() as stack:
            if folder is not None:
                try:
                    stack.enter_context(lock(folder))
                except FolderHeldError:
                    folder = None
            yield folder

    def forget(self, key: str | None) -> None:
        """Remove the folder of a training that is over, unless another process is at work in it."""
        if self._folder is None or key is None or not (self._folder / key).exists():
            return
        with suppress(FolderHeldError), lock(self._folder / key):
            # The lock goes last, so that whoever takes a new one finds nothing but what is its own.
            for path in sorted((self._folder / key).iterdir(), key=lambda path: path.name == LOCK_FILE):
                path.unlink()
            with suppress(OSError):  # another process has begun in it
                (self._folder / key).rmdir()

    def sweep(self, going: Collection[str]) -> None:
        """Remove the folders of all trainings but those that are ``going`` on."""
        if self._folder is None or not self._folder.exists():
            return
        for folder in self._folder.iterdir():
            if folder.name not in going:
                self.forget(folder.name)
        with suppress(OSError):  # some are left
            self._folder.rmdir()
