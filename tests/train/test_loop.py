"""The loop: it learns, it stops early, and a run stopped anywhere goes on bit for bit."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys_embed.data.folder import lock
from recsys_embed.errors import CheckpointError, ConfigError, RecsysEmbedError
from recsys_embed.train import Interrupted, Trainer, checkpoint, loop, run_training
from recsys_embed.train.build import model_from_config
from recsys_embed.train.checkpoint import load_checkpoint, save_checkpoint
from recsys_embed.utils.files import write_json
from tests.train.toy import ToyBatches, ToyData, toy_config


class SignallingData(ToyData):
    """Sends this process a signal while it hands out its n-th training batch."""

    def __init__(self, at: int, number: int = signal.SIGINT, split: str = "train", **kwargs) -> None:
        super().__init__(**kwargs)
        self.at, self.number, self.split, self.seen = at, number, split, 0

    def batches(self, split, batch_size, **options):
        inner = super().batches(split, batch_size, **options)
        return inner if split != self.split else _Signalling(self, inner)


class _Signalling(ToyBatches):
    def __init__(self, owner: SignallingData, inner: ToyBatches) -> None:
        super().__init__(inner.parts, inner.order, inner.size)
        self.owner = owner

    def __iter__(self):
        for batch in super().__iter__():
            self.owner.seen += 1
            if self.owner.seen == self.owner.at:
                os.kill(os.getpid(), self.owner.number)
            yield batch


CASES = {
    "adam": {"schedule": "plateau", "min_delta": 0.5, "plateau_factor": 0.5, "eval_every": 5},
    "rowwise_adagrad": {"embedding_optimizer": "rowwise_adagrad", "embedding_learning_rate": 0.05, "eval_every": 7},
    "dense_adam": {
        "embedding_optimizer": "dense_adam",
        "clip_norm": 0.5,
        "weight_decay": 1e-4,
        "warmup_steps": 5,
        "embedding_weight_decay": 1e-3,
    },
    "hash": {"method": "hash", "ratio": 3.0, "schedule": "cosine", "checkpoint_every": 4},
    "steps": {"steps": 37, "epochs": 9, "embedding_optimizer": "adagrad", "eval_every": 5, "patience": 3},
}


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(v, right[k]) for k, v in left.items())


@pytest.mark.crossed
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stop_at", [1, 5, 16, 17, 37, 48])
def test_a_stopped_run_goes_on_bit_for_bit(case: str, stop_at: int, tmp_path: Path) -> None:
    config = toy_config(**CASES[case])
    whole = run_training(config, ToyData(), folder=tmp_path / "whole")
    folder = tmp_path / "parts"
    if stop_at > whole.result.steps:
        return
    with pytest.raises(Interrupted, match="--resume"):
        run_training(config, SignallingData(stop_at), folder=folder)
    resumed = run_training(config, ToyData(), folder=folder, resume=True)
    for field in ("test", "valid", "history", "steps", "best_step"):
        assert getattr(resumed.result, field) == getattr(whole.result, field)
    assert same_weights(resumed.model, whole.model)
    assert (folder / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_run_stopped_while_it_evaluates_goes_on_bit_for_bit(split: str, tmp_path: Path) -> None:
    config = toy_config(eval_batch_size=100, eval_every=6)
    whole = run_training(config, ToyData(), folder=tmp_path / "whole")
    folder = tmp_path / "parts"
    with pytest.raises(Interrupted):
        run_training(config, SignallingData(4, split=split), folder=folder)
    resumed = run_training(config, ToyData(), folder=folder, resume=True)
    assert resumed.result.test == whole.result.test
    assert (folder / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_termination_works_like_ctrl_c_and_handlers_come_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        run_training(toy_config(), SignallingData(3, signal.SIGTERM), folder=tmp_path)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


KILLED = """
import signal
from tests.train.test_loop import SignallingData
from tests.train.toy import toy_config
from recsys_embed.train import run_training
run_training(toy_config(checkpoint_every=4), SignallingData(23, signal.SIGKILL), folder={folder!r})
"""


def test_a_killed_run_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = KILLED.format(folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (folder / ".checkpoint.pt.1.tmp").write_bytes(b"half a file")
    resumed = run_training(toy_config(checkpoint_every=4), ToyData(), folder=folder, resume=True)
    whole = run_training(toy_config(checkpoint_every=4), ToyData(), folder=tmp_path / "whole")
    assert resumed.result.test == whole.result.test
    assert same_weights(resumed.model, whole.model)
    assert not list(folder.glob(".*.tmp"))


def test_long_runs_are_written_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    keep = loop.Trainer._checkpoint
    monkeypatch.setattr(loop.Trainer, "_checkpoint", lambda self: written.append(self.state.step) or keep(self))
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 1e9)
    whole = run_training(toy_config(), ToyData(), folder=tmp_path / "whole")
    validated = [state["step"] for state in whole.result.history]
    assert written == validated
    written.clear()
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "CHECKPOINT_TIMES", 0.0)
    often = run_training(toy_config(), ToyData(), folder=tmp_path / "often")
    # Before a validation, which may take long, and after it.
    assert written == sorted([*range(1, whole.result.steps + 1), *validated])
    assert same_weights(often.model, whole.model)


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.floats(1e-3, 30), st.floats(0, 20)), min_size=1, max_size=200))
def test_writing_takes_a_twentieth_and_a_kill_costs_little_more_than_a_second_or_twenty_times_a_write(times) -> None:
    with pytest.MonkeyPatch.context() as m:
        clock = Clock()
        m.setattr(checkpoint, "time", clock)
        cadence, written, wrote, took = checkpoint.CheckpointTimer(), 0.0, 0.0, 0.0
        for step, write in times:
            clock.now += step
            if cadence.due():
                with cadence.writing():
                    clock.now += write
                written, wrote, took = clock.now, wrote + write, write
            assert wrote - took <= clock.now / 20
            assert clock.now - written <= max(1, 20 * took) + 1e-9 or clock.now == written


def test_the_first_checkpoint_of_large_tables_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(checkpoint, "time", clock)
    small, large = checkpoint.CheckpointTimer(1000), checkpoint.CheckpointTimer(1_500_000_000)
    clock.now = 1.1
    assert small.due()
    clock.now = 99.0
    assert not large.due()
    clock.now = 101.0
    assert large.due()


def test_a_trainer_guesses_the_first_checkpoint_from_all_it_will_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    class Told(checkpoint.CheckpointTimer):
        def __init__(self, size: int = 0) -> None:
            sizes.append(size)
            super().__init__(size)

    monkeypatch.setattr(loop, "CheckpointTimer", Told)
    run_training(toy_config(), ToyData(), folder=tmp_path / "run")
    written = (tmp_path / "run" / "checkpoint.pt").stat().st_size
    assert 0.3 * written < sizes[0] < 1.2 * written


SLOW = """
import os, signal, sys, threading, time
from pathlib import Path
from recsys_embed.train import Trainer, resumable, run_training
from tests.train.toy import ToyData, toy_config

book, step = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND), Trainer._step


def tell(word, value):
    os.write(book, f"{word} {value} {time.perf_counter()}\\n".encode())


def slow(self, batch):
    if self.state.step == 0:
        threading.Timer(1.7, os.kill, (os.getpid(), signal.SIGKILL)).start()
    time.sleep(0.02)
    value = step(self, batch)
    tell("done", self.state.step)
    return value


def timed(*args, save=resumable.save_checkpoint, **options):
    start = time.perf_counter()
    save(*args, **options)
    tell("wrote", time.perf_counter() - start)


Trainer._step, resumable.save_checkpoint = slow, timed
run_training(toy_config(), ToyData(40_000), folder=Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_kill_costs_about_a_second_where_writing_is_fast(tmp_path: Path) -> None:
    folder, book = tmp_path / "run", tmp_path / "book"
    command = [sys.executable, "-c", SLOW, str(folder), str(book)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    lines = [line.split() for line in book.read_text().splitlines()]
    ends = {int(value): float(at) for word, value, at in lines if word == "done"}
    writes = [float(value) for word, value, _ in lines if word == "wrote"]
    kept = load_checkpoint(folder / "checkpoint.pt")["state"]["step"]
    steps = max(b - a for a, b in pairwise(ends.values()))
    assert 0 < kept < max(ends)
    assert ends[max(ends)] - ends[kept] <= max(1, 20 * max(writes)) + 2 * steps + 2 * max(writes)


def test_it_learns_and_uses_every_row_each_epoch() -> None:
    out = run_training(toy_config(epochs=6), ToyData(4000))
    assert out.result.test.auc > 0.75
    assert out.result.steps == 6 * math.ceil(4000 / 128)


def test_seeds_decide_everything_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    a, b, c = (run_training(toy_config(seed=s), ToyData()).result for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert a.test == b.test
    assert a.test != c.test


def test_early_stopping_keeps_the_best_weights(tmp_path: Path) -> None:
    config = toy_config(epochs=40, learning_rate=0.02, patience=3)
    for folder in (None, tmp_path):
        out = run_training(config, ToyData(), folder=folder)
        history = out.result.history
        best = max(history, key=lambda h: h["auc"])
        assert out.result.steps < 40 * 16
        assert out.result.best_step == best["step"]
        assert out.result.steps == best["step"] + 3 * 16
        assert out.result.valid.auc == best["auc"]


def test_every_epoch_has_its_own_order_fixed_by_the_seed() -> None:
    class Recording(ToyData):
        def batches(self, split, batch_size, **options):
            made = super().batches(split, batch_size, **options)
            if split == "train":
                seen.append((options["epoch"], made.order.tolist()))
            return made

    seen: list[tuple[int, list[int]]] = []
    run_training(toy_config(seed=5), Recording())
    first = dict(seen)
    assert sorted(first) == [0, 1, 2]
    assert all(sorted(order) == list(range(2000)) for order in first.values())
    assert first[0] != first[1] != first[2] != first[0]
    again, seen = seen, []
    run_training(toy_config(seed=5, method="hash", ratio=3.0), Recording())
    assert seen == again


def test_min_delta_asks_for_a_real_gain() -> None:
    out = run_training(toy_config(epochs=9, patience=2, min_delta=0.5), ToyData())
    assert out.result.steps == 3 * 16


def test_without_a_validation_split() -> None:
    out = run_training(toy_config(patience=1), ToyData(valid=False))
    assert out.result.valid is None
    assert out.result.test is not None
    assert out.result.steps == 48


def test_clipping_bounds_the_dense_gradient_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = torch.nn.utils.clip_grad_norm_

    def spy(params, norm):
        params = list(params)
        original(params, norm)
        seen.append(torch.cat([p.grad.flatten() for p in params]).norm().item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a run says itself that it clips dense gradients alone
        run_training(toy_config(clip_norm=0.01, steps=5), ToyData())
    assert len(seen) == 5
    assert max(seen) <= 0.01 * (1 + 1e-5)


def test_rates_follow_the_schedule_in_both_optimizers() -> None:
    config = toy_config(schedule="cosine", warmup_steps=4, embedding_learning_rate=0.1, steps=10)
    data = ToyData()
    model = model_from_config(config, data.schema(4), data.num_dense)
    trainer = Trainer(model, data, config)
    seen = []
    original = trainer._step

    def spy(batch):
        value = original(batch)
        seen.append((trainer.optimizer.param_groups[0]["lr"], model.embedding_lr))
        return value

    trainer._step = spy
    trainer.run()
    factors = [0.25, 0.5, 0.75, 1.0] + [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert seen == [pytest.approx((5e-3 * f, 0.1 * f)) for f in factors]


def test_other_settings_or_data_are_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_training(toy_config(), SignallingData(20), folder=tmp_path)
    with pytest.raises(ConfigError, match="already holds a run"):
        run_training(toy_config(), ToyData(), folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)batch_size: checkpoint 128, this run 64"):
        run_training(toy_config(batch_size=64), ToyData(), folder=tmp_path, resume=True)
    other = ToyData()
    other.cards = (50, 20, 301, 7)
    with pytest.raises(CheckpointError, match="data: checkpoint"):
        run_training(toy_config(), other, folder=tmp_path, resume=True)


def test_a_state_of_other_dense_parameters_is_refused_in_words(tmp_path: Path) -> None:
    """Earlier versions trained tables behind networks per class as dense parameters."""
    with pytest.raises(Interrupted):
        run_training(toy_config(), SignallingData(20), folder=tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt")
    saved["dense_optimizer"]["param_groups"][0]["params"].append(999)
    torch.save(saved, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="other parameters than this version trains"):
        run_training(toy_config(), ToyData(), folder=tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_a_damaged_checkpoint_is_an_error_not_a_crash(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"a": 1}, model={"w": torch.randn(1000)})
    raw = bytearray(path.read_bytes())
    if damage == "cut":
        raw = raw[: len(raw) // 2]
    elif damage == "flip":
        raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(b"" if damage == "empty" else b"hello" if damage == "text" else bytes(raw))
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


def test_absent_foreign_and_newer_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    torch.save({"x": 1}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "x.pt")
    torch.save({"format": "recsys-embed-checkpoint", "version": 99, "config": {}}, tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match="version 99"):
        load_checkpoint(tmp_path / "y.pt")


@pytest.mark.parametrize("rest", [{}, {"version": 1}, {"version": 1, "config": [1]}, {"version": 1, "config": {1: 2}}])
def test_a_checkpoint_without_its_settings_is_refused(rest: dict, tmp_path: Path) -> None:
    torch.save({"format": "recsys-embed-checkpoint", **rest}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"version None|settings it was made with"):
        load_checkpoint(tmp_path / "c.pt", {"a": 1})


def test_a_device_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device 'nowhere' cannot be used"):
        run_training(toy_config(), ToyData(), folder=tmp_path, device="nowhere")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch) -> None:
    def full(path, write) -> None:
        with open("/dev/full", "wb", buffering=0) as f:
            write(f)

    monkeypatch.setattr("recsys_embed.train.checkpoint.atomic_write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(tmp_path / "c.pt", {"a": 1}, model={"w": torch.zeros(300_000)})


def test_a_disk_that_is_full_at_the_flush_says_of_which_file(tmp_path: Path, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"c\.pt cannot be written \(No space left.*free some space"):
        save_checkpoint(tmp_path / "c.pt", {"a": 1}, model={"w": torch.zeros(3)})
    with pytest.raises(OSError, match="No space left") as caught:
        write_json(tmp_path / "a.json", {})
    assert caught.value.filename == str(tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"a": 1}, model={"w": torch.zeros(3)})
    with pytest.raises(Exception, match=r"pickle|local object"):
        save_checkpoint(path, {"a": 1}, model={"w": torch.ones(3)}, bad=lambda: None)
    assert load_checkpoint(path)["model"]["w"].tolist() == [0, 0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_the_run_folder_says_what_was_run(tmp_path: Path) -> None:
    run_training(toy_config(seed=3), ToyData(), folder=tmp_path, tensorboard=True)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 3
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["versions"]["torch"] == torch.__version__
    assert run["footprint"]["weights"] == 4 * 377 * 5
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events.count("valid") == 3
    assert events[-1] == "test"
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert load_checkpoint(tmp_path / "model.pt")["config"]["seed"] == 3


def test_progress_bar_only_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    run_training(toy_config(epochs=1), ToyData())
    assert capsys.readouterr().err == ""
    run_training(toy_config(epochs=1), ToyData(), show_progress=True)
    assert "train" in capsys.readouterr().err


def test_a_file_is_on_disk_before_it_takes_its_name(real_disk: None, tmp_path: Path, monkeypatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    save_checkpoint(tmp_path / "c.pt", {})
    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("optimizer", ["dense_adam", "adam", "adagrad"])
def test_the_penalty_of_tables_shrinks_rows_that_no_batch_reads(optimizer: str) -> None:
    data = ToyData(rows=64)
    config = toy_config(embedding_optimizer=optimizer, embedding_init="normal:1", epochs=3)
    ends = {}
    for decay in (0.0, 0.1):
        out = run_training(config.replace(embedding_weight_decay=decay), data)
        ends[decay] = out.model.embedding.table("C2.weight").detach()
    unread = torch.ones(300, dtype=torch.bool)
    unread[data.parts["train"].ids[:, 2]] = False
    assert unread.any()
    assert ends[0.1][unread].abs().mean() < ends[0.0][unread].abs().mean() - 0.003


def test_a_run_folder_belongs_to_one_process(tmp_path: Path) -> None:
    with lock(tmp_path / "run"), pytest.raises(RecsysEmbedError, match="another process"):
        run_training(toy_config(epochs=1), ToyData(rows=64), folder=tmp_path / "run")
    assert run_training(toy_config(epochs=1), ToyData(rows=64), folder=tmp_path / "run").result.test is not None
