"""The whole contract of a method."""

from __future__ import annotations

from collections.abc import Callable

from recsys_embed.registry import MethodInfo, get_method
from recsys_embed.testing.call_checks import (
    bags_pool_the_vectors_of_their_ids,
    compiles_and_exports_whole,
    equals_its_program,
    gradients_are_right,
    ids_out_of_range_raise_unless_hashed,
    padding_is_zero_and_learns_nothing,
    shapes_are_those_of_torch,
    unseen_ids_follow_their_policy,
)
from recsys_embed.testing.collection_checks import (
    runs_in_a_collection,
    shares_a_table_and_skips_padding,
    stands_beside_others_in_a_collection,
    training_bytes_agree,
)
from recsys_embed.testing.state_checks import (
    budgets_are_kept,
    config_is_data,
    counts_leave_recomputed_activations_out,
    draws_by_torchs_generator_unless_seeded,
    fits_a_trained_table,
    footprint_is_what_is_stored,
    integers_survive_averages_casts_and_moves,
    names_follow_the_key,
    names_of_earlier_versions_are_read,
    options_are_given_by_keyword,
    same_seed_same_bits,
    starts_with_the_distribution_of_a_full_table,
    state_round_trips_and_refuses_others,
    survives_the_meta_device,
    what_is_planned_is_declared,
)
from recsys_embed.testing.torch_checks import (
    keeps_its_type_under_autocast,
    one_node_for_torch_fx,
    replicas_answer_alike,
    sparse_gradients_are_announced,
    takes_jagged_nested_ids,
    traced_by_torch_jit_as_called,
    works_under_function_transforms,
)

EMBEDDING_CHECKS: tuple[Callable[[MethodInfo], None], ...] = (
    names_follow_the_key,
    shapes_are_those_of_torch,
    bags_pool_the_vectors_of_their_ids,
    padding_is_zero_and_learns_nothing,
    ids_out_of_range_raise_unless_hashed,
    unseen_ids_follow_their_policy,
    same_seed_same_bits,
    draws_by_torchs_generator_unless_seeded,
    starts_with_the_distribution_of_a_full_table,
    gradients_are_right,
    equals_its_program,
    state_round_trips_and_refuses_others,
    footprint_is_what_is_stored,
    budgets_are_kept,
    config_is_data,
    options_are_given_by_keyword,
    names_of_earlier_versions_are_read,
    what_is_planned_is_declared,
    survives_the_meta_device,
    integers_survive_averages_casts_and_moves,
    counts_leave_recomputed_activations_out,
    compiles_and_exports_whole,
    fits_a_trained_table,
    runs_in_a_collection,
    stands_beside_others_in_a_collection,
    shares_a_table_and_skips_padding,
    training_bytes_agree,
    keeps_its_type_under_autocast,
    one_node_for_torch_fx,
    replicas_answer_alike,
    sparse_gradients_are_announced,
    takes_jagged_nested_ids,
    traced_by_torch_jit_as_called,
    works_under_function_transforms,
)


def check_embedding(method: str | MethodInfo) -> None:
    """Run the whole contract of a registered method.

    Raises:
        AssertionError: names the broken clause.

    >>> check_embedding("hash")
    """
    info = get_method(method) if isinstance(method, str) else method
    for check in EMBEDDING_CHECKS:
        check(info)
