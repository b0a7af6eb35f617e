"""What every command has in common: one line per error, exit status, --json; and doctor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch
import typer
from typer.main import get_command

import recsys_embed.cli as cli
from recsys_embed.cli import doctor
from recsys_embed.errors import ConfigError, DataError, MissingDependencyError, raise_faults
from recsys_embed.utils.versions import Installed

ROOT = Path(__file__).resolve().parents[1]


def commands() -> list[tuple[str, object]]:
    """Every leaf command with its full name: walked, never listed by hand."""
    found = []

    def walk(name: str, command: object) -> None:
        children = getattr(command, "commands", None)
        if children is None:
            found.append((name, command))
        for child, sub in sorted((children or {}).items()):
            walk(f"{name} {child}".strip(), sub)

    walk("", get_command(cli.build_app()))
    return found


COMMANDS = commands()


def run(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recsys_embed", *args],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "120", **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("recsys-embed: error: ")
    assert "Traceback" not in err
    return err.removeprefix("recsys-embed: error: ").rstrip("\n")


@pytest.fixture
def throwing(monkeypatch):
    """A command ``boom`` that raises what it is given."""
    what: list[BaseException] = []

    def boom() -> None:
        raise what[0]

    monkeypatch.setattr(cli, "command_names", lambda: ["boom"])
    monkeypatch.setitem(sys.modules, "recsys_embed.cli.boom", type("Module", (), {"boom": staticmethod(boom)}))
    monkeypatch.delenv("RECSYS_EMBED_DEBUG", raising=False)

    def go(error: BaseException, *args: str) -> int:
        what[:] = [error]
        return cli.main(["boom", *args])

    return go


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[n for n, _ in COMMANDS])
def test_every_command_has_json_and_help(name, command, capsys):
    assert "--json" in {option for p in command.params for option in p.opts}, f"{name} lacks --json"
    assert command.help, f"{name} lacks a help text"
    assert cli.main([*name.split(), "--help"]) == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[n for n, _ in COMMANDS])
def test_every_command_refuses_an_unknown_option_in_one_line(name, command, capsys):
    assert cli.main([*name.split(), "--no-such-option"]) == 2
    line = error_line(capsys)
    assert "--no-such-option" in line
    assert f"recsys-embed {name} --help" in line


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[n for n, _ in COMMANDS])
def test_every_command_names_a_missing_argument_in_one_line(name, command, capsys):
    required = [p for p in command.params if p.required]
    if not required:
        pytest.skip(f"{name} has no required argument")
    assert cli.main(name.split()) == 2
    assert "Missing" in error_line(capsys)


def test_unknown_command_names_the_nearest(capsys):
    assert cli.main(["doctr"]) == 2
    assert "did you mean 'doctor'" in error_line(capsys)


def test_a_command_of_a_group_is_named_with_it(capsys):
    assert cli.main(["inspect", "x.csv"]) == 2
    assert "did you mean 'data inspect'" in error_line(capsys)


def test_warnings_of_the_library_are_one_line(capsys, monkeypatch):
    before = warnings.formatwarning

    def warn(_):
        warnings.warn_explicit("tables for nothing", UserWarning, cli.__file__, 1)
        warnings.warn_explicit("not ours", UserWarning, torch.__file__, 1)
        return 0

    monkeypatch.setattr(cli, "_run", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "_showwarnmsg_impl", lambda m: sys.stderr.write(warnings._formatwarnmsg(m)))
        assert cli.main(["train"]) == 0
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "recsys-embed: warning: tables for nothing"
    assert err[1].startswith(torch.__file__)
    assert warnings.formatwarning is before


def test_no_command_prints_the_help_once(capsys):
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out.count("Usage:") == 1
    assert "doctor" in out
    assert err == ""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("num_buckets must be positive; got 0"), 2, "num_buckets must be positive; got 0"),
        (DataError("a.tsv line 3: 39 fields, expected 40"), 2, "a.tsv line 3: 39 fields, expected 40"),
        (FileNotFoundError(2, "No such file or directory", "x/y.tsv"), 2, "No such file or directory: x/y.tsv"),
        (PermissionError(13, "Permission denied", "x"), 2, "Permission denied: x"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (typer.Abort(), 130, "interrupted"),
        (typer.BadParameter("7 is too many"), 2, "Invalid value: 7 is too many"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else "",
)
def test_errors_become_one_line(throwing, capsys, error, status, line):
    assert throwing(error) == status
    assert error_line(capsys).startswith(line)


def test_many_faults_have_a_line_each(throwing, capsys):
    with pytest.raises(ConfigError) as caught:
        raise_faults(["a is wrong", "b is wrong"], "config.toml")
    assert throwing(caught.value) == 2
    wanted = ["recsys-embed: error: 2 faults in config.toml:", "  - a is wrong", "  - b is wrong"]
    assert capsys.readouterr().err.splitlines() == wanted


def test_a_fault_of_the_program_keeps_its_traceback(throwing):
    with pytest.raises(ZeroDivisionError):
        throwing(ZeroDivisionError())


@pytest.mark.parametrize("status", [0, 1, 3])
def test_exit_status_of_a_command_is_kept(throwing, status):
    assert throwing(typer.Exit(status)) == status


@pytest.mark.parametrize("where", ["option", "environment"])
def test_debug_shows_the_traceback(throwing, capsys, monkeypatch, where):
    if where == "environment":
        monkeypatch.setenv("RECSYS_EMBED_DEBUG", "1")
    assert throwing(ConfigError("x"), *(["--debug"] if where == "option" else [])) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1] == "recsys-embed: error: x"


def test_without_typer_one_sentence_names_the_fix(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    assert cli.main(["doctor"]) == 2
    assert error_line(capsys).endswith("pip install 'recsys-embed[train]'")


def test_a_missing_library_of_one_command_leaves_the_others(capsys, monkeypatch):
    def fail(name: str) -> object:
        raise MissingDependencyError("data needs polars")

    real = cli.importlib.import_module
    monkeypatch.setattr(cli.importlib, "import_module", lambda n, *a: fail(n) if n.endswith(".data") else real(n, *a))
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_module_and_version():
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("recsys-embed ")


def test_an_interrupted_process_ends_with_one_line(tmp_path):
    code = """
    import sys, time
    import recsys_embed.cli as cli
    def boom():
        print("started", flush=True)
        time.sleep(60)
    cli.command_names = lambda: ["boom"]
    sys.modules["recsys_embed.cli.boom"] = type("M", (), {"boom": staticmethod(boom)})
    sys.exit(cli.main(["boom"]))
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "started\n"
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert err == "recsys-embed: error: interrupted\n"


def test_a_closed_pipe_is_no_error():
    command = [sys.executable, "-m", "recsys_embed", "doctor"]
    # Buffered, so that the text meets the closed pipe when it is flushed and not when it is printed.
    env = os.environ | {"PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 1


# ---- doctor


def test_doctor_json_is_one_object():
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert report["versions"]["torch"]
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["memory_bytes"] is None or report["machine"]["memory_bytes"] > 2**28


def test_doctor_text_names_versions_and_machine():
    import torch

    done = run("doctor")
    assert done.returncode == 0, done.stderr
    assert f"torch           {torch.__version__}" in done.stdout
    assert "All version pairs fit." in done.stdout


def test_doctor_fails_on_a_broken_pair(monkeypatch, capsys):
    fake = {"torch": Installed("2.13.0"), "fbgemm-gpu-cpu": Installed("1.9.0"), "torchrec": Installed("1.8.0")}
    real = doctor.pair_faults
    monkeypatch.setattr(doctor, "pair_faults", lambda **kw: real(fake.get, **kw))
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "broken: torch 2.13.0, fbgemm-gpu-cpu 1.9.0 and torchrec 1.8.0" in out
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_doctor_lists_the_backends_that_exist(monkeypatch):
    dispatch = pytest.importorskip("recsys_embed.kernels.dispatch", reason="no backends in this build")
    monkeypatch.setattr(dispatch, "available_backends", lambda: [("fast", False, "no compiler was found")])
    report = doctor.examine()
    fast, reader = report["backends"]
    assert fast == {"name": "fast", "on": False, "why": "no compiler was found"}
    # No backend to train on, but what may read a quantised export.
    assert reader["name"] == "fbgemm"
    assert not reader["on"] or "exports alone" in reader["why"]
    assert "fast            off  no compiler was found" in doctor.render(report)
