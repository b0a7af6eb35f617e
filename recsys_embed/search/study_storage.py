"""Where a study's trials are kept, and what its faults mean."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy import URL, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from recsys_embed.data.folder import StorageError
from recsys_embed.errors import MissingDependencyError

PASSWORD = "RECSYS_EMBED_STORAGE_PASSWORD"
"""Environment variable with the password of a server whose URL holds none."""
_JOURNAL = (".journal", ".log")
_TAIL = 1 << 16
_TRIES = 50
_SECRETS = ("password", "passwd", "sslpassword")
"""Options of a URL that are passwords."""
_DRIVERS = {
    "postgresql": {"psycopg2": "psycopg2-binary", "psycopg": "'psycopg[binary]'"},
    "mysql": {"pymysql": "pymysql", "MySQLdb": "mysqlclient"},
}
_DRIVERS["mariadb"] = _DRIVERS["mysql"]
"""Modules of drivers, and what installs them."""


def open_storage(where: str, *, there: bool = False) -> Any:
    """Storage of a URL (``sqlite:///``, ``postgresql://``, ``mysql://``), or of a file: a journal if its name ends so.

    Args:
        where: the storage; a server's password may stand in the environment variable :data:`PASSWORD` instead.
        there: it is one that was made before: a file that is gone is an error, and none takes its place.

    Raises:
        StorageError: it cannot be reached, is locked, has vanished or is no storage.
        MissingDependencyError: a database needs a driver that is not installed.
    """
    file = file_of(where)
    with faults_of(where):
        if there and _gone(where):
            raise StorageError(
                f"the study's storage {file} does not exist: it was moved or removed; put it back, or name another"
            )
        if file is None:
            return _server(where)
        file.parent.mkdir(parents=True, exist_ok=True)
        if "://" not in where and file.suffix in _JOURNAL:
            return optuna.storages.JournalStorage(_Journal(str(file), _Lock(str(file))))
        # Rendered, since a "?" or "%" of a folder's name means something in a URL.
        url = where if "://" in where else URL.create("sqlite", database=str(file)).render_as_string()
        storage = _database(url, {} if "timeout=" in url else {"connect_args": {"timeout": 60}})
        # SQLite's driver begins a transaction at its first write, so two workers that read the same queued trial
        # would both take it; one that begins with the lock makes the other wait, and see that it is taken.
        event.listen(storage.engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
        event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        storage.engine.dispose()
        return storage


def file_of(where: str) -> Path | None:
    """The file of a storage, absolute; None for a server's.

    Raises:
        StorageError: neither a file nor a URL.

    >>> file_of("/a/s.journal").name, file_of("sqlite:////a/s.db").name, file_of("mysql://host/db")
    ('s.journal', 's.db', None)
    """
    if "://" not in where:
        # A journal's lock is a link to it, which must hold wherever a worker was started.
        return Path(where).absolute()
    try:
        url = make_url(where)
        if "@" in (url.host or ""):  # the end of a password, which the driver's message would show
            raise ValueError("no host")
    except (ArgumentError, ValueError) as e:
        raise StorageError(
            "a study's storage is a file, or a URL of sqlite:///, postgresql:// or mysql:// such as "
            f"postgresql://USER@HOST:5432/DATABASE; got {shown(where)!r}. A password is written with %40 for @ and %2F "
            f"for /, or given as {PASSWORD}"
        ) from e
    held = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    return Path(str(url.database)).absolute() if held else None


def shown(where: str) -> str:
    """A storage as it may be printed and kept: a URL without its password.

    >>> shown("postgresql://me:secret@host/db"), shown("mysql://host/db?user=me&passwd=secret"), shown("s.db")
    ('postgresql://me@host/db', 'mysql://host/db?user=me', 's.db')
    """
    if "://" not in where:
        return where
    try:
        url = make_url(where)
    except (ArgumentError, ValueError):
        return where.partition("://")[0] + "://..."
    if "@" in (url.host or ""):
        return f"{url.drivername}://..."
    if url.get_backend_name() == "sqlite":
        return where
    return url.difference_update_query(_SECRETS)._replace(password=None).render_as_string()


def _told(url: URL) -> bool:
    """Whether a URL holds a password."""
    return url.password is not None or not set(_SECRETS).isdisjoint(url.query)


def _server(where: str) -> Any:
    url, password = make_url(where), os.environ.get(PASSWORD)
    backend, _, driver = url.drivername.partition("+")
    drivers = _DRIVERS.get(backend, {})
    if backend in ("mysql", "mariadb") and not url.database:
        raise StorageError(
            f"the study's storage {shown(where)} names no database; a URL with one is {backend}://USER@HOST/DATABASE"
        )
    if not driver:
        # Which one a URL without a driver means differs from version to version of SQLAlchemy: the one there is.
        for module in drivers:
            with suppress(ImportError):
                import_module(module)
                url = url.set(drivername=f"{backend}+{module.lower()}")
                break
    options: dict[str, Any] = {"pool_pre_ping": True}
    if password and drivers and not _told(url):
        options["connect_args"] = {"password": password}
    try:
        return _database(url.render_as_string(hide_password=False), options)
    except ImportError as e:
        packages = {module.lower(): package for module, package in drivers.items()}
        package = packages.get(driver) or next(iter(packages.values()), "a driver of it")
        other = f"leave +{driver} out of the URL and " if driver and packages and driver not in packages else ""
        raise MissingDependencyError(
            f"a study's storage at {url.drivername}://... needs a driver of that database ({e.__cause__ or e}); {other}"
            f"pip install {package}"
        ) from e
    except StorageError:
        raise
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as e:
        raise StorageError(  # each driver has its own way to refuse an option
            f"the study's storage {shown(where)} cannot be opened ({type(e).__name__}: {e}); see its URL: what stands "
            "behind ? are options of the driver"
        ) from e


def _database(url: str, engine: dict[str, Any]) -> Any:
    tries = 0
    while True:
        try:
            # Optuna fills in what stands in braces.
            return optuna.storages.RDBStorage(url.replace("{", "{{").replace("}", "}}"), engine_kwargs=engine)
        except RuntimeError as e:  # tables of another version of Optuna; a library that a driver lacks
            raise StorageError(f"the study's storage {shown(url)} cannot be used: {e}") from e
        except (DBAPIError, optuna.exceptions.StorageInternalError) as e:
            # Workers that start at once make the same tables.
            tries += 1
            made = any(text in f"{e} {e.__cause__}" for text in ("already exists", "UNIQUE", "uplicate"))
            if not made or tries == _TRIES:
                raise
            time.sleep(0.1)


def _gone(where: str) -> bool:
    file = file_of(where)
    return file is not None and not file.exists()


class _Lock(JournalFileSymlinkLock):
    """Whoever gets it finds a journal of whole lines: what a full disk or a kill left of one is cut off.

    Optuna would append to it, and the line made of two would be the end of the study.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = path

    def acquire(self) -> bool:
        held = super().acquire()
        with open(self._path, "rb+") as file:
            end = file.seek(0, os.SEEK_END)
            start = end
            while start:
                step = min(start, _TAIL)
                file.seek(start - step)
                line = file.read(step).rfind(b"\n")
                if line >= 0:
                    start += line + 1 - step
                    break
                start -= step
            if start < end:
                file.truncate(start)
        return held


class _Journal(JournalFileBackend):
    """A journal that says which of its lines is none."""

    def __init__(self, path: str, lock: _Lock) -> None:
        super().__init__(path, lock)
        self._path = path

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        number = log_number_from
        try:
            for record in super().read_logs(log_number_from):
                number += 1
                if not isinstance(record, dict) or "op_code" not in record:
                    raise ValueError(f"no record of a study: {record!s:.40}")
                yield record
        except ValueError as e:
            raise StorageError(
                f"the study's storage {self._path} is damaged or no journal of a study: near line {number} ({e}); put "
                "back a copy, remove the lines that are no JSON of a record, or name another storage"
            ) from e


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
        if "load plugin" in text:
            hint = "it takes a file, or a URL of sqlite:///, postgresql:// or mysql://"
        elif "locked" in text:
            hint = "another process holds it; wait for it, or use a journal file or a database server for many workers"
        elif "password" in text or "Access denied" in text:
            hint = (
                f"see its user and database, and give the password in the URL or as {PASSWORD}: no file of a study "
                "keeps it; then run the same command again"
            )
        elif file_of(where) is not None and ("no such table" in text or "No such file" in text or _gone(where)):
            hint = "it has vanished or was replaced while in use; put it back, then run the same command again"
        elif "is full" in text or "No space" in text:
            hint = "free some space, then run the same command again: it goes on where it stopped"
        else:
            hint = "see that it can be reached and written, then run the same command again"
        raise StorageError(f"the study's storage {shown(where)} failed ({text}); {hint}") from e
