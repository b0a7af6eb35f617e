"""Where the truth is known, searches find it: useless rows die, widths follow ranks, both beat uniform tables."""

from __future__ import annotations

import pytest
import torch

from recsys_embed import OptembedConfig, Plan
from recsys_embed.plan import Plan as PlanType
from recsys_embed.search import DnisSettings, OptembedSearch, OptembedSettings, run_search
from recsys_embed.search.dnis import DnisSearch
from recsys_embed.search.retrain import planned
from recsys_embed.train import TrainConfig, run_training
from tests.search.planted import IDS, RANKS, Planted, planted_config
from tests.tiers import slow_but

WIDTH = 8
SEEDS = pytest.mark.parametrize("seed", slow_but(range(5), 0))


def uniform_auc(data: Planted, config: TrainConfig, size: int) -> float:
    """Test AUC of tables as wide as ``size`` bytes allow, one column at least, the same for all fields."""
    schema = data.schema(WIDTH)
    width = max(1, size // (4 * sum(s.num_ids for s in schema)))
    plan = Plan({s.name: OptembedConfig(num_kept=s.num_ids, dim=width) for s in schema})
    return run_training(planned(config, plan), data).result.test.auc


def rows_of(plan: PlanType, data: Planted, name: str) -> torch.Tensor:
    """Which ids of a feature own a row: bool ``[ids]``."""
    spec, config = data.schema(WIDTH)[name], plan[name]
    kept = torch.zeros(spec.num_ids, dtype=torch.bool)
    if config.method == "full" or config.order == "ids":
        kept[: getattr(config, "num_kept", spec.num_ids)] = True
    else:
        kept[plan.members(spec)["kept"]] = True
    return kept


@SEEDS
def test_optembed_keeps_the_rows_that_matter(seed: int) -> None:
    data, config = Planted(seed), planted_config(seed=seed, epochs=8)
    settings = OptembedSettings(generations=8, threshold_lr=0.7, pull=2e-3, size_weight=0.02)
    found = run_search(OptembedSearch, config, data, settings)
    kept = {name: rows_of(found.plan, data, name) for name in RANKS}
    head = torch.arange(len(kept["tail"])) < IDS
    assert all(kept[name].float().mean() >= 0.9 for name in ("rank_1", "rank_2", "rank_4"))
    assert kept["tail"][head].float().mean() >= 0.9
    assert kept["tail"][~head].float().mean() <= 0.05, "values that hardly occur die by decay"
    nothing = torch.cat([kept["none_a"], kept["none_b"]]).float().mean()
    assert nothing <= 0.5, "fields that say nothing lose most rows"
    odd = torch.arange(IDS) % 2 == 1
    assert kept["half"][odd].float().mean() >= kept["half"][~odd].float().mean() + 0.2
    spent = found.plan.footprint(data.schema(WIDTH)).serve
    whole = 4 * WIDTH * sum(s.num_ids for s in data.schema(WIDTH))
    assert spent < whole / 3
    assert found.result.test.auc >= uniform_auc(data, config, spent) + 0.05
    assert found.result.test.auc >= 0.875


@SEEDS
def test_dnis_finds_widths_that_follow_the_ranks(seed: int) -> None:
    data, config = Planted(seed), planted_config(seed=seed, epochs=8)
    settings = DnisSettings(blocks=2, scope="field", search_epochs=8, sparsity=0.88, l1=1e-2)
    found = run_search(DnisSearch, config, data, settings)
    widths = {name: [bits.bit_count() for bits in found.plan[name].columns] for name in RANKS}
    assert set(widths["none_a"] + widths["none_b"]) == {0}
    mean = {name: sum(w) / len(w) for name, w in widths.items()}
    assert 1 <= mean["rank_1"] < mean["rank_2"] < mean["rank_4"]
    assert abs(mean["rank_1"] - 1) <= 0.5
    assert abs(mean["rank_2"] - 2) <= 1.5
    assert abs(mean["rank_4"] - 4) <= 2
    assert widths["tail"][0] >= 1, "ids of the head keep columns"
    assert widths["tail"][-1] == 0, "ids that hardly occur keep none"
    spent = found.plan.footprint(data.schema(WIDTH)).serve
    assert found.result.test.auc >= uniform_auc(data, config, spent) + 0.03


@pytest.mark.slow
@SEEDS
def test_dnis_with_blocks_of_all_fields_spends_columns_where_there_is_something_to_tell(seed: int) -> None:
    data, config = Planted(seed), planted_config(seed=seed, epochs=8)
    found = run_search(DnisSearch, config, data, DnisSettings(search_epochs=8, sparsity=0.88, l1=1e-2))
    widths = {name: [bits.bit_count() for bits in found.plan[name].columns] for name in RANKS}
    mean = {name: sum(w) / len(w) for name, w in widths.items()}
    assert max(mean["none_a"], mean["none_b"]) + 0.5 <= mean["rank_1"] < mean["rank_4"]
    assert mean["rank_2"] < mean["rank_4"]
    assert widths["tail"][0] >= 1
    assert widths["tail"][-1] == 0, "ids that hardly occur keep none"
    spent = found.plan.footprint(data.schema(WIDTH)).serve
    assert found.result.test.auc >= uniform_auc(data, config, spent) + 0.03
