"""Clauses of the contract that low-precision rows keep, too, once per method."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest

import recsys_embed.testing
from recsys_embed.registry import MethodInfo, get_method, list_methods
from recsys_embed.testing import EMBEDDING_CHECKS, helpers

CLAUSES = (
    "padding_is_zero_and_learns_nothing",
    "unseen_ids_follow_their_policy",
    "same_seed_same_bits",
    "state_round_trips_and_refuses_others",
    "footprint_is_what_is_stored",
    "runs_in_a_collection",
    "stands_beside_others_in_a_collection",
    "shares_a_table_and_skips_padding",
    "replicas_answer_alike",
    "sparse_gradients_are_announced",
    "takes_jagged_nested_ids",
)


def _stores_rows(method: MethodInfo) -> bool:
    # Tiers have precisions of their own, and sizes that the budgets of `example` do not fit.
    return not (method.config_cls.has_own_precisions or helpers.example(method).config.computes)


@pytest.mark.parametrize("method", [m.name for m in list_methods() if _stores_rows(m)])
def test_contract_of_low_precision_rows(method: str, monkeypatch: Any) -> None:
    info, plain = get_method(method), helpers.example
    options: dict[str, Any] = {"precision": "int8", "quantization": "lpt"}

    def example(method: MethodInfo, *args: Any, **given: Any) -> Any:
        return plain(method, *args, **{**options, **given})

    for part in pkgutil.iter_modules(recsys_embed.testing.__path__):
        module = importlib.import_module(f"recsys_embed.testing.{part.name}")
        if hasattr(module, "example"):
            monkeypatch.setattr(module, "example", example)
    checks = [check for check in EMBEDDING_CHECKS if check.__name__ in CLAUSES]
    assert len(checks) == len(CLAUSES)
    for check in checks:
        check(info)
