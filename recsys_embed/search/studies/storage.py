"""Storages of studies, and translation of their errors."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import optuna
from sqlalchemy import URL, event, make_url
from sqlalchemy.exc import DBAPIError

from recsys_embed.data.folder import StorageError
from recsys_embed.errors import MissingDependencyError
from recsys_embed.search.studies.journal import CheckedJournal, RepairingLock
from recsys_embed.search.studies.urls import PASSWORD, file_of, has_password, without_password

_JOURNAL = (".journal", ".log")
_TRIES = 50
_DRIVERS = {
    "postgresql": {"psycopg2": "psycopg2-binary", "psycopg": "'psycopg[binary]'"},
    "mysql": {"pymysql": "pymysql", "MySQLdb": "mysqlclient"},
}
_DRIVERS["mariadb"] = _DRIVERS["mysql"]
"""Driver modules and the packages that install them."""


def open_storage(where: str, *, must_exist: bool = False) -> Any:
    """Storage of a URL (``sqlite:///``, ``postgresql://``, ``mysql://``), or of a file: a journal if its name ends so.

    Args:
        where: the storage; a server's password may stand in the environment variable :data:`PASSWORD` instead.
        must_exist: it is one that was made before: a file that is gone is an error, and none takes its place.

    Raises:
        StorageError: it cannot be reached, is locked, has vanished or is no storage.
        MissingDependencyError: a database needs a driver that is not installed.
    """
    file = file_of(where)
    with storage_errors(where):
        if must_exist and _is_missing(where):
            raise StorageError(
                f"the study's storage {file} does not exist: it was moved or removed; put it back, or name another"
            )
        if file is None:
            return _server(where)
        file.parent.mkdir(parents=True, exist_ok=True)
        if "://" not in where and file.suffix in _JOURNAL:
            return optuna.storages.JournalStorage(CheckedJournal(str(file), RepairingLock(str(file))))
        # Rendered, since a "?" or "%" of a folder's name means something in a URL.
        url = where if "://" in where else URL.create("sqlite", database=str(file)).render_as_string()
        storage = _database(url, {} if "timeout=" in url else {"connect_args": {"timeout": 60}})
        # SQLite's driver begins a transaction at its first write, so two workers that read the same queued trial
        # would both take it; one that begins with the lock makes the other wait, and see that it is taken.
        event.listen(storage.engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
        event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        storage.engine.dispose()
        return storage


def _server(where: str) -> Any:
    url, password = make_url(where), os.environ.get(PASSWORD)
    backend, _, driver = url.drivername.partition("+")
    drivers = _DRIVERS.get(backend, {})
    if backend in ("mysql", "mariadb") and not url.database:
        raise StorageError(
            f"the study's storage {without_password(where)} names no database; a URL with one is {backend}://USER@HOST/DATABASE"
        )
    if not driver:
        # SQLAlchemy's default driver depends on its version; take one that is installed.
        for module in drivers:
            with suppress(ImportError):
                import_module(module)
                url = url.set(drivername=f"{backend}+{module.lower()}")
                break
    options: dict[str, Any] = {"pool_pre_ping": True}
    if password and drivers and not has_password(url):
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
            f"the study's storage {without_password(where)} cannot be opened ({type(e).__name__}: {e}); check its "
            "URL: what follows the ? are options of the driver"
        ) from e


def _database(url: str, engine: dict[str, Any]) -> Any:
    tries = 0
    while True:
        try:
            # Optuna fills in what stands in braces.
            return optuna.storages.RDBStorage(url.replace("{", "{{").replace("}", "}}"), engine_kwargs=engine)
        except RuntimeError as e:  # tables of another version of Optuna; a library that a driver lacks
            raise StorageError(f"the study's storage {without_password(url)} cannot be used: {e}") from e
        except (DBAPIError, optuna.exceptions.StorageInternalError) as e:
            # Workers that start at once make the same tables.
            tries += 1
            made = any(text in f"{e} {e.__cause__}" for text in ("already exists", "UNIQUE", "uplicate"))
            if not made or tries == _TRIES:
                raise
            time.sleep(0.1)


def _is_missing(where: str) -> bool:
    file = file_of(where)
    return file is not None and not file.exists()


@contextmanager
def storage_errors(where: str) -> Iterator[None]:
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
        elif file_of(where) is not None and ("no such table" in text or "No such file" in text or _is_missing(where)):
            hint = "it has vanished or was replaced while in use; put it back, then run the same command again"
        elif "is full" in text or "No space" in text:
            hint = "free some space, then run the same command again: it resumes where it stopped"
        else:
            hint = "see that it can be reached and written, then run the same command again"
        raise StorageError(f"the study's storage {without_password(where)} failed ({text}); {hint}") from e
