"""Files with any of their values replaced, cut or packed are opened or refused by name, in little time and memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from recsys_embed.data.manifest import read_manifest
from recsys_embed.errors import ConfigError, DataError
from recsys_embed.utils.strict_json import MAX_DEPTH, own_json, read_object, strict_json
from tests.hostile import samples
from tests.hostile.files import open_all

COUNT = int(os.environ.get("RECSYS_EMBED_MUTANTS", "12"))  # of each kind of file; more by hand


@pytest.mark.slow
def test_damaged_files_are_opened_or_refused(tmp_path: Path) -> None:
    files = samples.make(tmp_path)
    (tmp_path / "mutants").mkdir()
    sound = [("export" if kind in samples.EXPORTED else kind, p) for kind, p in files.items()]
    sound.append(("rows", files["served"]))
    assert [said for said, *_ in open_all(sound)] == ["opened"] * len(sound)
    jobs = list(samples.jobs(files, tmp_path / "mutants", COUNT))
    # What the library loads at its first use is not the first file's.
    found = open_all([*sound, *((kind, path) for kind, _, path in jobs)], seconds=60 + len(jobs))[len(sound) :]
    wrong = [
        f"{words}: {said} ({seconds:.1f} s, {grown} MiB)"
        for (_, words, _), (said, seconds, grown) in zip(jobs, found, strict=True)
        if not (said == "opened" or said.startswith("refused")) or seconds > 10 or grown > 200
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("read", [strict_json, own_json])
def test_json_is_read_to_a_stated_depth(read: Callable[[str], object]) -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert read(deep) is not None
    assert read(f'{{"a": [1, {deep[2:-2]}]}}') == {"a": [1, read(deep[2:-2])]}
    for more in (f"[{deep}]", f'{{"a": {deep}}}', "[" * 900 + "]" * 900, "[" * 100_000 + "]" * 100_000):
        with pytest.raises(ValueError, match=r"nested"):
            read(more)


def test_numbers_that_overflow_are_no_infinities(tmp_path: Path) -> None:
    assert strict_json("[1e308, -0.5e-999, 1e3]") == [1e308, 0, 1000]
    (tmp_path / "rate.toml").write_text("rate = -1e999")
    for text in ("1e999", '{"a": [-1e999]}', "1" * 400 + ".5", "Infinity", "NaN"):
        with pytest.raises(ValueError, match=r"is too large|is not JSON"):
            strict_json(text)
    with pytest.raises(ConfigError, match="number -1e999 is too large"):
        read_object(tmp_path / "rate.toml", toml=True)


def test_a_manifest_names_all_that_is_wrong_and_no_file_outside(tmp_path: Path) -> None:
    file = samples.make(tmp_path)["manifest"]
    value = samples.changed(own_json(file.read_text()), ("splits", "train", "shards", 0), {
        "file": "../../elsewhere.parquet", "rows": -1, "bytes": "many", "sha256": None,
    })  # fmt: skip
    file.write_text(json.dumps(value))
    with pytest.raises(DataError) as e:
        read_manifest(file.parent)
    for name in ("file", "rows", "bytes", "sha256", "train"):
        assert name in str(e.value)
