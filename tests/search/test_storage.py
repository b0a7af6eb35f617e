"""Storages of studies: what a full disk, a kill or another file leaves of one is mended or named, and never spreads."""

from __future__ import annotations

import sqlite3
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import optuna
import pytest

from recsys_embed.data.folder import StorageError
from recsys_embed.errors import ConfigError, MissingDependencyError
from recsys_embed.search.studies.open_study import NAME
from recsys_embed.search.studies.queue import fill, owner, requeue, requeue_lost, take
from recsys_embed.search.studies.settings import StudySettings
from recsys_embed.search.studies.storage import open_storage
from recsys_embed.search.studies.study import MethodStudy
from recsys_embed.search.studies.urls import PASSWORD, without_password
from tests.search.planted import Planted, planted_config

optuna.logging.set_verbosity(optuna.logging.WARNING)
CONFIG = planted_config(steps=3, threads=1)


def study_of(where: str, queued: int = 0) -> tuple[optuna.Study, object]:
    storage = open_storage(where)
    study = optuna.create_study(study_name="s", storage=storage, load_if_exists=True)
    for _ in range(queued):
        study.enqueue_trial({})
    return study, storage


def test_half_a_line_at_the_end_of_a_journal_costs_that_line_alone(tmp_path):
    path = tmp_path / "s.journal"
    study_of(str(path), 2)
    whole = path.read_bytes()
    for cut in (1, 40, 70_000):
        path.write_bytes(whole + b'{"op_code":4,' + b" " * cut)
        study = study_of(str(path))[0]
        assert len(study.trials) == 2
        study.enqueue_trial({})
        assert len(study_of(str(path))[0].trials) == 3
    path.write_bytes(b"{")
    assert study_of(str(path), 1)[0].trials, "half a line may be all there is"


def test_a_journal_of_other_things_is_named_with_its_line(tmp_path):
    path = tmp_path / "s.journal"
    study_of(str(path), 1)
    lines = len(path.read_bytes().splitlines())
    for junk in (b"no json\n", b"[1]\n", b'{"a": 1}\n', b"\xff\xfe\n"):
        held = path.read_bytes()
        path.write_bytes(held + junk + held)
        with pytest.raises(StorageError, match=rf"s.journal is damaged.* line ({lines}|{lines + 1}) .*put back a copy"):
            study_of(str(path))
        path.write_bytes(held)


def test_a_lock_left_by_a_killed_worker_is_broken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    study_of("in/s.journal")
    open_storage("in/s.journal")._backend._lock.acquire()
    lock = open_storage("in/s.journal")._backend._lock
    lock.grace_period = 0.2
    taken = threading.Thread(target=lock.acquire, daemon=True)
    taken.start()
    taken.join(10)
    assert not taken.is_alive()


def test_a_database_waits_for_whoever_reads_before_writing(tmp_path):
    study, storage = study_of(str(tmp_path / "s.db"), 1)
    other = open_storage(f"sqlite:///{tmp_path / 's.db'}?timeout=0.1")
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("SELECT * FROM trials").all()
        with pytest.raises(optuna.exceptions.StorageInternalError) as e:
            other.set_trial_state_values(1, optuna.trial.TrialState.RUNNING)
        assert "locked" in str(e.value.__cause__)
    assert take(study, storage) is not None


def test_workers_that_start_at_once_make_one_database(tmp_path):
    def start(where: str, barrier: threading.Barrier) -> int:
        barrier.wait()
        return len(study_of(where)[0].trials)

    with ThreadPoolExecutor(4) as pool:
        for number in range(3):
            barrier = threading.Barrier(4)
            jobs = [pool.submit(start, str(tmp_path / f"{number}.db"), barrier) for _ in range(4)]
            assert [job.result(30) for job in jobs] == [0] * 4


def test_a_number_given_to_another_process_is_no_sign_of_life(tmp_path):
    study, storage = study_of(str(tmp_path / "s.journal"), 1)
    trial = take(study, storage)
    assert requeue_lost(study, storage) == 0
    host, pid, began = owner().split(":")
    if not began:
        pytest.skip("this system does not say when a process began")
    storage.set_trial_user_attr(trial._trial_id, "from", "planner")
    storage.set_trial_user_attr(trial._trial_id, "owner", f"{host}:{pid}:{int(began) - 1}")
    assert requeue_lost(study, storage) == 1
    (again,) = study.trials
    assert (again.state.name, again.user_attrs["from"], again.user_attrs["owner"]) == ("WAITING", "planner", owner())
    study.tell(take(study, storage), 1.0)
    assert not requeue(storage, trial._trial_id), "what is over stays so"


def test_workers_that_fill_a_study_at_once_queue_no_more_than_it_is_to_have(tmp_path, monkeypatch):
    where = str(tmp_path / "s.db")
    (study, storage), (other, others) = study_of(where, 2), study_of(where)
    real, calls = storage.create_new_trial, []

    def create(*args):
        calls.append(args)
        if len(calls) == 3:
            fill(other, others, 6)
        return real(*args)

    monkeypatch.setattr(storage, "create_new_trial", create)
    fill(study, storage, 6)
    assert [t.number for t in study.trials if t.state.name == "WAITING"] == list(range(6))
    assert {t.user_attrs["reason"] for t in study.trials[6:]} == {"one too many: workers began at once"}
    fill(study, storage, 7)
    assert sum(t.state.name == "WAITING" for t in study.trials) == 7


def test_a_trial_shows_life_from_its_beginning(tmp_path):
    study, storage = study_of(str(tmp_path / "s.db"), 1)
    trial = take(study, storage)
    assert time.time() - study.trials[0].user_attrs["seen"] < 60
    trial.set_user_attr("owner", "elsewhere:1")
    with sqlite3.connect(tmp_path / "s.db") as db:
        db.execute("UPDATE trials SET datetime_start = '2020-01-01 00:00:00'")
    db.close()
    assert requeue_lost(study, storage) == 0


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://u:secret@h/db", "pip install psycopg2-binary"),
        ("postgresql+psycopg://u:secret@h/db", r"pip install 'psycopg\[binary\]'"),
        ("postgresql+pg8000://u:secret@h/db", r"leave \+pg8000 out of the URL and pip install psycopg2-binary"),
        ("mysql://u:secret@h/db", "pip install pymysql"),
        ("mariadb+mysqldb://u:secret@h/db", "pip install mysqlclient"),
    ],
)
def test_a_database_without_its_driver_says_what_to_install(url, message, monkeypatch):
    for driver in ("psycopg2", "psycopg", "pg8000", "MySQLdb", "pymysql"):
        monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(MissingDependencyError, match=f"needs a driver.*{message}") as e:
        open_storage(url)
    assert "secret" not in str(e.value)


@pytest.mark.parametrize(
    ("url", "module", "made"),
    [
        ("postgresql://u@h/db", "psycopg2", "postgresql+psycopg2://u@h/db"),
        ("postgresql://u@h/db", "psycopg", "postgresql+psycopg://u@h/db"),
        ("mysql://u@h/db", "pymysql", "mysql+pymysql://u@h/db"),
        ("mariadb://u@h/db", "MySQLdb", "mariadb+mysqldb://u@h/db"),
        ("postgresql+asyncpg://u@h/db", "psycopg2", "postgresql+asyncpg://u@h/db"),
    ],
)
def test_a_url_without_a_driver_takes_the_one_that_is_installed(url, module, made, monkeypatch):
    for driver in ("psycopg2", "psycopg", "MySQLdb", "pymysql"):
        monkeypatch.setitem(sys.modules, driver, ModuleType(driver) if driver == module else None)
    opened = []
    monkeypatch.setattr("recsys_embed.search.studies.storage._database", lambda *args: opened.append(args))
    monkeypatch.setenv(PASSWORD, "secret")
    open_storage(url)
    open_storage(url.replace("u@", "u:other@"))
    assert opened == [
        (made, {"pool_pre_ping": True, "connect_args": {"password": "secret"}}),
        (made.replace("u@", "u:other@"), {"pool_pre_ping": True}),
    ]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://u:secret@h:port/db", "postgresql://USER@HOST:5432/DATABASE; got 'postgresql://...'"),
        ("postgresql://u:a@secret@h/db", "A password is written with %40 for @"),
        ("no url://u:secret@h/db", "got 'no url://...'"),
        ("mysql://u:secret@h", "mysql://u@h names no database"),
        ("redis://u:secret@h/db", "redis://u@h/db failed .* it takes a file, or a URL"),
    ],
)
def test_a_url_that_is_wrong_is_named_without_its_password(url, message):
    with pytest.raises(StorageError, match=message) as e:
        open_storage(url)
    assert "secret" not in str(e.value)
    assert "secret" not in without_password(url)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TypeError("unexpected keyword argument 'x'"), r"cannot be opened \(TypeError: unexpected .*options of"),
        (RuntimeError("'cryptography' is required"), "cannot be used: 'cryptography' is required"),
        (
            optuna.exceptions.StorageInternalError("no password supplied"),
            f"give the password in the URL or as {PASSWORD}",
        ),
    ],
)
def test_what_a_driver_raises_is_one_sentence(error, message, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(optuna.storages, "RDBStorage", fail)
    with pytest.raises(StorageError, match=message) as e:
        open_storage("mysql://u:secret@h/db?x=1")
    assert "secret" not in str(e.value)


def test_a_folder_may_have_any_name_and_tables_of_another_optuna_are_refused(tmp_path):
    path = tmp_path / "a{b}?c%41#" / "s.db"
    assert len(study_of(str(path), 2)[0].trials) == 2
    assert path.exists()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
    db.close()
    with pytest.raises(StorageError, match="cannot be used: The runtime optuna version"):
        open_storage(str(path))


def test_what_was_there_and_is_gone_is_not_made_anew(tmp_path):
    for name in ("s.db", "s.journal"):
        with pytest.raises(StorageError, match="does not exist: it was moved or removed"):
            open_storage(str(tmp_path / name), must_exist=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StorageError, match=r"a URL of sqlite:///, postgresql:// or mysql://"):
        open_storage("redis://localhost")


def settings_of(**changes) -> StudySettings:
    base = {"trials": 4, "budgets": ["20%", "50%"], "methods": ["hash", "robe"], "groups": 2, "sampler": "random"}
    return StudySettings.from_dict(base | changes)


@pytest.mark.parametrize("name", ["_fill", "_planner_points"])
def test_a_study_whose_making_was_cut_short_is_made_in_full(name, tmp_path, monkeypatch):
    where, data = str(tmp_path / "s.journal"), Planted(0, rows=600)
    monkeypatch.setattr("recsys_embed.search.studies.open_study._MAKING", 1)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(MethodStudy, name, die)
        with pytest.raises(KeyboardInterrupt):
            MethodStudy(CONFIG, data, settings_of(), where)
    study = MethodStudy(CONFIG, data, settings_of(), where).study
    assert [t.user_attrs.get("from") for t in study.trials] == ["planner", "planner", None, None]
    assert len(MethodStudy(CONFIG, data, settings_of(), where).study.trials) == 4


def test_a_study_that_was_created_and_no_more_is_made_in_full(tmp_path, monkeypatch):
    where = str(tmp_path / "s.journal")
    monkeypatch.setattr("recsys_embed.search.studies.open_study._MAKING", 1)
    optuna.create_study(study_name=NAME, storage=open_storage(where), directions=["maximize", "minimize"])
    assert len(MethodStudy(CONFIG, Planted(0, rows=600), settings_of(), where).study.trials) == 4


def test_what_a_study_cannot_be_made_of_leaves_no_storage(tmp_path):
    where, data = tmp_path / "s.db", Planted(0, rows=600)
    with pytest.raises(ConfigError, match="unknown method of a study 'hsh'; did you mean 'hash'"):
        MethodStudy(CONFIG, data, settings_of(methods=["robe", "hsh"]), str(where))
    with pytest.raises(ConfigError, match="`sampler` must be text; got 3"):
        settings_of(sampler=3)
    for sampler, reason in (
        ("cmaes", "multi-objective"),
        ("bruteforce", "step must be given"),
        ("grid", "search_space"),
    ):
        with pytest.raises(ConfigError, match=f"sampler '{sampler}' cannot .*{reason}"):
            MethodStudy(CONFIG, data, settings_of(sampler=sampler), str(where))
    with pytest.raises(ConfigError, match=r"too small to compare candidates: \d+ positives.*larger --valid"):
        MethodStudy(CONFIG, Planted(0, rows=90), settings_of(), str(where))
    assert not where.exists()
    study = MethodStudy(CONFIG, data, settings_of(), str(where))
    with pytest.raises(StorageError, match="does not exist"):
        study.warm_from(str(tmp_path / "other.db"))
    open_storage(str(tmp_path / "other.db"))
    with pytest.raises(StorageError, match=r"other.db holds no study of methods"):
        study.warm_from(str(tmp_path / "other.db"))


def test_one_plan_is_trained_once_whatever_its_parameters(tmp_path, monkeypatch):
    study = MethodStudy(
        CONFIG, Planted(0, rows=600), settings_of(trials=3, warm=False, groups=1), str(tmp_path / "s.db")
    )
    trained, train = [], study.train
    monkeypatch.setattr(study, "train", lambda config, *a: trained.append(config) or train(config, *a))
    for trial, (method, width) in zip(study.study.trials, (("hash", 8), ("hash", 2), ("robe", 8)), strict=True):
        point = {"budget": "20%", "all.method": method, "all.width": width, "all.share": 1.0}
        study.storage.set_trial_system_attr(trial._trial_id, "fixed_params", point)
    assert study.work() == 3
    first, second, other = study.study.trials
    assert len(trained) == 2
    assert second.values == first.values != other.values
    assert second.user_attrs["reason"] == "not trained again: the plan is that of trial 0"


def test_a_worker_that_was_taken_for_lost_leaves_the_trial_to_others(tmp_path, monkeypatch):
    study = MethodStudy(CONFIG, Planted(0, rows=600), settings_of(trials=2, groups=1), str(tmp_path / "s.journal"))
    train, lost = study.train, []

    def sleep(config, watch):
        if not lost:
            lost.append(study.study.trials[0])
            assert requeue(study.storage, lost[0]._trial_id)
            study.study.tell(take(study.study, study.storage), [0.5, 1.0])
            watch(1, 0.5)
        return train(config, watch)

    monkeypatch.setattr(study, "train", sleep)
    assert study.work() == 2
    assert [t.state.name for t in study.study.trials] == ["COMPLETE", "COMPLETE"]
    assert study.study.trials[0].values == [0.5, 1.0], "what came first"


def test_a_sign_of_life_that_fails_is_followed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr("recsys_embed.search.studies.study._BEAT", 0.01)
    study = MethodStudy(CONFIG, Planted(0, rows=600), settings_of(trials=2, groups=1), str(tmp_path / "s.journal"))
    trial, real, seen = take(study.study, study.storage), study.storage.set_trial_user_attr, threading.Event()

    def busy(*args):
        monkeypatch.setattr(study.storage, "set_trial_user_attr", lambda *a: (real(*a), seen.set()))
        raise OSError("busy")

    monkeypatch.setattr(study.storage, "set_trial_user_attr", busy)
    with study._beating(trial):
        assert seen.wait(10)
    assert study.study.trials[0].user_attrs["seen"] > 0
