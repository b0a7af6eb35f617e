"""The README keeps its word: its Python runs and prints what its comments say, its table and its commands exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from recsys_embed.cli import build_app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_there_is_something_to_run():
    assert blocks("python")
    assert blocks("sh")


BLOCKS = [pytest.param(b, marks=pytest.mark.slow) if "train(" in b else b for b in blocks("python")]  # trains models


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.strip().splitlines()[-1][:30])
def test_python_blocks_run(block):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    lines = out.getvalue().splitlines()
    said = re.findall(r"^print\(.*\)  # (.*)$", block, re.M)
    assert len(lines) == len(said), "every print says in a comment what it prints"
    for line, comment in zip(lines, said, strict=True):
        about = re.match(r"about ([\d.]+)", comment)
        if about:
            assert float(line) == pytest.approx(float(about[1]), rel=0.05)
        else:
            assert line == comment


def test_method_table_is_up_to_date():
    command = [sys.executable, "scripts/readme_methods.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.M)
    assert set(targets) == {"demo", "fuzz", "test"}
    for target in targets:
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_commands_and_their_options_exist():
    lines = [line for block in blocks("sh") for line in block.splitlines() if "recsys-embed " in line]
    assert lines
    for line in lines:
        words = shlex.split(line.partition("#")[0])
        command = get_command(build_app())
        rest = words[1:]
        while getattr(command, "commands", None):
            assert rest[0] in command.commands, f"{line}: no command {rest[0]!r}"
            command, rest = command.commands[rest[0]], rest[1:]
        # Parsing alone tells whether every option and argument of the line exists.
        command.make_context(line, rest, resilient_parsing=False).close()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
