"""Trials of a study that is killed go on where they were, and the study ends as it would have ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import optuna
import pytest

from recsys_embed.data.folder import FolderHeldError, StorageError, lock
from recsys_embed.errors import CheckpointError
from recsys_embed.search.studies.open_study import TRAINING_FOLDERS
from recsys_embed.search.studies.queue import requeue
from recsys_embed.search.studies.settings import StudySettings
from recsys_embed.search.studies.study import MethodStudy
from recsys_embed.search.studies.trial import TrainingFolders, key_of
from recsys_embed.train import Interrupted, Trainer
from recsys_embed.train.checkpoint import load_checkpoint
from tests.search.planted import Planted, planted_config
from tests.tiers import slow_but
from tests.train.toy import Batch

CONFIG = planted_config(steps=8, batch_size=128, threads=1, checkpoint_every=1)


def open_study(folder: Path, **changes) -> MethodStudy:
    base = {"trials": 4, "budgets": ["20%", "50%"], "methods": ["hash", "robe"], "groups": 2, "sampler": "random"}
    settings = StudySettings.from_dict({**base, **changes})
    folder.mkdir(exist_ok=True)
    return MethodStudy(CONFIG, Planted(0, rows=600), settings, str(folder / "s.journal"), folder=folder)


def outcome_of(folder: Path, **changes) -> list[tuple]:
    found = open_study(folder, **changes).study.trials
    return [(t.number, t.params, t.values, t.state.name, t.user_attrs.get("curve")) for t in found]


KILLED = """
import json, os, random, signal, sys, threading
from pathlib import Path

import optuna
import torch._dynamo  # what torch would import in every child

from recsys_embed.train import Trainer
from tests.search.test_study_resume import open_study

folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
optuna.logging.set_verbosity(optuna.logging.ERROR)
os.fsync = lambda descriptor: None  # a process that dies takes nothing along that the system was handed
book = os.open(folder / "book", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
begin, step = Trainer.__init__, Trainer._step


def tell(word, trainer):  # outlives a kill
    global left
    os.write(book, f"{word} {trainer.folder.name} {trainer.state.step}\\n".encode())
    left -= 1
    if left == 0:
        threading.Timer(chance.uniform(0, 0.005), os.kill, (os.getpid(), signal.SIGKILL)).start()


def told_begin(self, *args, **options):
    begin(self, *args, **options)
    tell("begin", self)


def told_step(self, batch):
    value = step(self, batch)
    tell("done", self)
    return value


Trainer.__init__, Trainer._step = told_begin, told_step


def child(name, told=0):
    global left
    left, pid = told, os.fork()
    if pid == 0:
        study = open_study(folder / name, **changes)
        study.work()
        study.sweep()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


left, chance = 0, random.Random(0)
assert child("whole") == 0
os.truncate(book, 0)
killed = 0
while os.WIFSIGNALED(child("parts", chance.randint(3, 25))):
    killed += 1
print(killed)
"""


@pytest.mark.parametrize("sampler", slow_but(["nsgaii", "evolution"]))
def test_a_study_killed_in_its_trials_loses_at_most_one_step(sampler: str, tmp_path: Path) -> None:
    changes = {"sampler": sampler, "trials": 9, "validations": 3}
    changes |= {"objectives": ["auc"], "sampler_args": {"population": 4}} if sampler == "evolution" else {}
    command = [sys.executable, "-c", KILLED, str(tmp_path), json.dumps(changes)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    assert outcome_of(tmp_path / "parts", **changes) == outcome_of(tmp_path / "whole", **changes)
    reached: dict[str, int] = {}
    for word, key, step in map(str.split, (tmp_path / "book").read_text().splitlines()):
        if word == "begin":
            assert int(step) >= reached.get(key, 0) - 1, f"{key} went on from step {step} after {reached[key]}"
        reached[key] = int(step)
    assert not [p for p in (tmp_path / "parts").iterdir() if p.is_dir()]


def test_a_stopped_trial_goes_on_and_a_damaged_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer._step

    def interrupted(self: Trainer, batch: Batch) -> float:
        if self.state.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    with monkeypatch.context() as m:
        m.setattr(Trainer, "_step", interrupted)
        with pytest.raises(Interrupted):
            open_study(tmp_path).work()
    (kept,) = (tmp_path / TRAINING_FOLDERS).glob("*/checkpoint.pt")
    assert load_checkpoint(kept)["state"]["step"] == 5
    whole = kept.read_bytes()
    kept.write_bytes(whole[:1000])
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"checkpoint.pt is damaged"):
            open_study(tmp_path).work()
    assert {t.state.name for t in open_study(tmp_path).study.trials} == {"WAITING"}, "nothing is lost"
    kept.write_bytes(whole)
    assert open_study(tmp_path).work() == 4
    assert not list(kept.parent.parent.iterdir())


def test_a_validation_nobody_heard_of_is_judged_when_the_trial_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"objectives": ["auc"], "trials": 2}
    whole, judge, heard = open_study(tmp_path / "whole", **changes), MethodStudy._report_or_prune, []
    assert whole.work() == 2

    def die(self: MethodStudy, trial: optuna.Trial, step: int, *rest: float) -> None:
        heard.append(step)
        if len(heard) == 2:
            raise KeyboardInterrupt
        judge(self, trial, step, *rest)

    with monkeypatch.context() as m:
        m.setattr(MethodStudy, "_report_or_prune", die)
        with pytest.raises(KeyboardInterrupt):
            open_study(tmp_path / "parts", **changes).work()
    assert heard == [2, 4]
    parts = open_study(tmp_path / "parts", **changes)
    assert parts.work() == 2
    assert outcome_of(tmp_path / "parts", **changes) == outcome_of(tmp_path / "whole", **changes)
    said = [[t.intermediate_values for t in s.study.trials] for s in (parts, whole)]
    assert said[0] == said[1]
    assert list(said[0][0]) == [2, 4, 5, 6]


def test_two_processes_never_share_a_trainings_folder(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    config = study.training_config(study.study.trials[0].system_attrs["fixed_params"], full=False)
    with study.training_folders.place(key_of(config)) as folder:
        before = sorted(p.name for p in folder.iterdir())
        other = study.train(config)[1]
        study.training_folders.forget(key_of(config))
        study.sweep()
        assert sorted(p.name for p in folder.iterdir()) == before, "what another process holds is left alone"
    assert study.train(config)[1].valid == other.valid
    assert (folder / "checkpoint.pt").exists()
    study.sweep()
    assert not (tmp_path / TRAINING_FOLDERS).exists()


def test_a_lock_that_its_holder_removed_is_none(tmp_path: Path) -> None:
    kept, taken = TrainingFolders(tmp_path), threading.Event()

    def wait() -> None:
        with lock(tmp_path / "a", wait=True):
            taken.set()
            let_go.wait(10)

    let_go = threading.Event()
    with lock(tmp_path / "a"):
        other = threading.Thread(target=wait, daemon=True)
        other.start()
        assert not taken.wait(0.2)
        (tmp_path / "a" / ".lock").unlink()
    assert taken.wait(10)
    with pytest.raises(FolderHeldError, match="another process"), lock(tmp_path / "a"):
        pass
    let_go.set()
    other.join()
    kept.forget("a")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_its_holder_removes_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, left = Path.mkdir, [2]

    def mkdir(self: Path, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        if left[0]:
            left[0] -= 1
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with lock(tmp_path / "a"):
        assert (tmp_path / "a" / ".lock").exists()
    left[0] = -1
    with pytest.raises(StorageError, match="No such file"), lock(tmp_path / "b"):
        pass


def test_a_trial_queued_again_while_its_worker_slept_is_over_when_it_ends(tmp_path: Path, monkeypatch) -> None:
    study = open_study(tmp_path, trials=1)
    objectives = MethodStudy._objectives

    def asleep(self: MethodStudy, trial: optuna.Trial, params: dict) -> list[float]:
        values = objectives(self, trial, params)
        assert requeue(self.storage, trial._trial_id)  # as a worker of another machine does
        return values

    monkeypatch.setattr(MethodStudy, "_objectives", asleep)
    assert study.work() == 1
    assert [t.state.name for t in study.study.trials] == ["COMPLETE"]


def test_whoever_goes_on_before_the_last_validation_hears_all_before_it(tmp_path: Path, monkeypatch) -> None:
    study = open_study(tmp_path, validations=4, prune=True)
    config = study.training_config(study.study.trials[0].system_attrs["fixed_params"], full=False)
    heard: list[int] = []
    study.train(config.replace(seed=1), lambda step, auc: heard.append(step))
    validate = Trainer._validate

    def die(self: Trainer, stop: Any) -> None:
        if self.state.step == self.total_steps:
            raise KeyboardInterrupt
        validate(self, stop)

    with monkeypatch.context() as m:
        m.setattr(Trainer, "_validate", die)
        with pytest.raises(KeyboardInterrupt):
            study.train(config)
    again: list[int] = []
    study.train(config, lambda step, auc: again.append(step))
    assert again == heard == [2, 4, 5, 6]
