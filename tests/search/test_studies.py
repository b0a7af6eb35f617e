"""Studies: budgets hold before training, one seed gives one study, workers share trials, faults of storage are said."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import time
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from recsys_embed.cli import main
from recsys_embed.data import make_synthetic
from recsys_embed.data.folder import StorageError
from recsys_embed.errors import BudgetError, CheckpointError, ConfigError, DataError, UnknownNameError
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.plan import Plan
from recsys_embed.search.evolution import Evolution, WidthSpace, evolve
from recsys_embed.search.studies.queue import requeue_lost, take
from recsys_embed.search.studies.results import best_under, check_proxy, importance, rows_of, spearman
from recsys_embed.search.studies.samplers import EvolutionSampler, make_sampler
from recsys_embed.search.studies.settings import StudySettings
from recsys_embed.search.studies.space import LEAST_SHARE, StudySpace, read_budget, study_methods
from recsys_embed.search.studies.storage import open_storage, storage_errors
from recsys_embed.search.studies.study import MethodStudy
from recsys_embed.train import Interrupted
from tests.search.planted import Planted, planted_config

optuna.logging.set_verbosity(optuna.logging.WARNING)

SCHEMA = Schema([FeatureSpec(f"C{i}", n, 8) for i, n in enumerate((3, 12, 300, 900, 20_000, 70_000))])
FAST = StudySettings(
    trials=4, budgets=("20%", "50%"), methods=("hash", "optembed", "robe"), groups=2, sampler="random", prune=False
)
CONFIG = planted_config(steps=3, threads=1)


@pytest.fixture(scope="module")
def data():
    return Planted(0, rows=600)


def changed(**changes) -> StudySettings:
    return StudySettings.from_dict(FAST.to_dict() | changes)


def points(study: MethodStudy):
    return [(t.params, t.values, t.state.name) for t in study.study.trials]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_point_that_is_built_keeps_to_its_budget(draw):
    budget = draw.draw(st.integers(2_000, 400_000))
    space = StudySpace(SCHEMA, {"b": budget}, groups=draw.draw(st.integers(1, 5)))
    params = {"budget": "b"}
    for group in space.fields:
        params[f"{group}.method"] = draw.draw(st.sampled_from(space.methods))
        params[f"{group}.width"] = draw.draw(st.sampled_from(space.widths))
        params[f"{group}.share"] = draw.draw(st.floats(LEAST_SHARE, 1))
    try:
        plan = space.plan(params)
    except BudgetError:
        return
    assert tuple(plan) == SCHEMA.names
    assert plan.footprint(SCHEMA).serve <= budget
    assert space.holds(params)


def test_points_of_a_roomy_budget_use_it_and_obey_what_is_chosen():
    space = StudySpace(SCHEMA, {"b": 500_000}, groups=2)
    params = {"budget": "b", "small.method": "hash", "small.width": 8, "small.share": 1.0,
              "large.method": "optembed", "large.width": 2, "large.share": 1.0}  # fmt: skip
    plan = space.plan(params)
    assert (plan["C5"].method, plan["C5"].dim) == ("optembed", 2)
    assert 450_000 < plan.footprint(SCHEMA).serve <= 500_000
    lean = space.plan({**params, "large.share": LEAST_SHARE, "small.method": "freqcut"})
    assert lean.footprint(SCHEMA).serve <= 500_000
    assert lean["C2"].method in ("freqcut", "full")


def test_fields_are_grouped_by_their_numbers_of_ids():
    fields = StudySpace(SCHEMA, {"b": 10**6}, groups=3).fields
    assert [[s.name for s in specs] for specs in fields.values()] == [["C0", "C1"], ["C2", "C3"], ["C4", "C5"]]
    alike = Schema([FeatureSpec("a", 50, 8), FeatureSpec("b", 50, 8)])
    assert list(StudySpace(alike, {"b": 10**6}, groups=3).fields) == ["all"]


def test_the_planners_solution_has_a_point_of_its_methods():
    space = StudySpace(SCHEMA, {"b": 300_000}, ("hash", "freqcut"), groups=2)
    found = Plan.uniform(SCHEMA, "freqcut", budget=300_000)
    point = space.point_of(found, "b")
    assert space.holds(point)
    assert point["large.method"] == "freqcut"
    assert point["small.share"] == 1.0 > point["large.share"], "full tables of few ids take all their bytes"


def test_a_budget_below_every_method_is_refused_before_anything_is_stored(data, tmp_path):
    with pytest.raises(BudgetError, match=r"budget 100 is below the smallest subnet.*hash: .*Ways out"):
        MethodStudy(CONFIG, data, changed(budgets=["100"], methods=["hash"]), str(tmp_path / "s.db"))
    assert not (tmp_path / "s.db").exists()


@pytest.mark.parametrize(
    "chosen", [{"method": "hash", "ratio": 4.0}, {"method_args": {"precision": "int8"}}, {"budget": "10%"}], ids=str
)
def test_settings_that_a_study_would_not_heed_are_refused_by_name(chosen: dict[str, Any], data, tmp_path):
    with pytest.raises(ConfigError, match=f"leave {', '.join(chosen)} out"):
        MethodStudy(CONFIG.replace(**chosen), data, FAST, str(tmp_path / "s.db"))


def test_one_seed_gives_one_study_also_when_it_is_stopped_between(data, tmp_path):
    whole = MethodStudy(CONFIG, data, FAST, str(tmp_path / "a.journal"))
    assert whole.work() == 4
    stopped = MethodStudy(CONFIG, data, FAST, str(tmp_path / "b.journal"))
    stopped._one(take(stopped.study, stopped.storage))
    again = MethodStudy(CONFIG, data, FAST, str(tmp_path / "b.journal"))
    assert again.work() == 3
    assert points(again) == points(whole)
    assert {p["budget"] for p, _, _ in points(whole)} == {"20%", "50%"}, "the planner's solutions come first"
    rows = rows_of(whole)
    assert all(r["bytes"] <= whole.budgets[r["params"]["budget"]] for r in rows)
    assert [r["from"] for r in rows] == ["planner", "planner", "random", "random"]
    assert abs(sum(importance(whole).values()) - 1) < 1e-6
    best = best_under(rows, whole.budgets["50%"])
    assert best["auc"] == max(r["auc"] for r in rows)
    with pytest.raises(BudgetError, match="the smallest takes"):
        best_under(rows, 10)
    more = MethodStudy(CONFIG, data, changed(trials=5), str(tmp_path / "a.journal"))
    assert more.work() == 1, "a study goes on to more trials"


def test_points_over_their_budget_are_never_trained(data, tmp_path, monkeypatch):
    study = MethodStudy(CONFIG, data, changed(trials=2, warm=False), str(tmp_path / "s.journal"))
    monkeypatch.setattr(study, "train", lambda *a: pytest.fail("trained"))
    monkeypatch.setattr(study, "bytes", lambda config: 10**9)
    assert study.work() == 2
    assert all("not trained" in r["reason"] and r["state"] == "pruned" for r in rows_of(study))


def test_test_rows_are_out_of_reach(data, tmp_path, monkeypatch):
    asked = []
    real = Planted.batches
    monkeypatch.setattr(
        Planted, "batches", lambda self, split, *a, **k: asked.append(split) or real(self, split, *a, **k)
    )
    MethodStudy(CONFIG, data, changed(trials=1), str(tmp_path / "s.journal")).work()
    assert set(asked) == {"train", "valid"}
    study = MethodStudy(CONFIG, data, FAST, str(tmp_path / "other.db"))
    with pytest.raises(DataError, match="sees no rows of 'test'"):
        study.data.batches("test", 64)


def test_a_trial_worse_than_the_median_of_cheaper_ones_is_stopped(data, tmp_path):
    study = MethodStudy(CONFIG, data, changed(trials=6, prune=True, validations=3), str(tmp_path / "s.journal"))
    assert (study.config.steps, study.config.eval_every) == (3, 1)
    for auc in (0.6, 0.7, 0.8, 0.9):
        trial = take(study.study, study.storage)
        trial.set_user_attr("bytes", 100)
        study._report_or_prune(trial, 1, auc, 100)
        study.study.tell(trial, [auc, 100.0])
    trial = take(study.study, study.storage)
    study._report_or_prune(trial, 1, 0.1, 99)
    study._report_or_prune(trial, 1, 0.76, 100)
    with pytest.raises(Exception, match=r"AUC 0.7400 is below 0.7500, the median of 4 trials"):
        study._report_or_prune(trial, 1, 0.74, 100)


def test_short_trainings_are_held_against_full_ones(data, tmp_path):
    study = MethodStudy(
        CONFIG.replace(steps=6), data, changed(proxy=0.5, trials=4), str(tmp_path / "s.journal")
    )  # fmt: skip
    assert study.config.steps == 3
    study.work()
    said = []
    found = check_proxy(study, 3, lambda *row: said.append(row))
    assert len(found["trials"]) == len(said) == 3
    assert -1 <= found["spearman"] <= 1
    short = [r["short"] for r in found["trials"]]
    assert short == sorted(short)
    assert found["trials"][0]["full"] != short[0]
    study.train = lambda *a: pytest.fail("what is known is not trained again")
    assert check_proxy(study, 3) == found


@given(st.lists(st.integers(-9, 9), min_size=3, max_size=20))
def test_rank_correlation_is_that_of_ranks(values):
    assert spearman(values, [2.0**v for v in values]) in (None, pytest.approx(1.0))
    assert spearman(values, [-v for v in values]) in (None, pytest.approx(-1.0))


def test_an_interrupted_trial_is_queued_again(data, tmp_path, monkeypatch):
    study = MethodStudy(CONFIG, data, changed(trials=2), str(tmp_path / "s.journal"))

    def stop(*args):
        raise Interrupted("stopped")

    with monkeypatch.context() as m:
        m.setattr(study, "train", stop)
        with pytest.raises(Interrupted):
            study.work()
    again = MethodStudy(CONFIG, data, changed(trials=2), str(tmp_path / "s.journal"))
    again.work()
    assert [(r["trial"], r["state"]) for r in rows_of(again)] == [(0, "complete"), (1, "complete")]
    whole = MethodStudy(CONFIG, data, changed(trials=2), str(tmp_path / "whole.journal"))
    whole.work()
    assert points(again) == points(whole)


def test_a_trial_that_breaks_is_not_tried_for_ever(data, tmp_path, monkeypatch):
    study = MethodStudy(CONFIG, data, FAST, str(tmp_path / "s.db"))

    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(MethodStudy, "_objectives", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        study.work()
    first = study.study.trials[0]
    assert (first.state.name, first.user_attrs["reason"]) == ("FAIL", "RuntimeError: out of memory")
    assert study.study.trials[1].state.name == "WAITING"


def test_trials_of_dead_workers_are_done_again_and_those_of_living_ones_not(tmp_path):
    storage = open_storage(str(tmp_path / "s.db"))
    study = optuna.create_study(storage=storage)
    for _ in range(2):
        study.enqueue_trial({})
    mine, lost = take(study, storage), take(study, storage)
    assert take(study, storage) is None, "no worker makes a trial of its own"
    assert requeue_lost(study, storage) == 0
    x = lost.suggest_float("x", 0, 1)
    study.enqueue_trial({})
    gone = subprocess.Popen(["true"])
    gone.wait()
    lost.set_user_attr("owner", f"{os.uname().nodename}:{gone.pid}")
    assert requeue_lost(study, storage) == 1
    assert requeue_lost(study, storage) == 0
    again = take(study, storage)
    assert (again.number, again.suggest_float("x", 0, 1)) == (lost.number, x), "before what comes after it"
    assert mine.number == 0
    elsewhere = {"owner": "elsewhere:1", "seen": 0.0}
    for key, value in elsewhere.items():
        again.set_user_attr(key, value)
    assert requeue_lost(study, storage) == 1, "no sign of life for long"


def test_another_space_or_other_data_is_refused(data, tmp_path):
    where = str(tmp_path / "s.journal")
    MethodStudy(CONFIG, data, FAST, where)
    with pytest.raises(CheckpointError, match=r"another space or other data(.|\n)*space.methods"):
        MethodStudy(CONFIG, data, changed(methods=["hash", "robe"]), where)
    with pytest.raises(CheckpointError, match=r"- data: "):
        MethodStudy(CONFIG, Planted(1, rows=600), FAST, where)


def test_a_study_starts_from_an_earlier_one(data, tmp_path):
    first = MethodStudy(CONFIG, data, FAST, str(tmp_path / "a.journal"))
    first.work()
    second = MethodStudy(CONFIG, data, changed(warm=False, sampler="tpe"), str(tmp_path / "b.journal"))
    best = [t.params for t in first.study.best_trials]
    assert second.warm_from(str(tmp_path / "a.journal")) == (len(best), 0)
    second.work()
    assert [t.params for t in second.study.trials][: len(best)] == best
    other = MethodStudy(CONFIG, data, changed(methods=["lowdim"]), str(tmp_path / "c.journal"))
    assert other.warm_from(str(tmp_path / "a.journal")) == (0, len(best))


def test_a_storage_that_vanishes_or_is_locked_says_so(data, tmp_path):
    import sqlite3

    path = tmp_path / "s.db"
    study = MethodStudy(CONFIG, data, changed(warm=False), str(path))
    study.storage.engine.dispose()
    path.unlink()
    with pytest.raises(StorageError, match=r"vanished.*run the same command again"):
        study.work()
    path.unlink(missing_ok=True)
    url = f"sqlite:///{path}?timeout=0.1"
    open_storage(f"sqlite:///{path}")
    holder = sqlite3.connect(path)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StorageError, match="another process holds it"), storage_errors(url):
        optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 0.1}})
    holder.close()


def test_evolution_as_a_sampler_tries_what_evolve_tries():
    options = Evolution(generations=4, population=6, mutations=3, crossovers=3, parents=4)

    def score(many):
        return [-float(sum((w - 2 * f) ** 2 for f, w in enumerate(c))) for c in many]

    found = evolve(options, WidthSpace(4, 9), score, seed=3)
    space = {f"w{i}": IntDistribution(1, 9) for i in range(4)}
    study = optuna.create_study(sampler=EvolutionSampler(space, options, seed=3), direction="maximize")
    study.optimize(lambda t: score([tuple(t.suggest_int(n, 1, 9) for n in space)])[0], len(found))
    assert [tuple(t.params[n] for n in space) for t in study.trials] == list(found)
    assert [t.value for t in study.trials] == list(found.values())


def test_evolution_varies_any_parameters_and_beats_chance():
    space = {
        "kind": CategoricalDistribution(["a", "b", "c"]),
        "x": FloatDistribution(0.1, 1.0, log=True),
        "n": IntDistribution(2, 8, step=2),
    }

    def loss(trial):
        kind, x = trial.suggest_categorical("kind", ["a", "b", "c"]), trial.suggest_float("x", 0.1, 1.0, log=True)
        return (kind != "b") + abs(x - 0.3) + abs(trial.suggest_int("n", 2, 8, step=2) - 6), x

    study = optuna.create_study(
        sampler=EvolutionSampler(space, Evolution(population=8, parents=4), seed=0), directions=["minimize"] * 2
    )
    study.optimize(loss, 60)
    early, late = ([t.values[0] for t in part] for part in (study.trials[:20], study.trials[-20:]))
    assert sum(late) < 0.8 * sum(early)
    assert {t.params["kind"] for t in study.trials} == {"a", "b", "c"}


@pytest.mark.parametrize("name", ["nsgaii", "NSGA-II", "tpe", "random", "qmc", "nsgaiii", "evolution"])
def test_samplers_by_name_repeat_by_seed(name):
    space = {"x": FloatDistribution(0, 1), "n": IntDistribution(1, 5)}

    def run(seed):
        study = optuna.create_study(sampler=make_sampler(name, space, seed, 16), directions=["minimize"] * 2)
        study.optimize(lambda t: (t.suggest_float("x", 0, 1), t.suggest_int("n", 1, 5)), 12)
        return [t.params for t in study.trials]

    assert run(1) == run(1)
    assert len({str(p) for p in run(1)}) > 4
    if name != "qmc":  # Sobol's points are scrambled on request only
        assert run(1) != run(2)


def test_bad_settings_are_named():
    with pytest.raises(UnknownNameError, match="did you mean 'tpe'"):
        make_sampler("tp", {}, 0, 10)
    with pytest.raises(ConfigError, match="sampler_args"):
        make_sampler("tpe", {}, 0, 10, {"no": 1})
    with pytest.raises(ConfigError, match="3 faults in StudySettings"):
        StudySettings(trials=0, proxy=2.0, objectives=("bytes",))
    with pytest.raises(UnknownNameError, match="did you mean 'trials'"):
        StudySettings.from_dict({"trial": 3})
    for text in ("x%", "0%", "101%"):
        with pytest.raises(ConfigError, match="share such as 5%"):
            read_budget(text, 100)
    assert "optembed" in study_methods()


def _worker(where: str) -> None:
    MethodStudy(CONFIG, Planted(0, rows=600), changed(trials=8), where).work()


@pytest.mark.slow
def test_workers_share_a_study_without_losing_or_repeating_a_trial(tmp_path):
    where = str(tmp_path / "s.db")
    study = MethodStudy(CONFIG, Planted(0, rows=600), changed(trials=8), where)
    other = multiprocessing.get_context("spawn").Process(target=_worker, args=(where,))
    other.start()
    while other.is_alive() and all("owner" not in t.user_attrs for t in study.study.get_trials(deepcopy=False)):
        time.sleep(0.05)
    study.work()
    other.join()
    assert other.exitcode == 0
    trials = study.study.trials
    assert [t.number for t in trials] == list(range(8))
    assert all(t.state.name == "COMPLETE" for t in trials)
    assert len({str(t.params) for t in trials}) == 8
    assert len({t.user_attrs["owner"] for t in trials}) == 2, "both took part"


@pytest.mark.slow
def test_the_command_leaves_a_front_and_a_point_of_it_is_trained_and_exported(tmp_path, capsys):
    folder = tmp_path / "data"
    make_synthetic(folder, rows=3000, seed=1)
    run = tmp_path / "run"
    args = ["search", "methods", "--data", str(folder), "--model", "deepfm", "--out", str(run), "--trials", "4",
            "--budgets", "5%,20%", "--methods", "hash,optembed", "--storage", str(tmp_path / "s.journal"),
            "--proxy", "0.5", "--check-proxy", "3", "--batch-size", "256", "--embedding-dim", "4",
            "--set", "model_args.hidden=[8]", "--set", "search.prune=false"]  # fmt: skip
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {p.name for p in run.iterdir()} >= {"results.json", "front.md", "front.png", "study.json"}
    assert [r["bytes"] for r in found["front"]] == sorted(r["bytes"] for r in found["front"])
    assert len(found["proxy"]["trials"]) == 3
    most = found["front"][-1]
    file = tmp_path / "m.safetensors"
    assert main(["search", "pick", str(run), "--under", str(most["bytes"]), "--export", str(file), "--json"]) == 0
    picked = json.loads(capsys.readouterr().out)
    assert picked["trial"] == most["trial"]
    assert picked["footprint"]["serve"] == most["bytes"]
    assert file.stat().st_size > most["bytes"] / 2
    assert main(["search", "pick", str(run), "--trial", "99"]) == 2
    assert "no finished trial 99" in capsys.readouterr().err
    assert main([*args, "--methods", "hash"]) == 2
    assert "another space" in capsys.readouterr().err


def test_raw_ids_are_searched_among_the_methods_that_take_them() -> None:
    schema = Schema([*SCHEMA, FeatureSpec("raw", 500, 8, ids="raw")])
    known = study_methods(raw=True)
    assert {"hash", "unified"} <= set(known) < set(study_methods())
    space = StudySpace(schema, {"b": 300_000}, known)
    for method in known:
        fields = {f"{g}.{k}": v for g in space.fields for k, v in (("method", method), ("width", 8), ("share", 1.0))}
        space.plan({"budget": "b", **fields}).check(schema)
    with pytest.raises(ConfigError, match="method 'memcom' needs vocabulary indices, and raw have raw 64-bit ids"):
        StudySpace(schema, {"b": 300_000}, ("hash", "memcom"))
