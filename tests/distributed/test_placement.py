"""What fits where: predictions hold for what processes then really allocate, and a refusal says what would fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recsys_embed as rse
from recsys_embed.cli import main
from recsys_embed.core.footprint import parse_bytes
from recsys_embed.errors import ConfigError, UnknownNameError
from recsys_embed.sharding.placement import Cluster, largest_budget, place
from tests.distributed.cases import RULES, plan_for, schema_for
from tests.distributed.workers import Workers

BIG = rse.Schema([rse.FeatureSpec(f"C{i}", n, 64) for i, n in enumerate((4_000_000, 1_000_000, 90_000, 3000, 5))])


@given(world=st.sampled_from([1, 2, 4, 8]), gib=st.floats(0.05, 4.0), kind=st.sampled_from([None, "row_wise"]))
@settings(max_examples=25)
def test_a_placement_holds_every_byte_within_bounds_or_says_what_would(world: int, gib: float, kind: Any) -> None:
    cluster = Cluster(world, hbm=int(gib * 2**30), batch_size=256)
    found = place(BIG, None, cluster, kinds=kind)
    alone = sum(4 * s.num_embeddings * 65 for s in BIG)
    assert found.total == alone
    if found.fits:
        assert len(found.weights) == world
        replicas = sum(t.bytes for t in found.tables if t.kind == "data_parallel") * (world - 1)
        assert sum(found.weights) == pytest.approx(alone + replicas, abs=world)
        assert max(found.memory) <= cluster.usable * (1 + 0.15 / 0.85) + 1
        assert {t.table for t in found.tables} == {f"{s.name}.weight" for s in BIG}
    else:
        assert "Ways out" in found.why


def test_what_a_refusal_names_fits() -> None:
    """Each way out that it names is enough."""
    cluster = Cluster(2, hbm="400MiB", batch_size=64)
    found = place(BIG, None, cluster)
    assert not found.fits
    words = found.why.split("Ways out: ")[1]
    size = words.split("tables of ")[1].split(" or less")[0].replace(" ", "")
    devices = int(words.split("2. ")[1].split(" devices")[0])
    memory = words.split("3. ")[1].split(" per device")[0].replace(" ", "")
    assert place(BIG, None, Cluster(devices, hbm="400MiB", batch_size=64), kinds="row_wise").fits
    more = int(parse_bytes(memory) * 1.02)
    assert place(BIG, None, Cluster(2, hbm=more, batch_size=64), kinds="row_wise").fits
    plan = rse.plan_for_budget(BIG, int(parse_bytes(size) * 0.9))
    assert place(BIG, plan, cluster, kinds="row_wise", pool="ids").fits


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "mixed", None])
@pytest.mark.parametrize("method", ["full", "compositional", "memcom"])
def test_predicted_bytes_are_allocated(workers: Workers, method: str, kind: Any) -> None:
    """Per rank, as the shards in the processes have them."""
    held = workers.run("bytes_held", 2, method=method, kind=kind, rule="rowwise_adagrad")
    assert [h["weights"] for h in held] == [h["predicted"] for h in held]
    schema = schema_for()
    found = place(schema, plan_for(schema, method), Cluster(2, device="cpu"), optimizer=RULES["rowwise_adagrad"])
    assert found.fits


def test_clusters_and_kinds_out_of_range() -> None:
    with pytest.raises(ConfigError, match="`hosts` must divide `world_size`; got 3 and 8"):
        Cluster(8, hosts=3)
    with pytest.raises(ConfigError, match=r"(?s)3 faults.*`world_size`.*`reserved`.*`hbm`: .*got 'lots'"):
        Cluster(0, reserved=2.0, hbm="lots")
    with pytest.raises(UnknownNameError, match=r"unknown table 'C9'\. Known: C0"):
        place(BIG, None, Cluster(2), kinds={"C9": "row_wise"})
    with pytest.raises(ConfigError, match=r"'C0\.weight' cannot be 'column_wise': its rule keeps one number per row"):
        place(BIG, None, Cluster(2), kinds={"C0": "column_wise"})
    with pytest.raises(ConfigError, match="leave one of 8 ranks without any; take one of"):
        place(BIG, None, Cluster(8), kinds={"C4": "row_wise"})
    with pytest.raises(ConfigError, match="which fbgemm does not run on cpu; take one of data_parallel"):
        place(BIG, None, Cluster(2, device="cpu"), optimizer=rse.Adam(), kinds="row_wise")
    assert largest_budget(Cluster(4, hbm="1GiB")) < 4 * 2**30


def test_the_command_prints_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(BIG.to_dict()))
    common = ["plan", "--schema", str(file), "--world-size", "4", "--hosts", "2", "--hbm", "300MiB"]
    assert main(common) == 0
    text = capsys.readouterr().out
    assert "4 devices of 300.00 MiB on 2 hosts" in text
    assert [line.split() for line in text.splitlines() if line.startswith("fits")] == [["fits", "yes", "no"]]
    assert "full tables: all tables and their state take 1.23 GiB; 4 devices" in text
    assert main([*common, "--budget", "60MiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["placement"]
    assert found["compressed"]["fits"]
    assert not found["full"]["fits"]
    assert found["full"]["step_ms"] is None, "NaN is no JSON"
    assert sum(found["compressed"]["weights_per_rank"]) >= found["compressed"]["bytes"] - 4
    assert main(["plan", "--schema", str(file)]) == 2
    assert "give --budget, or --world-size" in capsys.readouterr().err
    assert main(["plan", "--schema", str(file), "--budget", "60MiB", "--hosts", "2", "--hbm", "40GiB"]) == 2
    assert "--hosts, --hbm and --batch-size go with --world-size" in capsys.readouterr().err
