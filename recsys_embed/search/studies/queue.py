"""The queue of a study: trials that are waiting, who took one, and whether whoever did still lives."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

LEASE = 600.0
"""Seconds after which a trial of another machine that has not reported is taken for lost."""


def owner() -> str:
    """This process, for others to see whether it lives: machine, number, and when it began."""
    return f"{socket.gethostname()}:{os.getpid()}:{_began(os.getpid())}"


def _began(pid: int) -> str:
    """Ticks at which a process began, since numbers are given again, and a container's first always is; or nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def fill(study: optuna.Study, storage: Any, trials: int) -> None:
    """Queue as many trials as a study is to have; those that failed are not counted.

    Several workers may do so at once: each takes back those of its own that come after as many others.
    """

    def counted() -> list[FrozenTrial]:
        there = [t for t in study.get_trials(deepcopy=False) if t.state != TrialState.FAIL]
        return sorted(there, key=lambda t: t.number)

    empty = optuna.trial.create_trial(state=TrialState.WAITING, system_attrs={"fixed_params": {}})
    mine = {storage.create_new_trial(study._study_id, empty) for _ in range(trials - len(counted()))}
    for trial in counted()[trials:]:
        if trial._trial_id in mine and retake(storage, trial._trial_id):
            storage.set_trial_user_attr(trial._trial_id, "reason", "one too many: workers began at once")
            storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def requeue_lost(study: optuna.Study, storage: Any) -> int:
    """Queue again the trials whose workers are gone, and return how many.

    Of several workers one at a time is to do so: a trial that one has put back another may have taken already.
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return sum(put_back(storage, trial._trial_id) for trial in running if not _alive(trial))


def put_back(storage: Any, trial_id: int) -> bool:
    """Queue a trial again under its number and with its point, ahead of what comes after it; False: it is over.

    So a study that goes on draws, trains and compares what it would have if nothing had happened.
    """
    try:
        _sign(storage, trial_id)
        storage.set_trial_state_values(trial_id, TrialState.WAITING)
    except (RuntimeError, ValueError):
        return False
    return True


def _sign(storage: Any, trial_id: int) -> None:
    """Say who has a trial, and that it lives."""
    storage.set_trial_user_attr(trial_id, "owner", owner())
    # Before Optuna 5 the time at which a trial began is in its worker's time zone, which others do not know.
    storage.set_trial_user_attr(trial_id, "seen", time.time())


def _alive(trial: FrozenTrial) -> bool:
    name, _, rest = str(trial.user_attrs.get("owner", "")).partition(":")
    pid, _, began = rest.partition(":")
    if name == socket.gethostname() and pid.isdigit():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return not began or _began(int(pid)) in ("", began)
    started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    return time.time() - float(trial.user_attrs.get("seen", started)) < LEASE


def take(study: optuna.Study, storage: Any) -> optuna.Trial | None:
    """The next queued trial, for this worker alone; None where none is left.

    All trials of a study are queued when it is made, so that workers share out what is there and never make one more.
    """
    for trial in sorted(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)), key=lambda t: t.number):
        if retake(storage, trial._trial_id):
            _sign(storage, trial._trial_id)
            return optuna.Trial(study, trial._trial_id)
    return None


def retake(storage: Any, trial_id: int) -> bool:
    """Take a trial if it is queued; False: a worker has it, or it is over."""
    try:
        return bool(storage.set_trial_state_values(trial_id, TrialState.RUNNING))
    except (RuntimeError, ValueError):  # over
        return False
