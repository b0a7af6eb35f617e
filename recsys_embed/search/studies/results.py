"""Results of a study: trials as rows, parameter importances, and rank correlation of short and full training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState

from recsys_embed.core.footprint import format_bytes
from recsys_embed.errors import BudgetError, ConfigError
from recsys_embed.search.studies.study import MethodStudy
from recsys_embed.search.studies.trial import key_of
from recsys_embed.train.quality import AUC, Quality

_FULL = "full_auc"  # of whatever quality: studies that have begun keep it


def rows_of(study: MethodStudy) -> list[dict[str, Any]]:
    """Every trial that is over, JSON-ready, in order of number."""
    names = study.settings.objectives
    rows = []
    for t in study.study.get_trials(deepcopy=False):
        if not t.state.is_finished():
            continue
        values = dict(zip(names, t.values, strict=True)) if t.state == TrialState.COMPLETE else {}
        rows.append(
            {
                "trial": t.number,
                "state": t.state.name.lower(),
                study.quality.key: values.get(study.quality.key),
                "bytes": t.user_attrs.get("bytes"),
                **({"latency": values.get("latency")} if "latency" in names else {}),
                "params": dict(t.params),
                "reason": t.user_attrs.get("reason", ""),
                "from": t.user_attrs.get("from", study.settings.sampler),
            }
        )
    return rows


def importance(study: MethodStudy) -> dict[str, float]:
    """Importance of each parameter for the validation quality, by PED-ANOVA; empty while too few trials are complete.

    The values of all parameters add up to 1.
    """
    done = study.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < 4 or len({t.values[0] for t in done}) < 2:
        return {}
    with warnings.catch_warnings():  # the evaluator is called experimental
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(
            study.study,
            evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
            target=lambda t: t.values[0],
        )
    return {name: float(value) for name, value in found.items()}


def best_under(rows: Sequence[dict[str, Any]], most: int, quality: Quality = AUC) -> dict[str, Any]:
    """The complete trial of the best quality that takes at most ``most`` bytes.

    Raises:
        BudgetError: none does.

    >>> best_under([{"state": "complete", "auc": 0.7, "bytes": 10}, {"state": "complete", "auc": 0.8, "bytes": 30}], 20)
    {'state': 'complete', 'auc': 0.7, 'bytes': 10}
    """
    done = [r for r in rows if r["state"] == "complete"]
    if not done:
        raise ConfigError("the study has no complete trial yet; run it on, or with more trials")
    fitting = [r for r in done if r["bytes"] <= most]
    if not fitting:
        raise BudgetError(
            f"no trial takes at most {format_bytes(most)}; the smallest takes "
            f"{format_bytes(min(r['bytes'] for r in done))}. Ways out: 1. a larger size; 2. a study of smaller budgets"
        )
    return max(fitting, key=lambda r: (quality.score(r[quality.key]), -r["bytes"]))


def check_proxy(
    study: MethodStudy, count: int, say: Callable[[int, float, float], None] | None = None
) -> dict[str, Any] | None:
    """Train some trials in full and compare the order of their quality with that of the short trainings.

    Args:
        study: with ``proxy`` below 1; after its trials.
        count: trials to train in full, spread evenly from the worst to the best; those trained before are kept.
        say: called after each with its number, its short and its full quality.

    Returns:
        ``spearman`` (rank correlation) and ``trials``; None where fewer than 3 can be compared.
    """
    quality = study.quality
    rows = [r for r in rows_of(study) if r["state"] == "complete"]
    done = sorted(rows, key=lambda r: quality.score(r[quality.key]))
    count = min(count, len(done))
    if count < 3:
        return None
    chosen = [done[round(i * (len(done) - 1) / (count - 1))] for i in range(count)]
    known = dict(study.study.user_attrs.get(_FULL, {}))
    for row in chosen:
        key = str(row["trial"])
        if key not in known:
            config = study.training_config(row["params"])
            known[key] = quality.of(study.train(config)[1].valid)
            with study.guarded():
                study.study.set_user_attr(_FULL, known)
            study.training_folders.forget(key_of(config))
        if say is not None:
            say(row["trial"], row[quality.key], known[key])
    short, full = [r[quality.key] for r in chosen], [known[str(r["trial"])] for r in chosen]
    return {
        "spearman": spearman(short, full),
        "trials": [{"trial": r["trial"], "short": s, "full": f} for r, s, f in zip(chosen, short, full, strict=True)],
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation; equal values share their mean rank; None where one side is constant.

    >>> spearman([1, 2, 3, 4], [10, 30, 20, 40])
    0.8
    """
    ra, rb = _ranks(a), _ranks(b)
    middle = (len(a) - 1) / 2
    both = sum((x - middle) * (y - middle) for x, y in zip(ra, rb, strict=True))
    scale = sum((x - middle) ** 2 for x in ra) * sum((y - middle) ** 2 for y in rb)
    return both / scale**0.5 if scale else None


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]
