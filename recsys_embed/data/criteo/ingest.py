"""First step of a conversion: text files to parts of typed columns; bad rows are quarantined or reported."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recsys_embed.data.conversion import PROCESS, SHOWN_FAULTS, different
from recsys_embed.data.criteo.explain import BadRow
from recsys_embed.data.criteo.layout import LineLayout
from recsys_embed.data.criteo.options import SEPARATORS, CriteoOptions
from recsys_embed.data.criteo.parse import ParsedBlock, parse_block
from recsys_embed.data.criteo.parts import ParsedPart, PartInfo
from recsys_embed.data.folder import boot_id, storage_error, write_json
from recsys_embed.data.text_blocks import BLOCK_BYTES, TextBlock, detect, read_blocks
from recsys_embed.errors import ConfigError, DataError

_PER_WORKER = 10 * BLOCK_BYTES
_PER_PART = 7
"""Peak bytes per byte of a part's text, over all steps."""


def input_record(path: Path) -> dict[str, Any]:
    """Identity of an input file between runs."""
    stat = path.stat()
    return {"file": str(path), "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}


def worker_count(options: CriteoOptions) -> int:
    """Threads to parse with, fewer where memory is short."""
    wanted = options.workers or min(4, os.cpu_count() or 1)
    return max(1, min(wanted, (options.max_memory - PROCESS) // 2 // _PER_WORKER))


def part_blocks(options: CriteoOptions) -> int:
    """Blocks of text per part under the memory bound, at most 16 (64 MiB, about 280 000 rows)."""
    left = options.max_memory - PROCESS - worker_count(options) * _PER_WORKER
    return int(max(1, min(16, left // (_PER_PART * BLOCK_BYTES))))


@dataclass
class _BadRows:
    """The bad rows of a part: how many, the first of them, and all in a file once written to it."""

    path: Path
    count: int = 0
    first: list[BadRow] = field(default_factory=list)

    def add(self, count: int, first: Sequence[BadRow], records: bytes) -> None:
        """Add some, with their lines of the quarantine file."""
        if records:
            # The part is not finished before it has a sidecar, so a file that was cut off is written anew.
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab" if self.count else "wb") as file:
                    file.write(records)
            except OSError as e:
                raise storage_error(self.path, e) from e
        self.count += count
        self.first += first[: SHOWN_FAULTS - len(self.first)]


@dataclass(frozen=True)
class _Parsed:
    """A parsed block, whose bad rows are no longer objects but lines of the quarantine file."""

    text: TextBlock
    block: ParsedBlock
    bad: int
    first: tuple[BadRow, ...]
    records: bytes


class Ingest:
    """Parses ``files`` into parts under ``work``; what an earlier run finished is kept.

    Args:
        work: the conversion's work folder.
        files: inputs in order.
        options: settings.
        record: settings and inputs as JSON, to recognise the earlier run.
        notices: filled with remarks for the user.
    """

    def __init__(
        self, work: Path, files: list[Path], options: CriteoOptions, record: dict[str, Any], notices: list[str]
    ) -> None:
        self.work, self.files, self.options = work, files, options
        state = {**record, "part_blocks": part_blocks(options), "machine_start": boot_id()}
        path = work / "state.json"
        if path.exists():
            old = json.loads(path.read_text())
            changed = different(old, state)
            if changed:
                notices.append(
                    "unfinished work with other settings or inputs, or from before a restart, was discarded: "
                    + "; ".join(changed)
                )
                shutil.rmtree(work)
        if not path.exists():
            write_json(path, state)
        base = LineLayout(True, SEPARATORS[options.separator], options.id_bits)
        forms = [detect(f, base, header=options.header, labels=options.labels) for f in files]
        self.headers = [h for h, _ in forms]
        kinds = {layout.labels for _, layout in forms}
        if len(kinds) > 1:
            with_labels = next(f for f, (_, x) in zip(files, forms, strict=True) if x.labels)
            without = next(f for f, (_, x) in zip(files, forms, strict=True) if not x.labels)
            raise ConfigError(
                f"{with_labels} has labels and {without} has none; convert them to two folders "
                "(the second with --like the first, so that ids agree)"
            )
        self.layout = forms[0][1]

    def run(self, progress: Callable[[str, float, float, int], None]) -> list[ParsedPart]:
        """Parse what is missing; returns all parts in row order.

        Raises:
            DataError: bad rows or damaged files under ``on_bad_row="fail"``.
        """
        parts = self._done()
        sizes = [f.stat().st_size for f in self.files]
        rows = sum(p.info.rows for p in parts)
        with ThreadPoolExecutor(worker_count(self.options)) as pool:
            for i in range(parts[-1].info.file if parts else 0, len(self.files)):
                before = sum(sizes[:i])
                for part, position in self._file(i, parts[-1].info if parts else None, pool):
                    parts.append(part)
                    rows += part.info.rows
                    progress("read", before + position, sum(sizes), rows)
        return parts

    def _done(self) -> list[ParsedPart]:
        parts: list[ParsedPart] = []
        while (path := self._sidecar(len(parts))).exists():
            info = PartInfo(**json.loads(path.read_text()))
            part = ParsedPart(self._path(len(parts)), info)
            if not part.path.exists() or part.path.stat().st_size != part.size:
                break
            parts.append(part)
        return parts

    def _path(self, index: int) -> Path:
        return self.work / "parts" / f"{index:06d}.bin"

    def _sidecar(self, index: int) -> Path:
        return self.work / "parts" / f"{index:06d}.json"

    def bad_path(self, index: int) -> Path:
        return self.work / "parts" / f"{index:06d}.bad.jsonl"

    def _file(self, i: int, last: PartInfo | None, pool: ThreadPoolExecutor) -> Iterator[tuple[ParsedPart, int]]:
        """Parts of file ``i`` that come after ``last``."""
        start, line, index = 0, 1, 0
        if last is not None:
            index = last.index + 1
            if last.file == i:
                if last.last:
                    return
                start, line = last.stop, last.next_line
        blocks = read_blocks(self.files[i], header=self.headers[i], start=start, first_line=line)
        ahead: deque[Future[_Parsed]] = deque()
        group: list[tuple[TextBlock, ParsedBlock]] = []
        bad = _BadRows(self.bad_path(index))
        size = part_blocks(self.options)
        depth = worker_count(self.options)
        exhausted = False
        while not exhausted or ahead:
            while not exhausted and len(ahead) <= depth:
                text = next(blocks, None)
                if text is None:
                    exhausted = True
                else:
                    ahead.append(pool.submit(self._parse, text, str(self.files[i])))
            if ahead:
                parsed = ahead.popleft().result()
                group.append((parsed.text, parsed.block))
                bad.add(parsed.bad, parsed.first, parsed.records)
            ended = exhausted and not ahead
            if group and (len(group) == size or ended):
                yield self._store(index, i, group, bad, ended), group[-1][0].position
                index, group = index + 1, []
                bad = _BadRows(self.bad_path(index))

    def _parse(self, text: TextBlock, name: str) -> _Parsed:
        """A block parsed, without its bytes."""
        block = parse_block(text.data, self.layout, first_line=text.first_line)
        rows = (*text.bad, *block.bad)
        records = b""
        if rows and self.options.on_bad_row == "quarantine":
            records = "".join(_record(name, row) for row in rows).encode()
        block.bad = []
        return _Parsed(replace(text, data=b""), block, len(rows), rows[:SHOWN_FAULTS], records)

    def _store(
        self, index: int, file: int, group: list[tuple[TextBlock, ParsedBlock]], bad: _BadRows, last: bool
    ) -> ParsedPart:
        name = str(self.files[file])
        fault = next((text.fault for text, _ in group if text.fault), None)
        if self.options.on_bad_row == "fail" and (bad.count or fault):
            self._fail(name, bad, fault)
        blocks = [block for _, block in group]
        end, tail = group[-1]
        next_line = end.first_line + tail.lines + len(end.bad)
        int_type, cat_type = ParsedPart.write(self._path(index), blocks)
        rows = sum(b.rows for b in blocks)
        seen = sum(b.lines for b in blocks) + sum(len(t.bad) for t, _ in group)
        if seen != rows + bad.count:
            raise RuntimeError(f"{name}: {seen} lines were read but {rows} rows and {bad.count} bad rows came out")
        info = PartInfo(
            index, file, group[0][0].start, end.stop, next_line, last, rows, bad.count, fault,
            self.layout.labels, int_type, cat_type,
        )  # fmt: skip
        write_json(self._sidecar(index), info.to_dict(), durable=False)
        return ParsedPart(self._path(index), info)

    def _fail(self, name: str, bad: _BadRows, fault: str | None) -> None:
        shown = [row.describe(name) for row in bad.first]
        if fault and not any(fault in row.reason for row in bad.first):
            shown.append(f"{name}: {fault}")
        more = f"\n  and {bad.count - SHOWN_FAULTS} more in this part" if bad.count > SHOWN_FAULTS else ""
        first = bad.first[0] if bad.first else None
        other = (
            first is not None and first.line <= 2 and first.reason.startswith("expected") and "fields" in first.reason
        )
        table = "; a table of other columns is converted by `recsys-embed data table`" if other else ""
        head = "" if len(shown) == 1 else f"{max(bad.count, len(shown))} faults in the data:\n  - "
        raise DataError(
            head + "\n  - ".join(shown) + more
            + ("\n" if len(shown) > 1 else "; ")
            + "correct the file, or pass --on-bad-row quarantine to set such rows aside and count them"
            + table
        )  # fmt: skip


def _record(name: str, row: BadRow) -> str:
    """A line of the quarantine file. ``raw`` maps bytes to code points (Latin-1), so none is lost."""
    value = {
        "file": name,
        "line": row.line,
        "column": row.column,
        "reason": row.reason,
        "raw": row.raw.decode("latin-1"),
    }
    return json.dumps(value) + "\n"
