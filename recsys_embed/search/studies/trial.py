"""A trial's data without the test split, its trainer that reports to the study, and its checkpoint folder."""

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
from recsys_embed.train.quality import AUC, Quality


def without_test(data: DataSource) -> DataSource:
    """The data set without its test split."""
    return cast("DataSource", WithoutTestSplit(data))


class WithoutTestSplit:
    """A data set without its test split, so that no trainer of a study evaluates on it."""

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


class ReportingTrainer(Trainer):
    """A trainer that calls ``on_validation(step, value)`` after each validation but the last; it may raise to stop.

    A resumed trainer also reports the validations before its checkpoint, which a killed worker may not have reported.
    """

    on_validation: Callable[[int, float], None]
    quality: Quality = AUC

    def _train(self, stop: Any) -> None:
        over = self._finished() and not self.state.pending_validation
        for known in self.state.history[: -1 if over else None]:
            self.on_validation(int(known["step"]), float(known[self.quality.logged]))
        super()._train(stop)

    def _validate(self, stop: Any) -> None:
        before = len(self.state.history)
        super()._validate(stop)
        if len(self.state.history) > before and not self._finished():
            self.on_validation(self.state.step, float(self.state.history[-1][self.quality.logged]))


def key_of(config: TrainConfig) -> str:
    """Short key of a training run: a hash of its settings, which determine its result.

    >>> key_of(TrainConfig()) == key_of(TrainConfig(seed=0)) != key_of(TrainConfig(seed=1))
    True
    """
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


class TrainingFolders:
    """Folders with the checkpoints of unfinished training runs, named by :func:`key_of`.

    Args:
        folder: parent of these folders; None: keep no checkpoints.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     kept = TrainingFolders(Path(folder))
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
        """The folder of a training run, locked for this process.

        None if another process holds it: this process then trains from the start and keeps no checkpoints.
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
        """Remove the folder of a finished training run, unless another process holds it."""
        if self._folder is None or key is None or not (self._folder / key).exists():
            return
        with suppress(FolderHeldError), lock(self._folder / key):
            # The lock file is removed last: the next process to lock the folder then finds it empty.
            for path in sorted((self._folder / key).iterdir(), key=lambda path: path.name == LOCK_FILE):
                path.unlink()
            with suppress(OSError):  # another process has begun in it
                (self._folder / key).rmdir()

    def sweep(self, going: Collection[str]) -> None:
        """Remove all folders but those of the training runs in ``going``."""
        if self._folder is None or not self._folder.exists():
            return
        for folder in self._folder.iterdir():
            if folder.name not in going:
                self.forget(folder.name)
        with suppress(OSError):  # some are left
            self._folder.rmdir()
