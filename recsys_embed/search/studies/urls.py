"""URLs of studies' storages: which of them are files, and their form without the password."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from recsys_embed.data.folder import StorageError

PASSWORD = "RECSYS_EMBED_STORAGE_PASSWORD"
"""Environment variable with the password of a server whose URL holds none."""
_SECRETS = ("password", "passwd", "sslpassword")
"""Options of a URL that are passwords."""


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
            f"postgresql://USER@HOST:5432/DATABASE; got {without_password(where)!r}. A password is written with %40 "
            f"for @ and %2F for /, or given as {PASSWORD}"
        ) from e
    held = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    return Path(str(url.database)).absolute() if held else None


def without_password(where: str) -> str:
    """A storage's URL without its password, which may be printed and stored.

    >>> without_password("postgresql://me:secret@host/db"), without_password("s.db")
    ('postgresql://me@host/db', 's.db')
    >>> without_password("mysql://host/db?user=me&passwd=secret")
    'mysql://host/db?user=me'
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


def has_password(url: URL) -> bool:
    """Whether a URL holds a password."""
    return url.password is not None or not set(_SECRETS).isdisjoint(url.query)
