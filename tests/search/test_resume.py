"""A search killed at any moment goes on, ends as it would have ended, and refuses what does not belong to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recsys_embed.data.folder import lock
from recsys_embed.errors import BudgetError, CheckpointError, ConfigError, DataError, RecsysEmbedError
from recsys_embed.search import OptembedSearch, OptembedSettings, PepSettings, run_search
from recsys_embed.search.dnis import DnisSearch
from recsys_embed.search.folder import SearchFolder
from recsys_embed.search.pep import PepSearch
from recsys_embed.search.settings import DnisSettings
from recsys_embed.search.supernet import Supernet
from recsys_embed.train.checkpoint import load_checkpoint
from tests.tiers import slow_but
from tests.train.test_loop import SignallingData
from tests.train.toy import ToyData, toy_config

CONFIG = toy_config(embedding_weight_decay=1e-3, epochs=2, eval_every=6, checkpoint_every=3, batch_size=256)
KINDS = {
    "optembed": (OptembedSearch, OptembedSettings(generations=4, population=4, mutations=2, crossovers=2), {}),
    "dnis": (DnisSearch, DnisSettings(blocks=2), {"ratio": 4.0}),
    "pep": (PepSearch, PepSettings(threshold_init=-6.0, retrain_from="supernet"), {"ratio": 2.0}),
}


def run(kind: str, data: ToyData, folder: Path, **more):
    cls, settings, changes = KINDS[kind]
    return run_search(cls, CONFIG.replace(**changes, **more), data, settings, folder=folder)


def outcome_of(folder: Path) -> tuple[str, dict]:
    report = json.loads((folder / "report.json").read_text())
    return (folder / "plan.json").read_text(), {k: report[k] for k in ("test", "valid", "history", "footprint")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_search_ends_as_it_would_have_ended(kind: str, tmp_path: Path) -> None:
    run(kind, ToyData(), tmp_path / "whole")
    folder, stops, reached = tmp_path / "parts", 0, []
    # Batches of one split, then of another: each run gets some way further.
    for split, at in (("train", 2), ("train", 9), ("held_out", 2), ("valid", 3), ("train", 14), ("valid", 5)):
        try:
            run(kind, SignallingData(at, split=split), folder)
        except KeyboardInterrupt:
            stops += 1
            reached.append(sorted(p.name for p in folder.iterdir() if p.is_dir()))
    assert stops >= 2
    assert kind != "dnis" or any("search" in found and "retrain" not in found for found in reached)
    run(kind, ToyData(), folder)
    assert outcome_of(folder) == outcome_of(tmp_path / "whole")
    run(kind, ToyData(), folder)
    assert outcome_of(folder) == outcome_of(tmp_path / "whole"), "a finished search is not done again"


KILLED = """
import os, random, signal, sys, threading
from pathlib import Path

import torch._dynamo  # what torch would import in every child

from recsys_embed.search.evaluate import CandidateEvaluator
from recsys_embed.train import Trainer, checkpoint
from tests.search.test_resume import ToyData, run

kind, folder = sys.argv[1], Path(sys.argv[2])
checkpoint.CHECKPOINT_SECONDS = checkpoint.CHECKPOINT_TIMES = 0.0
os.fsync = lambda descriptor: None  # a process that dies takes nothing along that the system was handed
book = os.open(folder / "book", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def tell(*words):  # outlives a kill
    global left
    os.write(book, (" ".join(map(str, words)) + "\\n").encode())
    left -= 1
    if left == 0:
        threading.Timer(chance.uniform(0, 0.01), os.kill, (os.getpid(), signal.SIGKILL)).start()


begin, step, known, one = Trainer.__init__, Trainer._step, CandidateEvaluator._known, CandidateEvaluator._run
judged = [0, 0]


def told_begin(self, *args, **options):
    begin(self, *args, **options)
    if self.folder is not None:
        tell("begin", self.folder.name, self.state.step)


def told_step(self, batch):
    value = step(self, batch)
    if self.folder is not None:
        tell("done", self.folder.name, self.state.step)
    return value


def told_known(self, candidates):
    seen = known(self, candidates)
    judged[:] = abs(hash(tuple(candidates))), seen.batch * len(candidates) + seen.candidate
    tell("begin", *judged)
    return seen


def told_run(self, batch, columns, before, after, first):
    def told(number, logits):
        after(number, logits)
        judged[1] += 1
        tell("done", *judged)

    one(self, batch, columns, before, told, first)


Trainer.__init__, Trainer._step, CandidateEvaluator._known, CandidateEvaluator._run = (
    told_begin, told_step, told_known, told_run
)


def child(name, told=0):
    global left
    left, pid = told, os.fork()
    if pid == 0:
        run(kind, ToyData(), folder / name, checkpoint_every=1, eval_batch_size=100)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


left, chance = 0, random.Random(kind)
assert child("whole") == 0
most = (folder / "book").read_text().count("\\n") // 3
tell("killed")
killed = 0
while os.WIFSIGNALED(child("parts", chance.randint(1, most))):
    killed += 1
print(killed)
"""


@pytest.mark.parametrize("kind", slow_but(KINDS))
def test_a_search_killed_at_random_moments_loses_at_most_one_step(kind: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, kind, str(tmp_path)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert outcome_of(parts) == outcome_of(whole)
    left, right = (torch.load(f / "model.pt", weights_only=True)["model"] for f in (parts, whole))
    assert all(torch.equal(v, right[k]) for k, v in left.items() if isinstance(v, torch.Tensor))
    reached: dict[str, int] = {}
    lines = (tmp_path / "book").read_text().splitlines()
    for word, stage, step in map(str.split, lines[lines.index("killed") + 1 :]):
        if word == "begin":
            assert int(step) >= reached.get(stage, 0) - 1, f"{stage} went on from step {step} after {reached[stage]}"
        reached[stage] = int(step)
    assert not [*parts.rglob(".*.tmp"), *parts.glob("evolution.pt")]


def test_a_snapshot_of_steps_that_are_done_again_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts, snap = tmp_path / "whole", tmp_path / "parts", PepSearch._snap
    run("pep", ToyData(), whole)
    assert load_checkpoint(whole / "thresholds" / "checkpoint.pt")["state"]["stopped"]

    def die(self: PepSearch, net: Supernet, step: int) -> bool:
        if snap(self, net, step):
            raise KeyboardInterrupt
        return False

    with monkeypatch.context() as m:
        m.setattr(PepSearch, "_snap", die)
        with pytest.raises(KeyboardInterrupt):
            run("pep", ToyData(), parts)
    assert (parts / "snapshot.json").exists()
    run("pep", ToyData(), parts)
    assert outcome_of(parts) == outcome_of(whole)


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    for name in (".search.json.1.tmp", "supernet/.best.pt.1.tmp", "retrain/.checkpoint.pt.1.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"half a file")
    run("optembed", ToyData(), tmp_path)
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_folder_belongs_to_one_search_one_data_set_and_one_process(tmp_path: Path) -> None:
    run("optembed", ToyData(), tmp_path)
    with pytest.raises(CheckpointError, match=r"other settings or data(.|\n)*- data"):
        run("optembed", ToyData(seed=1), tmp_path)
    with pytest.raises(CheckpointError, match=r"- search.generations: 4 there, 5 now"):
        run_search(OptembedSearch, CONFIG, ToyData(), OptembedSettings(generations=5), folder=tmp_path)
    with pytest.raises(CheckpointError, match="- method: 'optembed' there, 'dnis' now"):
        run("dnis", ToyData(), tmp_path)
    with lock(tmp_path), pytest.raises(RecsysEmbedError, match="another process"):
        run("optembed", ToyData(), tmp_path)
    (tmp_path / "evolution.json").write_text("{")
    (tmp_path / "plan.json").unlink()
    with pytest.raises(CheckpointError, match=r"evolution.json is damaged .* remove it"):
        run("optembed", ToyData(), tmp_path)


def test_what_cannot_be_searched_is_refused_before_any_training(tmp_path: Path) -> None:
    def search(kind, settings, data=None, **changes):
        run_search(kind, CONFIG.replace(**changes), data or ToyData(), settings, folder=tmp_path / "x")

    with pytest.raises(ConfigError, match="rows are pruned because weight decay"):
        search(OptembedSearch, OptembedSettings(), embedding_weight_decay=0.0)
    with pytest.raises(ConfigError, match="no split 'valid'; convert it with --valid"):
        search(DnisSearch, DnisSettings(), ToyData(valid=False))
    small = ToyData()
    small.parts["valid"] = type(small.parts["valid"])(*(t[:40] for t in small.parts["valid"]))
    with pytest.raises(ConfigError, match=r"too small to compare candidates: .* positives"):
        search(OptembedSearch, OptembedSettings(), small)
    with pytest.raises(ConfigError, match="starts from full tables"):
        search(OptembedSearch, OptembedSettings(), method="hash", ratio=2.0)
    with pytest.raises(ConfigError, match=r"drop `method`, `method_args` and `plan`; .*int8"):
        search(DnisSearch, DnisSettings(), method_args={"precision": "int8"}, ratio=2.0)
    with pytest.raises(ConfigError, match="give a budget"):
        search(PepSearch, PepSettings())
    with pytest.raises(ConfigError, match="prunes nothing; raise `threshold_lr`"):
        search(PepSearch, PepSettings(threshold_init=-150.0, threshold_lr=1e-3), ratio=2.0)
    with pytest.raises(ConfigError, match=r"begin at -4 are felt from the start.* set `threshold_lr`"):
        search(PepSearch, PepSettings(threshold_init=-4.0), ratio=2.0)
    with pytest.raises(ConfigError, match="`threshold_decay` must be a finite number > 0"):
        PepSettings(threshold_decay=0.0)
    assert not (tmp_path / "x" / "supernet").exists()
    with pytest.raises(BudgetError, match="smallest subnet"):
        search(OptembedSearch, OptembedSettings(), budget=1300)


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"embedding_optimizer": "sgd"}, "got SGD"),
        ({"embedding_optimizer": "adagrad"}, "got Adagrad"),
        ({"embedding_optimizer": "rowwise_adagrad"}, "got RowwiseAdagrad"),
        ({"embedding_optimizer_args": {"rows": "touched"}}, "got Adam.*rows='touched'"),
        ({"embedding_optimizer_args": {"weight_decay": 0.0}}, "got Adam.*weight_decay=0.0"),
        ({"embedding_optimizer": "dense_adam", "embedding_weight_decay": 0.0}, "got 'dense_adam' with 0"),
    ],
    ids=str,
)
def test_optimizers_under_which_no_row_dies_are_refused(changes: dict, got: str) -> None:
    def search(settings: OptembedSettings, **more) -> OptembedSearch:
        return OptembedSearch(CONFIG.replace(**more), ToyData(), settings, SearchFolder(None, {}))

    with pytest.raises(ConfigError, match=f"expected `embedding_optimizer` 'adam'.*{got}.*rows 'none'"):
        search(OptembedSettings(), **changes).check()
    search(OptembedSettings(rows="none"), **changes).check()
    search(OptembedSettings()).check()
    search(OptembedSettings(), embedding_optimizer="dense_adam").check()


def test_no_epochs_of_alternating_steps_are_none(tmp_path: Path) -> None:
    found = run_search(
        DnisSearch, CONFIG.replace(epochs=1, ratio=4.0), ToyData(), DnisSettings(search_epochs=0), folder=tmp_path
    )
    assert set(found.seconds) == {"warm", "retrain"}
    selection = json.loads((tmp_path / "selection.json").read_text())["alpha"]
    assert {value for row in selection for value in row} == {1.0}, "the selection is as it began"


def test_a_loss_that_is_not_finite_names_the_step_and_leaves_the_folder_whole(tmp_path: Path) -> None:
    data = ToyData()
    bad = data.parts["train"].dense.clone()
    bad[1500:] = float("nan")
    data.parts["train"] = data.parts["train"]._replace(dense=bad)
    config = CONFIG.replace(standardise=False, shuffle=False)
    with pytest.raises(DataError, match="training batch of step 6"):
        run_search(OptembedSearch, config, data, KINDS["optembed"][1], folder=tmp_path)
    assert torch.load(tmp_path / "supernet" / "checkpoint.pt", weights_only=True)["state"]["step"] == 3


def test_a_field_of_one_value_is_searched_like_any_other(tmp_path: Path) -> None:
    class OneValue(ToyData):
        cards = (50, 20, 300, 1)

    for kind in KINDS:
        run(kind, OneValue(), tmp_path / kind)
        assert (tmp_path / kind / "report.md").read_text().count("| C3 | 1 |") == 1
