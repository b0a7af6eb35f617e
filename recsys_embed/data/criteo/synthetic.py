"""Synthetic data in Criteo's file format with a known click model: text, true probabilities, and a data folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys_embed.data.conversion import Progress, different
from recsys_embed.data.criteo.convert import convert_criteo
from recsys_embed.data.criteo.layout import NUM_CATS, NUM_INTS
from recsys_embed.data.criteo.options import CriteoOptions
from recsys_embed.data.criteo.planted import DEFAULT_ROWS, DEFAULT_SCALE, PlantedModel, PlantedRows, sigmoid
from recsys_embed.data.folder import CHANCE_FILE, SCHEMA_FILE, TEXT_FILE, TRUTH_FILE, lock, write_file, write_json
from recsys_embed.data.splits import SPLITS, SplitRule
from recsys_embed.errors import ConfigError, DataError, raise_faults
from recsys_embed.utils.strict_json import own_json

_CHUNK = 1 << 15
_NIBBLE = np.frombuffer(b"0123456789abcdef", np.uint8)


@dataclass(frozen=True)
class SyntheticReport:
    """What was made: rows, click rate, and AUC and logloss of the planted probability per split."""

    out: Path
    rows: int
    click_rate: float
    attainable: dict[str, dict[str, float]]
    already_done: bool


def make_synthetic(
    out: str | Path,
    rows: int = DEFAULT_ROWS,
    seed: int = 0,
    *,
    scale: float = DEFAULT_SCALE,
    options: CriteoOptions | None = None,
    text_only: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SyntheticReport:
    """Write ``synthetic.tsv``, ``truth.json`` and ``truth.parquet`` to ``out`` and convert the text to a data folder.

    ``truth.json`` describes the planted model and states the AUC and logloss its probabilities reach on each split:
    nothing trained on these rows can be expected to do better. ``truth.parquet`` holds the probability of every row.
    Equal arguments give equal bytes.

    Args:
        out: folder to make.
        rows: number of rows.
        seed: of ids, numbers, planted effects and clicks.
        scale: factor on the real cardinalities; fields keep at least 100 values (or their own number, if smaller).
        options: of the conversion.
        text_only: leave out the conversion.
        overwrite: replace what ``out`` holds.
        progress: see ``Progress``; the first stage is called make.

    Raises:
        ConfigError: arguments out of range, or ``out`` holds something else.
    """
    faults = []
    if not isinstance(rows, int) or rows < 12:
        faults.append(f"`rows` must be an integer of at least 12; got {rows!r}")
    if not isinstance(seed, int) or seed < 0:
        faults.append(f"`seed` must be an integer of at least 0; got {seed!r}")
    if not 0 < scale <= 1:
        faults.append(f"`scale` must be in (0, 1]; got {scale!r}")
    raise_faults(faults, "data synthetic")
    out, options, report = Path(out), options or CriteoOptions(), progress or (lambda *_: None)
    plan = {"rows": rows, "seed": seed, "scale": scale, "split": options.content["split"]}
    text = out / TEXT_FILE
    truth = _earlier(out, plan, overwrite)
    if truth is None:
        with lock(out):
            (out / TRUTH_FILE).unlink(missing_ok=True)
            truth = _generate(out, plan, options.split, report)
    if text_only:
        return SyntheticReport(out, rows, truth["click_rate"], truth["attainable"], False)
    done = convert_criteo(text, out, options, overwrite=overwrite, progress=report, extra={"truth": truth})
    return SyntheticReport(out, rows, truth["click_rate"], truth["attainable"], done.already_done)


def _earlier(out: Path, plan: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The truth an identical earlier call wrote, or None if there is none.

    Raises:
        ConfigError: the folder holds other data.
    """
    path = out / TRUTH_FILE
    if overwrite or not (path.exists() or (out / SCHEMA_FILE).exists()):
        return None
    if not path.exists():
        raise ConfigError(f"{out} holds a data set that is not synthetic; choose another folder, or pass --overwrite")
    try:
        truth = own_json(path.read_text(encoding="utf-8"))
        changed = different(truth["plan"], plan)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path}: cannot be read ({e!r}); pass --overwrite to make the data again") from e
    if changed:
        raise ConfigError(
            f"{out} holds synthetic data made with other settings ({'; '.join(changed)}); "
            "choose another folder, or pass --overwrite"
        )
    return truth if (out / TEXT_FILE).exists() else None


def _generate(out: Path, plan: dict[str, Any], rule: SplitRule, progress: Progress) -> dict[str, Any]:
    rows = plan["rows"]
    model = PlantedModel(plan["seed"], plan["scale"])
    model.calibrate()
    chance = np.empty(rows, np.float32)
    clicks = np.empty(rows, bool)

    def save(temporary: Path) -> None:
        with temporary.open("wb") as f:
            for start in range(0, rows, _CHUNK):
                made = model.rows(start, min(_CHUNK, rows - start))
                stop = start + len(made.labels)
                chance[start:stop], clicks[start:stop] = sigmoid(made.logits), made.labels
                f.write(format_rows(made))
                progress("make", stop, rows, stop)

    write_file(out / TEXT_FILE, save)
    frame = pl.DataFrame({"probability": chance})
    write_file(out / CHANCE_FILE, lambda p: frame.write_parquet(p, compression="lz4", statistics=False))
    codes = rule.codes(rows, np.arange(rows), 0)
    groups = {"all": np.ones(rows, bool), **{name: codes == i for i, name in enumerate(SPLITS) if (codes == i).any()}}
    truth = {
        "plan": plan,
        "click_rate": round(float(clicks.mean()), 6),
        "attainable": {
            name: {
                "auc": round(auc(clicks[g], chance[g]), 6),
                "logloss": round(logloss(clicks[g], chance[g].astype(np.float64)), 6),
            }
            for name, g in groups.items()
        },
        "model": model.describe(),
    }
    write_json(out / TRUTH_FILE, truth)
    return truth


def format_rows(made: PlantedRows) -> bytes:
    """Rows as Criteo text: label, 13 integers, 26 categories of 8 hex digits, tabs between, LF after each.

    All fields are laid out at fixed width first; one mask then drops the bytes that are not there.
    """
    n = len(made.labels)
    digits = len(str(int(np.abs(made.ints).max(initial=1))))
    width = 1 + NUM_INTS * (digits + 2) + NUM_CATS * 9 + 1
    text = np.full((n, width), ord("\t"), np.uint8)
    keep = np.ones((n, width), bool)
    text[:, 0] = made.labels
    text[:, 0] += ord("0")
    at = 1
    for value, gone in zip(made.ints, made.ints_missing, strict=True):
        negative = value < 0
        text[:, at + 1] = ord("-")
        keep[:, at + 1] = negative & ~gone
        left = np.abs(value).astype(np.uint32)
        for k in range(digits - 1, -1, -1):
            cell = at + 2 + k
            keep[:, cell] = ((left > 0) | (k == digits - 1)) & ~gone
            tens = left // np.uint32(10)
            text[:, cell] = left - tens * np.uint32(10) + np.uint32(ord("0"))
            left = tens
        at += digits + 2
    for value, gone in zip(made.cats, made.cats_missing, strict=True):
        for k in range(8):
            text[:, at + 1 + k] = _NIBBLE[(value >> np.uint32(28 - 4 * k)) & np.uint32(15)]
        keep[:, at + 1 : at + 9] = ~gone[:, None]
        at += 9
    text[:, -1] = ord("\n")
    return text[keep].tobytes()


def auc(clicks: NDArray[np.bool_], score: NDArray[Any]) -> float:
    """Area under the ROC curve, ties counted half; NaN if one class is absent.

    >>> auc(np.array([True, False, True, False]), np.array([.9, .1, .5, .5]))
    0.875
    """
    _, group, size = np.unique(score, return_inverse=True, return_counts=True)
    ahead = np.cumsum(size) - (size - 1) / 2
    ones = int(clicks.sum())
    zeros = len(clicks) - ones
    if not ones or not zeros:
        return float("nan")
    return float((ahead[group][clicks].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def logloss(clicks: NDArray[np.bool_], chance: NDArray[np.float64]) -> float:
    """Mean negative log-likelihood of the clicks, in nats."""
    return float(-np.mean(np.log(np.where(clicks, chance, 1.0 - chance))))
