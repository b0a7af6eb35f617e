"""The run folder of a search: its identity, the results of finished stages, and their times."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recsys_embed.data.folder import lock
from recsys_embed.errors import CheckpointError
from recsys_embed.registry import with_current_names
from recsys_embed.train.environment import environment
from recsys_embed.utils.files import drop_leftovers, write_json, write_text
from recsys_embed.utils.strict_json import own_json

SEARCH = "search.json"


class SearchFolder:
    """Files of one search; without a path it keeps results in memory.

    A finished stage leaves its result as one file, written atomically, so a search that was killed resumes with the
    stage it was in.

    Args:
        path: of the folder, made if need be; None keeps nothing.
        identity: settings and data the search depends on.
        redo: what another ``budget`` makes stale, as long as there is no plan; None: the folder keeps to one budget.

    Raises:
        CheckpointError: the folder holds a search of other settings or other data; names what differs.
        StorageError: another process is at work in it.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any], redo: Sequence[str] | None = None) -> None:
        self.path, self._redo = path, tuple(redo or ())
        self._held: dict[str, Any] = {}
        # As JSON has it: lists for tuples.
        self.identity = json.loads(json.dumps(dict(identity)))
        if path is None:
            return
        known = self._read(SEARCH)
        free = {} if redo is None or self.get("plan") is not None else {"budget": self.identity.get("budget")}
        lines = [] if known is None else differences({**known.get("identity", {}), **free}, self.identity)
        if lines:
            raise CheckpointError(
                f"{path} holds a search of other settings or data; use those, or another folder:\n" + "\n".join(lines)
            )
        drop_leftovers(path)

    def claim(self) -> None:
        """From now on the folder belongs to this search."""
        if self.path is None:
            return
        known = self._read(SEARCH)
        if known is None or differences(known.get("identity", {}), self.identity):
            for name in self._redo if known is not None else ():
                (self.path / f"{name}.json").unlink(missing_ok=True)
            write_json(self.path / SEARCH, {**environment(), "identity": self.identity})

    def _read(self, name: str) -> Any:
        if self.path is None or not (self.path / name).exists():
            return None
        try:
            value = own_json((self.path / name).read_text(encoding="utf-8"))
        except ValueError as e:
            raise CheckpointError(f"{self.path / name} is damaged ({e}); remove it to do its part again") from e
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.path / name} is damaged: no object; remove it to do its part again")
        return value

    def get(self, name: str) -> Any:
        """What a stage left, or None."""
        return self._held.get(name) if self.path is None else self._read(f"{name}.json")

    def put(self, name: str, value: Mapping[str, Any]) -> None:
        """Leave the result of a stage, or how far it is."""
        if self.path is None:
            self._held[name] = value
        else:
            write_json(self.path / f"{name}.json", value)

    def text(self, name: str, text: str) -> None:
        """Write a file for people."""
        if self.path is not None:
            write_text(self.path / name, text)

    def inside(self, name: str) -> Path | None:
        """A folder of its own for a stage."""
        return None if self.path is None else self.path / name

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to the stage's, also over several runs."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = self.get("seconds") or {}
            self.put("seconds", {**spent, stage: spent.get(stage, 0.0) + time.perf_counter() - begin})

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent in each stage so far."""
        return dict(self.get("seconds") or {})


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each setting in which two searches differ; lists and tuples are alike."""
    there, here = (_flat(with_current_names(json.loads(json.dumps(dict(value))))) for value in (saved, now))
    differing = sorted(k for k in {*there, *here} if there.get(k) != here.get(k))
    return [f"  - {k}: {there.get(k)!r:.80} there, {here.get(k)!r:.80} now" for k in differing]


def _flat(identity: Any) -> dict[str, Any]:
    """Settings by dotted name."""
    out: dict[str, Any] = {}
    for key, value in identity.items():
        out |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return out


@contextmanager
def held(path: Path | None) -> Iterator[None]:
    """Keep other processes out of a folder."""
    if path is None:
        yield
        return
    with lock(path):
        yield
