"""Rows that are computed, kept for frequent ids within stated bytes while a file is served."""

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.row_cache import RowCache, RowCaches

ROWS, WIDTH = 5000, 8
OPTIONS: list[tuple[str, dict[str, Any]]] = [("tt", {}), ("dhe", {}), ("compositional", {"combine": "path"})]


def _zipf(generator: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy((generator.zipf(1.2, shape) * 2654435761 % ROWS).astype(np.int64))


def _exported(method: str, params: dict[str, Any], path: Path, backend: str = "auto") -> Path:
    schema = Schema([FeatureSpec("a", ROWS, WIDTH), FeatureSpec("b", ROWS, WIDTH), FeatureSpec("c", 10, WIDTH)])
    some = Plan.uniform(schema, method, budget="120KiB", **params)
    plan = Plan({"a": some["a"], "b": some["b"], "c": Plan.full(schema)["c"]})
    rse.export(EmbeddingCollection(schema, plan, backend=backend), path)
    return path


@pytest.mark.parametrize(("method", "params"), OPTIONS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_served_rows_are_those_of_the_module_without_a_cache(
    tmp_path: Path, method: str, params: dict[str, Any], backend: Any
) -> None:
    path = _exported(method, params, tmp_path / "m")
    plain = rse.load(path, backend=backend)
    served = rse.load(path, backend=backend, cached_rows="40KiB")
    same = {"rtol": 0, "atol": 0} if method == "tt" else {"rtol": 1e-5, "atol": 1e-6}
    generator = np.random.default_rng(0)
    for turn in range(12):
        ids = torch.cat([_zipf(generator, 200, 2), torch.zeros(200, 1, dtype=torch.int64)], 1)
        with torch.inference_mode(turn % 2 == 0):
            torch.testing.assert_close(served(ids), plain(ids), **same)
        bags = ids.T.reshape(-1), torch.arange(0, 601, 4)
        torch.testing.assert_close(served(*bags), plain(*bags), **same)
        torch.testing.assert_close(served.lookup("b", ids[:, 1]), plain.lookup("b", ids[:, 1]), **same)
    caches = [cache for m in served.modules() if isinstance(m, RowCaches) for cache in m.by_feature.values()]
    assert len(caches) == 2
    held = sum(cache.nbytes for cache in caches)
    assert 0 < held <= 40 << 10
    assert served.footprint().serve - plain.footprint().serve == held
    assert rse.memory_report(served).total("serve") - rse.memory_report(plain).total("serve") == held
    assert any("caches of computed rows hold" in note for note in rse.memory_report(served).notes)
    for cache in caches:
        assert cache.counts().hits > cache.counts().misses
        assert 0 < cache.counts().rows <= (20 << 10) / (4 * WIDTH)


def test_frequent_ids_stay_and_rare_ones_make_way() -> None:
    computed: list[int] = []

    def compute(ids: Tensor) -> Tensor:
        computed.extend(ids.tolist())
        return ids.unsqueeze(1).float().expand(-1, 4)

    cache, generator = RowCache(4, 64 * 36 + 35), np.random.default_rng(1)
    frequent = torch.arange(20)
    for _ in range(60):
        ids = torch.cat([frequent, torch.from_numpy(generator.integers(20, 10**9, 40))])
        assert torch.equal(cache(ids, compute)[:, 0], ids.float())
    assert cache.nbytes == 64 * 36
    computed.clear()
    cache(frequent, compute)
    assert len(computed) <= 2, "those whose set of places has eight more frequent ones"


def test_threads_share_a_cache() -> None:
    cache, wrong = RowCache(4, 100 * 36), []

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(150):
            ids = _zipf(generator, 300)
            if not torch.equal(cache(ids, lambda d: d.unsqueeze(1).float().expand(-1, 4))[:, 3], ids.float()):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_weights_make_it_forget(tmp_path: Path) -> None:
    path = _exported("tt", {}, tmp_path / "m")
    served, ids = rse.load(path, cached_rows="1MiB"), torch.zeros(4, 3, dtype=torch.int64)
    before = served(ids)
    half = served.double()
    assert half(ids).dtype == torch.float64
    served = rse.load(path, cached_rows="1MiB")
    served(ids)
    served.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in served.state_dict().items()})
    assert not torch.equal(served(ids)[:, 0], before[:, 0])
    before = served(ids)
    with torch.no_grad():
        for parameter in served.parameters():
            parameter.mul_(2)
    copied = copy.deepcopy(served)
    assert not torch.equal(served(ids)[:, 0], before[:, 0])
    assert torch.equal(copied(ids), served(ids))
    served.requires_grad_(True)
    assert served(ids).requires_grad, "rows that were kept have no gradient"


def test_embeddings_and_models_have_caches_too(tmp_path: Path) -> None:
    ids = torch.arange(50) % 7
    rse.export(rse.make_embedding("tt", ROWS, WIDTH, budget="30KiB"), tmp_path / "e")
    served: nn.Module = rse.load(tmp_path / "e", cached_rows=10_000)
    assert torch.equal(served(ids), rse.load(tmp_path / "e")(ids))
    served(ids)
    assert served.caches.by_feature[0].counts()[:2] == (7, 7)
    held = served.footprint().serve - rse.load(tmp_path / "e").footprint().serve
    assert held == served.caches.nbytes > 0
    served = rse.load(tmp_path / "e", cached_rows="900TiB")
    served(ids)
    assert served.caches.nbytes <= 2 * (ROWS + 4) * (4 * WIDTH + 20), "no more than two places for each id"
    report = rse.memory_report(served).total("serve")
    assert report == served.footprint().serve


def test_it_is_refused_where_it_keeps_nothing(tmp_path: Path) -> None:
    rse.export(EmbeddingCollection(Schema([FeatureSpec("a", 9, WIDTH)])), tmp_path / "m")
    with pytest.raises(ConfigError, match=r"`cached_rows` keeps rows that are computed .* and\s+this file has none"):
        rse.load(tmp_path / "m", cached_rows="1MiB")
    path = _exported("tt", {}, tmp_path / "t")
    with pytest.raises(ConfigError, match=r"takes \d+ bytes or more; got 50"):
        rse.load(path, cached_rows=100)
    schema = Schema([FeatureSpec("a", ROWS, WIDTH, ids="raw")])
    rse.export(EmbeddingCollection(schema, Plan.uniform(schema, "dhe", budget="60KiB")), tmp_path / "d")
    with pytest.raises(ConfigError, match="cannot be allocated; give fewer"):
        rse.load(tmp_path / "d", cached_rows="900TiB")
    with pytest.raises(ConfigError, match="a byte size is"):
        rse.load(path, cached_rows="many")
