"""The queue of a study: pending trials, their workers, and the liveness of these.

Optuna's own heartbeat and retry need a relational storage, create a new trial number for each retry and count retries
as further trials. Here journals work too, and a lost trial is requeued under its own number with its parameters, so a
study that is resumed equals one that was never interrupted.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

LEASE = 600.0
"""Seconds without a heartbeat after which a trial on another machine counts as lost."""


def owner() -> str:
    """Identity of this process, by which others check that it is alive: host, process id and start time."""
    return f"{socket.gethostname()}:{os.getpid()}:{_start_ticks(os.getpid())}"


def _start_ticks(pid: int) -> str:
    """Start time of a process in clock ticks, since process ids are reused; empty where it is unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def fill(study: optuna.Study, storage: Any, trials: int) -> None:
    """Queue trials until the study has ``trials`` of them, not counting failed ones.

    Several workers may call this at once: each withdraws its own surplus trials.
    """

    def counted() -> list[FrozenTrial]:
        there = [t for t in study.get_trials(deepcopy=False) if t.state != TrialState.FAIL]
        return sorted(there, key=lambda t: t.number)

    empty = optuna.trial.create_trial(state=TrialState.WAITING, system_attrs={"fixed_params": {}})
    mine = {storage.create_new_trial(study._study_id, empty) for _ in range(trials - len(counted()))}
    for trial in counted()[trials:]:
        if trial._trial_id in mine and try_take(storage, trial._trial_id):
            storage.set_trial_user_attr(trial._trial_id, "reason", "one too many: workers began at once")
            storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def requeue_lost(study: optuna.Study, storage: Any) -> int:
    """Requeue the trials of dead workers, and return their number.

    Only one worker at a time may call this: another worker may already run a trial that was requeued before.
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return sum(requeue(storage, trial._trial_id) for trial in running if not _worker_is_alive(trial))


def requeue(storage: Any, trial_id: int) -> bool:
    """Requeue a trial under its own number and with its parameters; False if it is finished.

    A resumed study therefore samples, trains and compares exactly as one that was never interrupted.
    """
    try:
        _record_worker(storage, trial_id)
        storage.set_trial_state_values(trial_id, TrialState.WAITING)
    except (RuntimeError, ValueError):
        return False
    return True


def _record_worker(storage: Any, trial_id: int) -> None:
    """Record the worker of a trial and the time of its heartbeat."""
    storage.set_trial_user_attr(trial_id, "owner", owner())
    # Before Optuna 5 a trial's start time is in the worker's time zone, which other workers do not know.
    storage.set_trial_user_attr(trial_id, "seen", time.time())


def _worker_is_alive(trial: FrozenTrial) -> bool:
    name, _, rest = str(trial.user_attrs.get("owner", "")).partition(":")
    pid, _, began = rest.partition(":")
    if name == socket.gethostname() and pid.isdigit():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return not began or _start_ticks(int(pid)) in ("", began)
    started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    return time.time() - float(trial.user_attrs.get("seen", started)) < LEASE


def take(study: optuna.Study, storage: Any) -> optuna.Trial | None:
    """Take the next queued trial for this worker; None if the queue is empty.

    All trials of a study are queued when it is created, so several workers never run more trials than asked for.
    """
    for trial in sorted(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)), key=lambda t: t.number):
        if try_take(storage, trial._trial_id):
            _record_worker(storage, trial._trial_id)
            return optuna.Trial(study, trial._trial_id)
    return None


def try_take(storage: Any, trial_id: int) -> bool:
    """Take a trial if it is queued; False if another worker runs it or it is finished."""
    try:
        return bool(storage.set_trial_state_values(trial_id, TrialState.RUNNING))
    except (RuntimeError, ValueError):  # over
        return False
