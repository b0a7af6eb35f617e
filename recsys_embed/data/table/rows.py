"""First step of a table's conversion: its rows in parts, with the bad ones set aside or reported."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys_embed.core.footprint import format_bytes
from recsys_embed.data.columns import Column, Encoder, Fault
from recsys_embed.data.conversion import MIN_MEMORY, PROCESS, OnBadRow, Progress, different
from recsys_embed.data.folder import boot_id, write_bytes, write_file, write_json
from recsys_embed.data.sources.bad_rows import bad_row_line, bad_rows_error, find_bad_rows
from recsys_embed.data.sources.base import Chunk, Source
from recsys_embed.data.splits import SplitRule
from recsys_embed.data.table.schema import TableSchema
from recsys_embed.data.table.split import OUT
from recsys_embed.errors import ConfigError, DataError
from recsys_embed.utils.settings import Settings, param
from recsys_embed.utils.types import JSON

_PEAK = 4
"""Measured peak bytes per byte of a part in memory, over all steps."""
_SAMPLE_ROWS = 2048
MOST_ROWS, LEAST_ROWS = 1 << 19, 1 << 12
STAGED = "query.parquet"


@dataclass(frozen=True)
class TableOptions(Settings):
    """How a table is converted.

    Args:
        on_bad_row: ``"fail"`` stops at the first part with a bad row; ``"quarantine"`` sets them aside, counted.
        max_memory: bytes the process should stay under; at least 512 MiB, or 912 MiB beside a CUDA build of torch.
        workers: parts that are encoded at the same time; 0 means one per core, at most 4.
    """

    title = "the options of `data table`"
    on_bad_row: OnBadRow = "fail"
    max_memory: int = param(1 << 30, low=MIN_MEMORY)
    workers: int = param(0, low=0)

    @property
    def threads(self) -> int:
        """Parts that are in memory at the same time."""
        return self.workers or min(4, os.cpu_count() or 1)

    def readers(self, source: Source, columns: Collection[str]) -> int:
        """Parts that may be read at the same time, by what memory holds of a whole row group of some columns.

        Raises:
            ConfigError: there is no room for one; says how to make it.
        """
        held, file = source.held_besides(columns)
        room = self.max_memory - PROCESS
        if held > room:
            need = (PROCESS + 2 * held >> 20) + 1
            raise ConfigError(
                f"{file}: a row group holds {format_bytes(held)} of the columns that are read, for which --max-memory "
                f"{format_bytes(self.max_memory)} has no room: give --max-memory {need}MiB, or write smaller row "
                "groups: polars.scan_parquet(file).sink_parquet(other, row_group_size=100_000)"
            )
        return max(1, min(self.threads, room // 2 // held)) if held else self.threads

    def part_rows(self, row_bytes: float) -> int:
        """Rows of a part under the memory bound."""
        rows = (self.max_memory - PROCESS) // (_PEAK * (self.threads + 1)) / max(1.0, row_bytes)
        return int(min(MOST_ROWS, max(LEAST_ROWS, rows)))


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one file: ``rows`` from number ``first`` on, of which ``good`` are used."""

    index: int
    file: int
    first: int
    rows: int
    good: int
    bad: int


class TableRows:
    """The rows of a table in parts, of which any column can be read again.

    Args:
        work: the conversion's work folder.
        source: the table.
        schema: its columns.
        columns: those that are converted.
        options: settings.
        record: settings and inputs as JSON, to recognise an earlier run.
        notices: filled with remarks for the user.
        encoders: of the columns by name, where another folder learned them.
    """

    def __init__(
        self,
        work: Path,
        source: Source,
        schema: TableSchema,
        columns: Sequence[Column],
        options: TableOptions,
        record: JSON,
        notices: list[str],
        encoders: Mapping[str, Encoder] | None = None,
    ) -> None:
        self.work, self.source, self.schema, self.options = work, source, schema, options
        self.columns = tuple(columns)
        # What says whether a column's values can be used.
        self._checks: list[tuple[str, Column | Encoder]] = [
            (c.source, (encoders or {}).get(c.name, c)) for c in columns
        ]
        # Steps read all columns together, or one after the other.
        self.readers = options.readers(source, self._all)
        self.column_readers = min(options.readers(source, [name]) for name in self._all)
        sample = source.sample(_SAMPLE_ROWS).select(self._all)
        row_bytes = sample.estimated_size() / max(1, len(sample)) + 4 * len(self._all)
        self.part_rows = options.part_rows(row_bytes)
        self._keep_or_discard(record, notices)
        self.parts: list[Part] = []

    def _keep_or_discard(self, record: JSON, notices: list[str]) -> None:
        """Go on with an earlier run's work if it is that of this conversion."""
        state = {**record, "part_rows": self.part_rows, "machine_start": boot_id()}
        path = self.work / "state.json"
        if path.exists():
            changed = different(json.loads(path.read_text()), json.loads(json.dumps(state)))
            if changed:
                notices.append(
                    "unfinished work with other settings or inputs, or from before a restart, was discarded: "
                    + "; ".join(changed)
                )
                for entry in self.work.iterdir():
                    if entry.name != STAGED:
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if not path.exists():
            write_json(path, state)

    @cached_property
    def _all(self) -> list[str]:
        """Columns of the table that are read at all."""
        return list(dict.fromkeys([c.source for c in self.columns] + self.schema.split.columns))

    @cached_property
    def _checked(self) -> list[str]:
        types = self.source.types
        names = [name for name, column in self._checks if column.checks(types[name])]
        if self.schema.split.kind == "column":
            names += self.schema.split.columns
        if self.schema.split.needs_time and self.schema.event_time is not None:
            names.append(self.schema.event_time.source)
        return list(dict.fromkeys(names))

    @property
    def total(self) -> int:
        """Good rows."""
        return sum(p.good for p in self.parts)

    @property
    def bad(self) -> int:
        """Bad rows."""
        return sum(p.bad for p in self.parts)

    # -- scanning ----------------------------------------------------------------------------------------------------

    def scan(self, progress: Progress) -> None:
        """Check every row; what an earlier run checked is kept.

        Raises:
            DataError: bad rows under ``on_bad_row="fail"``.
        """
        self.parts = list(self._done())
        planned = self._planned() if self.source.seekable else None
        whole = sum(rows for _, _, rows in planned) if planned is not None else 0
        if planned is not None:
            jobs = planned[len(self.parts) :]
            with ThreadPoolExecutor(self.readers) as pool:
                for part in in_order(pool, self._scan_planned, jobs, self.readers, len(self.parts)):
                    self.parts.append(part)
                    progress("read", self._scanned, whole, self._scanned)
            return
        for file in range(self.parts[-1].file if self.parts else 0, len(self.source.files)):
            last = self.parts[-1] if self.parts and self.parts[-1].file == file else None
            start = last.first + last.rows if last else 0
            for chunk in self.source.chunks(file, start, self.part_rows, self._all):
                self.parts.append(self._store(len(self.parts), chunk, staged=True))
                progress("read", file, len(self.source.files), self._scanned)

    @property
    def _scanned(self) -> int:
        return sum(p.rows for p in self.parts)

    def _planned(self) -> list[tuple[int, int, int]]:
        """File, first row and number of rows of every part of a seekable source; parts of a file are equally long."""
        found = []
        for file in range(len(self.source.files)):
            length = self.source.length(file)
            pieces = -(-length // self.part_rows)
            ends = [length * i // pieces for i in range(pieces + 1)] if pieces else []
            found += [(file, a, b - a) for a, b in pairwise(ends)]
        return found

    def _done(self) -> Iterator[Part]:
        index = 0
        while (path := self._sidecar(index)).exists():
            yield Part(**json.loads(path.read_text()))
            index += 1

    def _scan_planned(self, index: int, job: tuple[int, int, int]) -> Part:
        file, first, rows = job
        if not self._checked:
            return self._finish(Part(index, file, first, rows, rows, 0))
        return self._store(index, next(self.source.chunks(file, first, rows, self._checked)), staged=False)

    def _store(self, index: int, chunk: Chunk, *, staged: bool) -> Part:
        """Check a part and write down what later steps need of it."""
        frame = chunk.frame
        good, rows = find_bad_rows(chunk, self._faults(frame))
        if rows and self.options.on_bad_row == "fail":
            raise bad_rows_error(self.source, rows)
        if rows:
            lines = "".join(bad_row_line(self.source, row) for row in rows).encode()
            write_bytes(self.bad_path(index), lines, durable=False)
        if staged:
            write_file(self._rows(index), lambda p: frame.write_ipc(p, compression="lz4"), durable=False)
        if not good.all():
            write_bytes(self._mask(index), np.packbits(good).tobytes(), durable=False)
        event = self.schema.event_time
        if event is not None and self.schema.split.needs_time:
            seconds = event.seconds(frame[event.source]).to_numpy()
            write_bytes(self.times_path(index), seconds[good].astype(np.int64).tobytes(), durable=False)
        span = len(frame) + len(chunk.bad)
        return self._finish(Part(index, chunk.file, chunk.first, span, int(good.sum()), len(rows)))

    def _finish(self, part: Part) -> Part:
        write_json(self._sidecar(part.index), asdict(part), durable=False)
        return part

    def _faults(self, frame: pl.DataFrame) -> Iterator[tuple[str, Fault]]:
        for name, column in self._checks:
            if name in frame.columns and column.checks(self.source.types[name]):
                yield from ((name, fault) for fault in column.faults(frame[name]))
        split = self.schema.split
        if split.kind == "column":
            out = split.column_codes(frame[split.columns[0]]) == OUT
            if out.any():
                meant = "train, valid or test" if split.values is None else "what `values` of the split has"
                yield split.columns[0], Fault(pl.Series(out), f"the split's column does not hold {meant}")

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, part: Part, columns: Sequence[str]) -> pl.DataFrame:
        """Columns of the good rows of a part.

        Raises:
            DataError: the table is no longer what it was.
        """
        staged = self._rows(part.index)
        if staged.exists():
            frame = pl.scan_ipc(staged).select(columns).collect()
        else:
            chunk = next(self.source.chunks(part.file, part.first, part.rows, columns), None)
            if chunk is None or len(chunk.frame) != part.rows:
                raise DataError(f"{self.source.files[part.file]}: changed while it was converted; run it again")
            frame = chunk.frame
        mask = self._mask(part.index)
        if mask.exists():
            good = np.unpackbits(np.fromfile(mask, np.uint8), count=len(frame)).astype(bool)
            frame = frame.filter(pl.Series(good))
        return frame

    def firsts(self) -> Iterator[tuple[Part, int]]:
        """Every part that has good rows, and the number of its first one among all."""
        first = 0
        for part in self.parts:
            if part.good:
                yield part, first
            first += part.good

    def file_codes(self, rule: SplitRule) -> list[int]:
        """Split of every file."""
        return rule.file_codes([Path(f) for f in self.source.files])

    def _sidecar(self, index: int) -> Path:
        return self.work / "parts" / f"{index:06d}.json"

    def _rows(self, index: int) -> Path:
        return self.work / "parts" / f"{index:06d}.arrow"

    def _mask(self, index: int) -> Path:
        return self.work / "parts" / f"{index:06d}.good"

    def times_path(self, index: int) -> Path:
        """File of the event times of a part's good rows, int64 seconds."""
        return self.work / "parts" / f"{index:06d}.times"

    def bad_path(self, index: int) -> Path:
        """File of a part's bad rows."""
        return self.work / "parts" / f"{index:06d}.bad.jsonl"


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[int, Any], Any], jobs: Sequence[Any], ahead: int, first: int = 0
) -> Iterator[Any]:
    """``work(number, job)`` of all jobs, in their order, at most ``ahead`` of them at once."""
    waiting: deque[Future[Any]] = deque()
    for number, job in enumerate(jobs, first):
        waiting.append(pool.submit(work, number, job))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
