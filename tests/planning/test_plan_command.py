"""``recsys-embed plan`` on data folders, schema files and models, and what it says about bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recsys_embed import FeatureSpec, Plan, Schema
from recsys_embed.cli import main
from recsys_embed.core.footprint import format_bytes
from recsys_embed.data import make_synthetic, open_dataset
from recsys_embed.planning import describe_changes, plan_for_budget, size_in_words
from recsys_embed.train.plans import first_order_bytes

SCHEMA = Schema([FeatureSpec("C1", 100, 16), FeatureSpec("C2", 50_000, 16), FeatureSpec("C3", 9000, 16)])


@pytest.fixture
def schema_file(tmp_path: Path) -> Path:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA.to_dict()))
    return path


def test_a_schema_is_planned_shown_and_written(
    schema_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "plan.json"
    assert main(["plan", "--schema", str(schema_file), "--budget", "300KiB", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    plan = plan_for_budget(SCHEMA, "300KiB")
    assert Plan.from_dict(json.loads(out.read_text())) == plan
    assert out.read_text() == plan.to_json() + "\n"
    for part in ("C1", "50,000", "full", plan["C2"].method, "of 300.00 KiB", "predicted loss", "Zipf curves"):
        assert part in text
    assert "\x1b" not in text
    extra = format_bytes(first_order_bytes(plan, SCHEMA))
    assert f"of deepfm, fm, widedeep come on top: {extra} with 'train --plan'" in " ".join(text.split())


def test_rows_that_ids_share_for_want_of_bytes_are_said_once(
    schema_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["plan", "--schema", str(schema_file), "--budget", "100KiB"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert out.count("warning: ids of 'C2' share rows") == 1
    assert "UserWarning" not in err
    assert main([*args, "--json"]) == 0
    assert "ids of 'C2' share rows" in json.loads(capsys.readouterr().out)["notes"]["warnings"][0]
    assert main([*args, "--network"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_limits_and_target_reach_the_planner(schema_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", "--schema", str(schema_file), "--budget", "1MiB", "--target", "train", "--optimizer", "adam"]
    args += ["--methods", "full,hash,lowdim", "--pin", "C2=lowdim", "--forbid", "C3=lowdim,full", "--json"]
    assert main([*args, "--budget", "500KiB"]) == 2, "C2 in lowdim takes 200 kB, and Adam twice as much"
    capsys.readouterr()
    assert main([*args, "--budget", "2MiB", "--full-below", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [f["method"] for f in found["features"].values()][1:] == ["lowdim", "hash"]
    assert (found["notes"]["target"], found["notes"]["optimizer"]) == ("train", "Adam")


def test_a_pin_may_be_a_whole_configuration(schema_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pin = 'C2={"method": "hash", "num_buckets": 123}'
    assert main(["plan", "--schema", str(schema_file), "--budget", "300KiB", "--pin", pin, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["features"]["C2"]["num_buckets"] == 123


def test_data_folders_bring_their_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    make_synthetic(folder, 3000, seed=0)
    data = open_dataset(folder)
    schema = data.schema(8)
    budget = Plan.full(schema).footprint(schema).serve // 8
    few = ["--methods", "hash,unified", "--budget", str(budget), "--json"]
    assert main(["plan", "--data", str(folder), "--dim", "8", *few]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["notes"]["statistics"] == "counted"
    assert Plan.from_dict(found) == plan_for_budget(schema, budget, stats=data, methods=["hash", "unified"])
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema.to_dict()))
    assert main(["plan", "--schema", str(file), "--stats", str(folder), *few]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_a_models_tables_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    target = "tests.planning.test_plan_command:model"
    assert main(["plan", "--model-factory", target, "--budget", "100KiB", "--methods", "hash", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["features"]) == ["user", "item"]
    assert main(["plan", "--model-factory", target, "--budget", "100KiB", "--methods", "hash"]) == 0
    assert "not in the plan nor its budget: tied (500 B): its weight is also head.weight" in capsys.readouterr().out


def test_the_former_name_of_the_models_option_warns(capsys: pytest.CaptureFixture[str]) -> None:
    named = ["plan", "--model", "tests.planning.test_plan_command:model", "--budget", "100KiB", "--methods", "hash"]
    assert main([*named, "--json"]) == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)["features"]) == ["user", "item"]
    assert err.count("--model-factory") == 1
    assert main([*named, "--model-factory", "a:b"]) != 0
    assert "give one of them" in capsys.readouterr().err


def model() -> object:
    """A model of somebody else."""
    from torch import nn

    model = nn.ModuleDict({"user": nn.Embedding(5000, 16), "item": nn.Embedding(9000, 16), "tied": nn.Embedding(25, 5)})
    model["head"] = nn.Bilinear(5, 1, 25, bias=False)
    model["head"].weight = model["tied"].weight
    return model


def test_changes_against_an_older_plan(schema_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old.json"
    args = ["plan", "--schema", str(schema_file), "--methods", "full,hash"]
    assert main([*args, "--budget", "300KiB", "--out", str(old)]) == 0
    capsys.readouterr()
    assert main([*args, "--budget", "300KiB", "--diff", str(old)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no change"
    assert main([*args, "--budget", "600KiB", "--diff", str(old)]) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].startswith("C2: hash (num_buckets ")
    assert lines[1].startswith("C3: hash (num_buckets ")


def test_changes_name_features_that_come_and_go() -> None:
    old, new = Plan.full(Schema([FeatureSpec("C1", 100, 16), FeatureSpec("C9", 5, 16)])), Plan.full(SCHEMA)
    assert describe_changes(old, new, SCHEMA) == [
        "C2: nothing -> full; - -> 3.05 MiB",
        "C3: nothing -> full; - -> 562.50 KiB",
        "C9: no longer there",
    ]
    assert size_in_words(new["C1"]) == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give one of --data, --schema and --model-factory"),
        (["--schema", "SCHEMA", "--model-factory", "a:b"], "give one of"),
        (["--schema", "SCHEMA", "--pin", "C1"], "--pin takes FEATURE=METHOD; got 'C1'"),
        (["--schema", "SCHEMA", "--pin", "C1={x"], "is not valid JSON"),
        (["--schema", "SCHEMA", "--forbid", "hsh"], "did you mean 'hash'"),
        (["--schema", "SCHEMA", "--optimizer", "adan"], "did you mean 'adam'"),
        (["--schema", "SCHEMA", "--methods", "lowdim"], "Ways out: 1."),
        (["--schema", "absent.json"], "No such file"),
        (["--schema", "SCHEMA", "--diff", "BROKEN"], "is not valid JSON"),
        (["--data", "absent"], "absent"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], message: str, schema_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    given = [{"SCHEMA": str(schema_file), "BROKEN": str(broken)}.get(a, a) for a in args]
    assert main(["plan", "--budget", "100KiB", *given]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_bytes_shown_are_those_of_the_models_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half_tables.py").write_text(
        "import torch\ndef build(): return torch.nn.ModuleList([torch.nn.Embedding(8192, 16, dtype=torch.float16)])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    args = [
        "plan",
        "--model-factory",
        "half_tables:build",
        "--methods",
        "hash",
        "--full-below",
        "0",
        "--diff",
        "old.json",
    ]
    old = plan_for_budget(Schema([FeatureSpec("0", 8192, 16)]), "256KiB", methods=["full"], itemsize=2)
    (tmp_path / "old.json").write_text(old.to_json())
    assert main([*args, "--budget", "128KiB"]) == 0
    text = capsys.readouterr().out
    assert "0: full -> hash (num_buckets 4,096); 256.00 KiB -> 128.00 KiB" in text
    assert "full tables would take 256.00 KiB to serve, 2.0x as much" in text
    assert main([*args, "--budget", "256KiB", "--itemsize", "4"]) == 0
    assert "256.00 KiB -> 256.00 KiB" in capsys.readouterr().out


def test_faults_of_a_plan_file_have_a_line_each_under_its_name(
    schema_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broken.json"
    wrong = {"C1": {"method": "hsh"}, "C2": {"method": "hash", "num_buckets": 0, "sign": 3}, "C3": {"method": "hash"}}
    file.write_text(json.dumps({"version": 1, "features": wrong}))
    uses = (
        ["plan", "--schema", str(schema_file), "--budget", "300KiB", "--diff", str(file)],
        ["compress", "--model-factory", "torch.nn:Identity", "--plan", str(file)],
        ["train", "--data", str(tmp_path), "--plan", str(file), "--out", str(tmp_path / "run")],
        ["report", str(file), "--schema", str(schema_file)],
    )
    for args in uses:
        assert main(args) == 2
        first, *lines = capsys.readouterr().err.splitlines()
        assert first.startswith(f"recsys-embed: error: {file}: 3 faults in Plan:"), args
        assert len(lines) == 5
        assert [name for name in wrong if f"'{name}'" in "".join(lines)] == list(wrong)


def test_the_command_says_what_ids_lose_that_share_rows_without_a_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(Schema([FeatureSpec("user", 900, 64), FeatureSpec("item", 1700, 64)]).to_dict()))
    args = ["plan", "--schema", str(file), "--json", "--budget"]
    methods = []
    for more in (["20KiB"], ["20KiB", "--network"], ["6000"]):
        assert main([*args, *more]) == 0
        methods.append({f["method"] for f in json.loads(capsys.readouterr().out)["features"].values()})
    assert methods[:2] == [{"lowdim"}, {"unified"}]
    assert "unified" in methods[2]
    assert main([*args[:-2], "--budget", "6000"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "more where ids share rows that no network tells apart" in text
    assert "a guess, since nothing was counted" in text


def test_bytes_to_train_are_told_beside_those_to_serve(schema_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", "--schema", str(schema_file), "--budget", "900KiB"]
    assert main([*args, "--precision", "int8"]) == 0
    parts = plan_for_budget(SCHEMA, "900KiB", precision="int8").footprint(SCHEMA)
    assert parts.serve < parts.train
    told = f"{format_bytes(parts.train)} of weights while they train, before an export rounds them"
    assert told in capsys.readouterr().out
    assert main(args) == 0
    assert "of weights while" not in capsys.readouterr().out
