"""Where a study's trials are kept, and what its faults mean."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from recsys_embed.data.folder import StorageError

LEASE = 600.0
"""Seconds after which a trial of another machine that has not reported is taken for lost."""
_JOURNAL = (".journal", ".log")


def open_storage(where: str) -> Any:
    """Storage of a URL (``sqlite:///``, ``postgresql://``, ``mysql://``), or of a file: a journal if its name ends so.

    Raises:
        StorageError: it cannot be reached, is locked or no storage.
    """
    with faults_of(where):
        if "://" in where:
            arguments = {"connect_args": {"timeout": 60}} if where.startswith("sqlite") else {"pool_pre_ping": True}
            return optuna.storages.RDBStorage(where, engine_kwargs=arguments)
        path = Path(where)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in _JOURNAL:
            return optuna.storages.JournalStorage(JournalFileBackend(str(path)))
        return open_storage(f"sqlite:///{path}")


@contextmanager
def faults_of(where: str) -> Iterator[None]:
    """Say in one sentence what is wrong with a storage."""
    try:
        yield
    except StorageError:
        raise
    except Exception as e:
        kind = type(e)
        if not any(
            (base.__module__ or "").partition(".")[0] == "sqlalchemy" or base.__name__ == "StorageInternalError"
            for base in kind.__mro__
        ) and not (isinstance(e, OSError) and where.endswith(_JOURNAL)):
            raise
        cause = e.__cause__ or e
        text = str(cause).splitlines()[0]
        shown = where.partition("://")[0] + "://..." if "@" in where else where
        if "locked" in text:
            hint = "another process holds it; wait for it, or use a journal file or a database server for many workers"
        elif "no such table" in text or "No such file" in text:
            hint = "it has vanished or was replaced while in use; put it back, then run the same command again"
        else:
            hint = "see that it can be reached and written, then run the same command again"
        raise StorageError(f"the study's storage {shown} failed ({text}); {hint}") from e


def owner() -> str:
    """This process, for others to see whether it lives."""
    return f"{socket.gethostname()}:{os.getpid()}"


def requeue_lost(study: optuna.Study, storage: Any) -> int:
    """Queue again the trials whose workers are gone, and return how many; several workers may do so at once."""
    lost = 0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _alive(trial):
            continue
        try:
            storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except (RuntimeError, ValueError):  # another worker was faster
            continue
        study.enqueue_trial(trial.params, user_attrs={"again": trial.number})
        lost += 1
    return lost


def _alive(trial: FrozenTrial) -> bool:
    name, _, pid = str(trial.user_attrs.get("owner", "")).rpartition(":")
    if name == socket.gethostname() and pid.isdigit():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True
    started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    return time.time() - float(trial.user_attrs.get("seen", started)) < LEASE


def take(study: optuna.Study, storage: Any) -> optuna.Trial | None:
    """The next queued trial, for this worker alone; None where none is left.

    All trials of a study are queued when it is made, so that workers share out what is there and never make one more.
    """
    for trial in sorted(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)), key=lambda t: t.number):
        try:
            if not storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                continue
        except (RuntimeError, ValueError):  # finished by another worker meanwhile
            continue
        storage.set_trial_user_attr(trial._trial_id, "owner", owner())
        return optuna.Trial(study, trial._trial_id)
    return None
