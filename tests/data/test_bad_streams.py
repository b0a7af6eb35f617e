"""Streams of bad rows and endless lines: memory stays bounded, and every row is told once."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from recsys_embed.data import CriteoOptions, convert_criteo, text_blocks
from recsys_embed.data.compressed_file import Reader
from recsys_embed.errors import DataError

ROW = b"1" + b"\t7" * 13 + b"\t0000000a" * 26 + b"\n"


def _zstd(data: bytes) -> bytes:
    return bytes(pytest.importorskip("zstandard").compress(data))


PACK: dict[str, Callable[[bytes], bytes]] = {"plain": bytes, "gzip": gzip.compress, "zstd": _zstd}


def _peak(run: Callable[[], object]) -> int:
    """MiB that Python and numpy take at most meanwhile."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] >> 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_a_short_archive_of_much_text_is_read_piece_by_piece(tmp_path: Path, form: str) -> None:
    size = 192 << 20
    if form == "gzip":
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()
    else:
        packed = _zstd(bytes(size))
    (tmp_path / "bomb").write_bytes(packed)

    def read() -> None:
        with Reader(tmp_path / "bomb") as reader:
            total = 0
            while got := reader.read(4 << 20):
                total += len(got)
            assert (total, reader.fault) == (size, None)

    assert _peak(read) < 80


@pytest.mark.parametrize("form", PACK)
def test_archives_of_many_members_and_sizes_are_read_whole(tmp_path: Path, form: str) -> None:
    pieces = [ROW * n for n in (1, 3, 70_000, 1, 0, 2)]
    (tmp_path / "f").write_bytes(b"".join(PACK[form](p) for p in pieces))
    with Reader(tmp_path / "f") as reader:
        assert reader.read(1 << 30) == b"".join(pieces)
        assert reader.fault is None
    (tmp_path / "cut").write_bytes((tmp_path / "f").read_bytes()[:-3])
    if form != "plain":
        with Reader(tmp_path / "cut") as reader:
            reader.read(1 << 30)
            assert "cut off" in str(reader.fault)


@pytest.mark.parametrize("form", ["gzip", "zstd"])
@pytest.mark.parametrize("zeros", [0, 10, 70_000])
def test_zeros_between_members_are_passed_over_and_nothing_else_is(tmp_path: Path, form: str, zeros: int) -> None:
    """As Python's gzip: zeros fill up blocks of tapes and sectors."""
    member = PACK[form](ROW)
    for end, fault in ((b"", None), (member, None), (b"junk", "damaged"), (member[:9], "cut off")):
        (tmp_path / "f").write_bytes(member + bytes(zeros) + end)
        if form == "gzip" and fault is None:
            assert gzip.decompress((tmp_path / "f").read_bytes()) == ROW * (1 + (end == member))
        with Reader(tmp_path / "f") as reader:
            assert reader.read(1 << 30) == ROW * (1 + (end == member))
            assert reader.fault is None if fault is None else fault in str(reader.fault)


@pytest.mark.parametrize("form", PACK)
def test_every_bad_row_is_set_aside_once(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_blocks, "_SHORT_LINES", 300)
    bad = 7000
    (tmp_path / "in").write_bytes(PACK[form](ROW * 100 + b"\n" * bad + ROW * 3 + b"x" * 70_000 + b"\n" + ROW))
    report = convert_criteo(tmp_path / "in", tmp_path / "out", CriteoOptions(on_bad_row="quarantine"))
    told = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [t["line"] for t in told] == [*range(101, 101 + bad), 104 + bad]
    assert {t["reason"] for t in told[:-1]} == {"expected 40 fields; got an empty line"}
    assert report.quarantined == bad + 1
    assert sum(report.rows.values()) == 104
    with pytest.raises(DataError, match=r"faults in the data:(.|\n)*line 101(.|\n)*and \d+ more in this part"):
        convert_criteo(tmp_path / "in", tmp_path / "fail", CriteoOptions())


@pytest.mark.parametrize("form", ["plain", "gzip"])
def test_memory_does_not_grow_with_an_endless_line(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block, size = 1 << 18, 24 << 20
    monkeypatch.setattr(text_blocks, "BLOCK_BYTES", block)

    def convert(length: int) -> Callable[[], object]:
        (tmp_path / f"in{length}").write_bytes(PACK[form](ROW * 100 + b"x" * length + b"\n" + ROW * 3))
        options = CriteoOptions(on_bad_row="quarantine", workers=1)
        return lambda: convert_criteo(tmp_path / f"in{length}", tmp_path / f"out{length}", options)

    _peak(convert(block))
    assert _peak(convert(size)) < 12, "twice what the decoder gives at once, and some blocks"
    told = [json.loads(line) for line in (tmp_path / f"out{size}" / "quarantine.jsonl").read_text().splitlines()]
    assert [(t["line"], t["reason"].rpartition(" ")[2]) for t in told] == [(101, str(size))]


def test_memory_does_not_grow_with_bad_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_blocks, "_SHORT_LINES", 500)

    def convert(bad: int) -> Callable[[], object]:
        (tmp_path / f"in{bad}").write_bytes(ROW * 100 + b"\n" * bad)
        options = CriteoOptions(on_bad_row="quarantine", workers=1)
        return lambda: convert_criteo(tmp_path / f"in{bad}", tmp_path / f"out{bad}", options)

    _peak(convert(300))
    assert _peak(convert(30_000)) < _peak(convert(6000)) + 4
