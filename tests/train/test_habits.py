"""What data does to training: labels, numeric values, classes and batches that it cannot learn from."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recsys_embed.data import Batch
from recsys_embed.errors import ConfigError, DataError
from recsys_embed.search.checks import need_classes
from recsys_embed.search.evaluate import CandidateEvaluator
from recsys_embed.search.layers import OptembedLayer
from recsys_embed.search.supernet import Supernet
from recsys_embed.train import BinaryMetrics, DivergedError, Interrupted, Trainer, evaluate, run_training
from recsys_embed.train.build import model_from_config
from recsys_embed.train.compare import Comparison, run_comparison, summarise
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.run_state import RunState
from tests.train.test_loop import same_weights
from tests.train.toy import ToyData, ToySource, toy_config

Change = Callable[[Tensor], Tensor]
NAN, INF = float("nan"), float("inf")
FAST = toy_config(model="dnn", model_args={"hidden": [8]}, epochs=1)
SOURCES = {
    "in memory": lambda: ToySource(),
    "streamed": lambda: ToySource(memory_limit=0),
    "batches alone": lambda: ToyData(600),
}


def changed(source: str, split: str, **changes: Change) -> ToySource | ToyData:
    data = SOURCES[source]()
    parts = (data if isinstance(data, ToyData) else data.toy).parts
    parts[split] = parts[split]._replace(
        **{name: change(getattr(parts[split], name).clone()) for name, change in changes.items()}
    )
    return data


def put(value: float, *place: int | slice) -> Change:
    def change(part: Tensor) -> Tensor:
        part[place] = value
        return part

    return change


LABELS: dict[str, tuple[Change, str]] = {
    "none": (lambda label: label * NAN, "no labels"),
    "1 and 2": (lambda label: label + 1, r"labels must be 0 or 1; got 2.*label == 2"),
    "some are NaN": (put(NAN, slice(3, 5)), r"labels are NaN"),
    "shares": (lambda label: label * 0.25, r"labels must be 0 or 1; got 0.25"),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", LABELS)
def test_labels_that_are_no_classes_are_refused_before_they_train_anything(
    source: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, text = LABELS[kind]
    moved: list[int] = []
    apply = Trainer._apply_gradients
    monkeypatch.setattr(Trainer, "_apply_gradients", lambda self: moved.append(self.state.step) or apply(self))
    config = FAST.replace(batch_size=600)
    with pytest.raises(DataError, match=rf"(?s){text}") as told:
        run_training(config, changed(source, "train", label=change), folder=tmp_path / "run")
    assert "learning_rate" not in str(told.value)
    assert not moved


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("value", [NAN, INF])
def test_numeric_values_that_are_not_finite_are_the_datas_fault(source: str, standardise: bool, value: float) -> None:
    data = changed(source, "train", dense=put(value, 7, 1))
    with pytest.raises((DataError, ConfigError), match=r"numeric columns? 1") as told:
        run_training(FAST.replace(standardise=standardise), data)
    assert "learning_rate" not in str(told.value)
    if source != "batches alone":
        assert "split 'train'" in str(told.value)
        assert "row 7" in str(told.value)


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("source", SOURCES)
def test_rows_that_only_measure_are_held_to_the_same(source: str, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if source != "batches alone":  # others are told when they are read
        monkeypatch.setattr(Trainer, "_step", lambda self, batch: pytest.fail("a step was taken first"))
    for change, text in ({"label": lambda x: x * NAN}, "no labels"), ({"dense": put(NAN, 0, 2)}, "numeric column 2"):
        with pytest.raises(DataError, match=f"{split!r}.*{text}|{text}.*{split!r}") as told:
            run_training(FAST, changed(source, split, **change))
        assert "learning rate" not in str(told.value)


def test_a_view_names_the_rows_of_the_whole() -> None:
    data = changed("in memory", "train", dense=put(NAN, 599, 0))
    with pytest.raises(DataError, match=r"split 'held_out': .*row 299: .*data set ToySource"):
        data.held_out(0.5).check_values()
    data.splits = {"valid": 300}
    data.check_values()


def test_a_loss_out_of_range_gets_the_advice_that_fits() -> None:
    with pytest.raises(DivergedError, match=r"(?s)loss is nan at step .*learning_rate.*clip_norm"):
        run_training(FAST.replace(learning_rate=1e38, epochs=3), ToySource())
    large = changed("in memory", "train", dense=lambda part: part * 1e38)
    with pytest.raises(DivergedError, match=r"numeric column \d .*reaches .*`standardise`"):
        run_training(FAST.replace(model="deepfm", standardise=False), large)
    model = model_from_config(FAST, ToySource().schema(4), 3)
    model.vectors.get_parameter("width4").data.fill_(NAN)
    with pytest.raises(DivergedError, match=r"weights hold NaN.*before any training: .*width4"):
        Trainer(model, ToySource(), FAST).run()


# -- one class -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_validation_rows_of_one_class_are_compared_by_their_loss(label: float) -> None:
    data = changed("in memory", "valid", label=put(label, slice(None)))
    config = FAST.replace(epochs=6, learning_rate=0.02, patience=2, schedule="plateau", plateau_patience=1)
    with pytest.warns(UserWarning, match="split 'valid' are (positive|negative), and AUC needs both") as told:
        result = run_training(config, data).result
    assert len(told) == 1
    losses = [state["logloss"] for state in result.history]
    assert result.best_step == result.history[losses.index(min(losses))]["step"]
    assert result.valid.logloss == min(losses)
    falls = [b < min(losses[: i + 1]) for i, b in enumerate(losses[1:])]
    stop = next((i for i in range(1, len(falls)) if not falls[i] and not falls[i - 1]), None)
    assert len(losses) == (6 if stop is None else stop + 2)


def test_a_plateau_of_one_class_is_one_of_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    scales = []
    advance = Trainer._validate
    monkeypatch.setattr(
        Trainer, "_validate", lambda self, stop: (advance(self, stop), scales.append(self.schedule.scale))
    )
    data = changed("in memory", "valid", label=put(0.0, slice(None)))
    config = FAST.replace(epochs=5, schedule="plateau", plateau_patience=1, plateau_factor=0.5, keep_best=False)
    with pytest.warns(UserWarning, match="split 'valid' are negative"):
        losses = [state["logloss"] for state in run_training(config, data).result.history]
    wanted, best, scale = [], INF, 1.0
    for loss in losses:
        best, scale = min(best, loss), scale if loss < best else scale * 0.5
        wanted.append(scale)
    assert scales == wanted


def test_a_run_of_an_earlier_version_is_not_stuck_with_its_first_weights() -> None:
    state = RunState.from_dict({"best_auc": NAN, "best_step": 5, "history": [{"step": 5, "auc": NAN}]})
    state.step = 10
    assert state.note_validation({"auc": NAN}, -0.6, None, 0.0)
    assert (state.best_step, state.best_score) == (10, -0.6)
    assert RunState.from_dict({"best_auc": 0.7}).best_score == 0.7


def test_a_comparison_on_test_rows_of_one_class_says_so(tmp_path: Path) -> None:
    data = changed("in memory", "test", label=put(0.0, slice(None)))
    comparison = Comparison(models=("dnn",), methods=(), train=FAST.replace(model="deepfm"))
    with pytest.warns(UserWarning, match="split 'test' are negative"):
        rows = run_comparison(comparison, data, tmp_path, show_progress=False)
    assert "of one class" in summarise(rows)[0].reason
    with pytest.raises(DataError, match="no labels"):
        run_comparison(comparison, changed("in memory", "train", label=lambda x: x * NAN), tmp_path / "b")


def test_a_search_is_told_of_labels_before_it_counts_classes() -> None:
    with pytest.raises(DataError, match="no labels"):
        need_classes(changed("batches alone", "valid", label=lambda x: x * NAN), "valid", "compare", "")


# -- batch normalisation -------------------------------------------------------------------------------------------

NORMED = FAST.replace(model_args={"hidden": [8], "batch_norm": True}, epochs=2)


@pytest.mark.parametrize("source", ["in memory", "streamed"])
@pytest.mark.parametrize(("rows", "size", "sizes"), [(601, 600, [601]), (601, 200, [200, 200, 201]), (5, 2, [2, 3])])
def test_a_last_batch_of_one_row_joins_the_one_before(
    source: str, rows: int, size: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ToySource(rows, memory_limit=0 if source == "streamed" else ToySource.memory_limit)
    seen: list[Batch] = []
    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, batch: seen.append(batch) or step(self, batch))
    config = NORMED.replace(batch_size=size)
    data.splits = {"train": rows}
    run_training(config, data)
    assert [len(batch.label) for batch in seen] == sizes * 2
    every = torch.cat([batch.dense for batch in seen[: len(sizes)]])
    assert torch.equal(every.sort(0).values, data.toy.parts["train"].dense.sort(0).values)


def test_a_run_stopped_before_the_joined_batch_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = NORMED.replace(batch_size=200, epochs=1)
    whole = run_training(config, ToySource(601), folder=tmp_path / "whole")
    step = Trainer._step

    def interrupted(self, batch):
        value = step(self, batch)
        if self.state.step == 2:
            self._asked.requested = True
        return value

    train = Trainer._train

    def asked(self, stop):
        self._asked = stop
        return train(self, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        patch.setattr(Trainer, "_train", asked)
        with pytest.raises(Interrupted):
            run_training(config, ToySource(601), folder=tmp_path / "parts")
    resumed = run_training(config, ToySource(601), folder=tmp_path / "parts", resume=True)
    assert same_weights(resumed.model, whole.model)
    assert resumed.result.steps == 3


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (600, 1)])
def test_batches_that_cannot_be_normalised_are_refused_before_the_first_step(rows: int, size: int) -> None:
    model = model_from_config(NORMED, ToySource().schema(4), 3)
    with pytest.raises(ConfigError, match="batch normalisation needs two rows"):
        Trainer(model, ToySource(rows), NORMED.replace(batch_size=size))
    with pytest.raises(ConfigError, match="`batch_size` that does not leave one row"):
        run_training(NORMED.replace(batch_size=600), ToyData(601))  # it does not tell how many rows there are


def test_without_batch_normalisation_the_last_row_stays_alone() -> None:
    assert run_training(FAST.replace(batch_size=200), ToySource(601)).result.steps == 4


def test_candidates_take_no_statistics_of_one_row() -> None:
    data, config = ToySource(601), NORMED.replace(batch_size=300)
    model = model_from_config(config, data.schema(4).with_init("normal:1"), 3)
    evaluator = CandidateEvaluator(Supernet(model, OptembedLayer(4, 4)), data, recalibrate=9, batch_size=300, rows=200)
    assert math.isfinite(evaluator.metrics([(4, 4, 4, 4)])[0].logloss)


# -- what a model returns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (lambda logits: logits.unsqueeze(1), r"\[128, 1\]: end `logits` with .squeeze\(-1\)"),
        (lambda logits: logits.mean(), r"got \[\]"),
        (lambda logits: (logits, None), "got tuple"),
        (lambda logits: None, "got NoneType"),
    ],
)
def test_a_model_that_returns_no_logits_is_refused_at_its_first_batch(returned, text: str) -> None:
    data = ToySource()
    model = model_from_config(FAST, data.schema(4), 3)
    logits = model.logits
    model.logits = lambda dense, ids: returned(logits(dense, ids))
    with pytest.raises(ConfigError, match=rf"DNN must return logits \[B\].*{text}"):
        Trainer(model, data, FAST).run()
    with pytest.raises(ConfigError, match=r"DNN must return logits \[B\]"):
        evaluate(model, data, "valid")


def test_metrics_refuse_what_they_would_broadcast_or_add_up_to_nan() -> None:
    with pytest.raises(DataError, match=r"shape \[n\]; got \[2, 1\] and \[2\]"):
        BinaryMetrics().update(torch.zeros(2, 1), torch.ones(2))
    with pytest.raises(DataError, match="not numbers"):
        BinaryMetrics().update(torch.tensor([INF, 0.0]), torch.ones(2))
    with pytest.raises(DataError, match="no labels"):
        BinaryMetrics().update(torch.zeros(2), torch.full((2,), NAN))


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        (torch.tensor([0.0, NAN, 0.0]), torch.ones(3), r"`mean` must be finite.*columns 1"),
        (torch.zeros(3), torch.tensor([1.0, 1.0, INF]), r"`std` must be finite.*columns 2"),
        (torch.zeros(1), torch.ones(3), r"`mean` must have the shape \[3\]; got \[1\]"),
    ],
)
def test_moments_that_would_spoil_every_row_are_refused(mean: Tensor, std: Tensor, text: str) -> None:
    model = model_from_config(TrainConfig(model="lr"), ToySource().schema(4), 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=text):
        model.standardise(mean, std)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
