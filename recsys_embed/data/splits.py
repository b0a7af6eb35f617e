"""Which rows train, validate and test: by order, at random, or by file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from fractions import Fraction
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from recsys_embed.data.random_bits import random_bits, stream_key
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.utils.settings import Settings, param

SplitKind = Literal["order", "random", "file", "all"]
SplitName = Literal["train", "valid", "test"]
SPLITS = ("train", "valid", "test")
TRAIN, VALID, TEST = range(3)


def fraction(text: str | float, name: str) -> Fraction:
    """``0.1`` or ``1/6`` as an exact fraction in [0, 1).

    >>> fraction("1/6", "test") * 117335
    Fraction(117335, 6)
    """
    try:
        value = Fraction(str(text))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"`{name}` must be a share of all rows such as 0.1 or 1/6; got {text!r}") from None
    if not 0 <= value < 1:
        raise ConfigError(f"`{name}` must be in [0, 1); got {text!r}")
    return value


class _Shares(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def valid(self) -> Fraction | float: ...
    @property
    def test(self) -> Fraction | float: ...
    @property
    def valid_files(self) -> tuple[str, ...]: ...
    @property
    def test_files(self) -> tuple[str, ...]: ...


def rule_faults(split: _Shares, shares: bool = True) -> list[str]:
    """What is wrong with the files and, where they count, the shares of a split."""
    faults = []
    if shares and split.valid + split.test >= 1:
        faults.append(f"`valid` + `test` must leave rows to train on; got {split.valid} + {split.test}")
    if split.kind != "file" and (split.valid_files or split.test_files):
        faults.append("`valid_files` and `test_files` need split 'file'")
    if split.kind == "file" and not (split.valid_files or split.test_files):
        faults.append("split 'file' needs a pattern in `valid_files` or `test_files`")
    return faults


@dataclass(frozen=True)
class SplitRule(Settings):
    """How rows are assigned to splits; shares are of all valid rows.

    Args:
        kind: ``"order"``: the last rows in file order test, those before them validate (a split by time);
            ``"random"``: each row by a hash of ``seed`` and its number; ``"file"``: whole files by name pattern;
            ``"all"``: every row in the split ``only``.
        valid, test: shares for order (exact to one row) and random (in expectation).
        seed: of the random split.
        valid_files, test_files: glob patterns on a file's name or path.
        only: the split of kind ``"all"``.

    >>> SplitRule(test=Fraction(1, 6)).codes(12, np.arange(12), 0).tolist()
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 2]
    """

    title = "split"
    kind: SplitKind = "order"
    valid: Fraction | float = param(Fraction(1, 10), low=0, below=1)
    test: Fraction | float = param(Fraction(1, 6), low=0, below=1)
    seed: int = 0
    valid_files: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()
    only: SplitName = "test"

    def conflicts(self) -> list[str]:
        return rule_faults(self)

    def codes(self, total: int, rows: NDArray[np.int64], file_code: int) -> NDArray[np.int8]:
        """Split number (0 train, 1 valid, 2 test) per row.

        Args:
            total: good rows in all files.
            rows: numbers of the rows among them, consecutive.
            file_code: split of their file (see :meth:`file_codes`).
        """
        if self.kind == "all":
            return np.full(len(rows), SPLITS.index(self.only), np.int8)
        if self.kind == "file":
            return np.full(len(rows), file_code, np.int8)
        if self.kind == "order":
            test = _nearest(self.test * total)
            valid = min(_nearest(self.valid * total), total - test)
            return ((rows >= total - test - valid).astype(np.int8)) + (rows >= total - test)
        bits = random_bits(stream_key(self.seed, 0x5917), int(rows[0]) if len(rows) else 0, len(rows))
        top = 1 << 64
        in_test = bits < np.uint64(int(self.test * top))
        in_valid = bits < np.uint64(int((self.test + self.valid) * top))
        return np.where(in_test, np.int8(TEST), in_valid.astype(np.int8))

    def file_codes(self, files: Sequence[Path]) -> list[int]:
        """Split of every file for kind ``"file"``.

        Raises:
            ConfigError: a pattern matches nothing, a file matches two splits, or none is left to train on.
        """
        if self.kind != "file":
            return [TRAIN] * len(files)
        codes = [TRAIN] * len(files)
        faults = []
        for code, patterns in ((VALID, self.valid_files), (TEST, self.test_files)):
            for pattern in patterns:
                hits = [i for i, f in enumerate(files) if fnmatch(f.name, pattern) or fnmatch(str(f), pattern)]
                if not hits:
                    faults.append(f"pattern {pattern!r} of split {SPLITS[code]} matches none of the files")
                for i in hits:
                    if codes[i] not in (TRAIN, code):
                        faults.append(f"{files[i]} matches both valid and test")
                    codes[i] = code
        if TRAIN not in codes:
            faults.append("no file is left to train on")
        raise_faults(faults, "split by file")
        return codes


def _nearest(x: Fraction | float) -> int:
    """Nearest whole number, halves up."""
    return int(x + Fraction(1, 2))
