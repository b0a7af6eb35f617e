"""Checks, before any work is done, that the data is sufficient to compare candidates."""

from __future__ import annotations

from recsys_embed.data.checks import label_faults
from recsys_embed.data.data_source import DataSource
from recsys_embed.errors import ConfigError, DataError, raise_faults
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.quality import quality_of

LEAST_OF_A_CLASS = 50
"""Fewest rows of the rarer class for which a metric is more than noise."""


def need_validation(data: DataSource, config: TrainConfig | None = None) -> None:
    """Refuse data on which candidates cannot be told apart.

    Args:
        data: data set.
        config: what its rows must suffice for; by default labels 0 and 1.

    Raises:
        ConfigError: no validation rows, too few, or too few of a class.
    """
    if "valid" not in data.splits:
        raise ConfigError(
            "a search chooses by validation rows, and this data has no split 'valid'; convert it with --valid 1/12"
        )
    need_rows(data, config or TrainConfig(), "valid", "compare candidates", "Convert the data with a larger --valid")


def need_rows(data: DataSource, config: TrainConfig, split: str, purpose: str, remedy: str) -> None:
    """Refuse a split on which runs of these settings cannot be compared: too few rows, or too few of a class.

    Raises:
        ConfigError: says what they are for, and the remedy.
        DataError: labels that are not what the loss takes.
    """
    quality = quality_of(config)
    if quality.key == "auc":
        need_classes(data, split, purpose, remedy)
        return
    # Retrieval models learn and rank the rows of label 1, and all where there are no labels.
    wanted = 2 * LEAST_OF_A_CLASS if quality.key == "rmse" else LEAST_OF_A_CLASS
    found, what = 0, "rows" if quality.key == "rmse" else "positives"
    for batch in data.batches(split, 1 << 16, shuffle=False):
        found += len(batch.label) if quality.key == "rmse" else int((batch.label != 0).sum())
        if found >= wanted:
            return
    raise ConfigError(
        f"the split {split!r} is too small to {purpose}: {found} {what}; at least {wanted} are needed. {remedy}"
    )


def need_classes(data: DataSource, split: str, purpose: str, remedy: str) -> None:
    """Refuse a split with too few rows of a class.

    Raises:
        ConfigError: says what they are for, and the remedy.
        DataError: labels other than 0 and 1, or none.
    """
    positives = negatives = 0
    for batch in data.batches(split, 1 << 16, shuffle=False):
        raise_faults(label_faults(batch.label), f"split {split!r}", DataError)
        positives += int((batch.label > 0.5).sum())
        negatives += int((batch.label <= 0.5).sum())
        if min(positives, negatives) >= LEAST_OF_A_CLASS:
            return
    raise ConfigError(
        f"the split {split!r} is too small to {purpose}: {positives} positives and {negatives} "
        f"negatives; at least {LEAST_OF_A_CLASS} of each are needed. {remedy}"
    )
