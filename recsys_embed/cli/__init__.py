"""The command line: ``recsys-embed COMMAND``, one module of this package per command.

A module ``cli/<name>.py`` offers either a function ``<name>`` (a command) or a ``typer.Typer`` called ``<name>_app``
(a group); nothing else has to be registered. Only the module of the command at hand is imported, so a library that one
command needs cannot take the others down. Modules whose name begins with an underscore hold shared helpers.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys_embed.errors import ConfigError, RecsysEmbedError, UnknownNameError, unknown_name
from recsys_embed.utils.optional import require

if TYPE_CHECKING:
    import typer

PROG = "recsys-embed"
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
_FIRST = ("doctor", "data", "plan", "train", "compare", "search", "report", "export", "predict", "bench")


def command_names() -> list[str]:
    """Names of all commands in the order of their use: those that exist as modules of this package.

    >>> "doctor" in command_names()
    True
    """
    found = {m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")}
    return [n for n in _FIRST if n in found] + sorted(found.difference(_FIRST))


def build_app(only: str | None = None) -> typer.Typer:
    """Build the typer application with the command ``only``, or with all of them.

    Raises:
        MissingDependencyError: typer, or a library that a command's module needs, is not installed.
    """
    typer = require("typer", extra="train", purpose="the command line")
    app: Any = typer.Typer(
        name=PROG,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # rich would read "[train]" in a help text as a style and drop it
        help="Compressed embeddings for recommenders: data, training, methods compared at one byte budget.",
    )

    @app.callback()
    def options(
        debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error (or RECSYS_EMBED_DEBUG=1)."),
        version: bool = typer.Option(False, "--version", help="Show the version and exit."),
    ) -> None:
        # main() acts on both before this application is built; they are declared here for the help text.
        pass

    for name in [only] if only else command_names():
        module = importlib.import_module(f"{__name__}.{name}")
        group = getattr(module, f"{name}_app", None)
        if group is not None:
            app.add_typer(group, name=name)
        else:
            app.command(name)(getattr(module, name))
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; errors meant for the user become one line on stderr, or one
    per fault where there are several.

    Status 2 is a fault in what was asked for (arguments, files, data, configuration, a missing library), 130 an
    interruption, 1 a check that a command made and that failed. ``--debug`` anywhere, or ``RECSYS_EMBED_DEBUG=1``,
    shows the traceback instead of the line.

    >>> main(["--version"]) == 0
    recsys-embed ...
    True
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args or os.environ.get("RECSYS_EMBED_DEBUG", "") not in ("", "0")
    args = [a for a in args if a != "--debug"]
    try:
        with _warnings_in_one_line():
            status = _run(args)
        if sys.stdout is not None:  # as when it was closed before the start
            sys.stdout.flush()
        return status
    except KeyboardInterrupt as e:
        return _fail(e, "interrupted", debug, EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader (head, less) has gone; Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RecsysEmbedError as e:
        return _fail(e, str(e), debug)
    except OSError as e:
        named = e.filename if e.filename is not None else e.filename2
        reason = e.strerror or str(e) or type(e).__name__
        return _fail(e, f"{reason}: {named}" if named is not None else reason, debug)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show the library's own warnings as messages to the user, without Python's line of source."""
    before = warnings.formatwarning
    package = str(Path(__file__).parents[1])

    def shown(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        ours = issubclass(category, UserWarning) and filename.startswith(package)
        return f"{PROG}: warning: {message}\n" if ours else before(message, category, filename, lineno, line)

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = before


def _run(args: list[str]) -> int:
    if args == ["--version"]:
        from recsys_embed.utils.versions import installed_versions

        print(PROG, installed_versions(["recsys-embed"])["recsys-embed"] or "(not installed; run from its source tree)")
        return 0
    names = command_names()
    first = next((a for a in args if not a.startswith("-")), None)
    if first is not None and first not in names:
        raise _unknown_command(first, names)
    app = build_app(first)
    from typer.main import get_command

    command = get_command(app)
    try:
        # click's own main() would print framed panels and swallow the cause; here every error is raised as it is.
        with command.make_context(PROG, args) as context:
            result = command.invoke(context)
    except Exception as e:
        return _click_exit(e)
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def _unknown_command(name: str, names: list[str]) -> UnknownNameError:
    """The error for a command that there is not, with the group that has one of this name: `data inspect`."""
    for group in names:
        with contextlib.suppress(RecsysEmbedError):
            app = getattr(importlib.import_module(f"{__name__}.{group}"), f"{group}_app", None)
            known = [] if app is None else app.registered_commands
            if name in {c.name or c.callback.__name__ for c in known}:
                return UnknownNameError(f"unknown command {name!r}; did you mean '{group} {name}'?")
    return unknown_name("command", name, names)


def _click_exit(error: Exception) -> int:
    """Exit status of the exceptions by which click ends a command; any other exception is raised again.

    typer carries its own copy of click in recent versions and imports it in older ones, so the classes cannot be named.
    """
    kind = type(error).__name__
    if kind == "Exit":
        return int(getattr(error, "exit_code", 0))
    if kind == "Abort":
        raise KeyboardInterrupt from error
    if kind == "NoArgsIsHelpError":
        print(getattr(error, "message", ""))
        return EXIT_ERROR
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else PROG
        message = error.format_message().strip().rstrip(".")
        raise ConfigError(f"{message}; see '{where} --help'") from error
    raise error


def _fail(error: BaseException, message: str, debug: bool, status: int = EXIT_ERROR) -> int:
    if debug:
        traceback.print_exception(error)
    # Faults have a line each, and the cure, as `raise_faults` lists them; whatever else has several lines becomes one.
    lines = [part.rstrip() for part in message.splitlines() if part.strip()]
    between = "\n" if any(part.lstrip().startswith("- ") for part in lines[1:]) else "; "
    print(f"{PROG}: error: {between.join(lines)}", file=sys.stderr)
    return status
