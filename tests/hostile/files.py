"""Sound files of every kind, for tests to damage, and a process of its own to open them in."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOM = 2048  # MiB of address space beyond that of a process that has imported the library
START = b'{"__metadata__":{"digest":"'
OPENER = Path(__file__).with_name("opener.py")


def take_apart(path: Path) -> tuple[dict[str, Any], dict[str, Any], bytearray]:
    """Manifest, tensor entries and tensors of an export."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return json.loads(header.pop("__metadata__")["recsys_embed"]), header, bytearray(data[8 + size :])


def seal(path: Path, manifest: Any, entries: dict[str, Any], body: bytes | bytearray) -> Path:
    """An export of these parts, with the digests that fit."""
    if isinstance(manifest, dict) and isinstance(manifest.get("sha256"), dict):
        spans = {name: entry["data_offsets"] for name, entry in entries.items()}
        manifest["sha256"] = {n: hashlib.sha256(bytes(body[a:b])).hexdigest() for n, (a, b) in spans.items()}
    text = manifest if isinstance(manifest, str) else json.dumps(manifest, separators=(",", ":"))
    metadata = {"digest": "0" * 64, "format": "pt", "recsys_embed": text}
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    total = -(-(8 + len(header)) // 64) * 64
    whole = (total - 8).to_bytes(8, "little") + header.ljust(total - 8)
    at, digest = 8 + len(START), hashlib.sha256(whole).hexdigest().encode()
    path.write_bytes(whole[:at] + digest + whole[at + 64 :] + bytes(body))
    return path


def open_all(jobs: Iterable[tuple[str, Path]], seconds: float = 60) -> list[tuple[str, float, int]]:
    """Of each file, opened as its kind: what came out, seconds, and MiB by which the process grew."""
    jobs = list(jobs)
    lines = "".join(json.dumps([kind, str(path)]) + "\n" for kind, path in jobs)
    try:
        done = subprocess.run(
            [sys.executable, str(OPENER), str(ROOM)], input=lines, capture_output=True, text=True, timeout=seconds
        )
        out, err = done.stdout, done.stderr
    except subprocess.TimeoutExpired as e:
        out, err = (e.stdout or b"").decode(), f"still running after {seconds} s"
    found = [tuple(json.loads(line)) for line in out.splitlines()]
    if len(found) < len(jobs):
        kind, path = jobs[len(found)]
        raise AssertionError(f"{kind} {path.name}: the process ended: {err[-500:]}")
    return found
