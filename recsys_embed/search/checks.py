"""Checks, before any work is done, that the data is sufficient to compare candidates."""

from __future__ import annotations

from recsys_embed.data.checks import label_faults
from recsys_embed.data.data_source import DataSource
from recsys_embed.errors import ConfigError, DataError, raise_faults
from recsys_embed.models import RetrievalModel, get_model
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.losses import LOSSES

LEAST_OF_A_CLASS = 50
"""Fewest rows of the rarer class for which a metric is more than noise."""


def need_validation(data: DataSource) -> None:
    """Refuse data on which candidates cannot be told apart.

    Raises:
        ConfigError: no validation rows, or too few of a class.
    """
    if "valid" not in data.splits:
        raise ConfigError(
            "a search chooses by validation rows, and this data has no split 'valid'; convert it with --valid 1/12"
        )
    need_classes(data, "valid", "compare candidates", "Convert the data with a larger --valid")


def need_logloss(config: TrainConfig) -> None:
    """Refuse another loss than logloss: searches compare candidates by AUC.

    Raises:
        ConfigError: says what to do.
    """
    if not LOSSES[config.loss].needs_labels:
        raise ConfigError(
            f"a search compares candidates by the AUC of labels 0 and 1, and loss={config.loss!r} ranks items; train "
            "several methods and ratios beside each other: recsys-embed compare, which tells recall and NDCG"
        )
    if config.loss != "logloss":
        raise ConfigError(
            f"a search compares candidates by the AUC of labels 0 and 1; got loss={config.loss!r}. Map the labels, "
            "e.g. label > 0, or plan without a search: recsys-embed plan"
        )


def need_single_ids(data: DataSource, config: TrainConfig) -> None:
    """Refuse lists and sequences, which the layers of a supernet, one vector per feature and row, cannot mask.

    Raises:
        ConfigError: names them, and what else chooses their storage.
    """
    need_logloss(config)
    if issubclass(get_model(config.model), RetrievalModel):
        raise ConfigError(
            f"a search of rows and widths masks the vectors of one id per feature and row, and model {config.model!r} "
            "also looks up items alone. Choose methods and sizes by `search methods`, which trains whole plans, or by "
            "`compare`"
        )
    count = getattr(data, "num_lists", 0)
    if count:
        names = ", ".join(data.schema(1).names[-count:])
        raise ConfigError(
            f"a search of rows and widths needs one id per feature and row; {names} have lists. Choose methods and "
            "sizes by `search methods`, which trains whole plans, or by `plan`"
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
