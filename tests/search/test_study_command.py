"""`recsys-embed search methods` and `pick` as people use them: what is shown, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from recsys_embed.cli import main
from recsys_embed.data import make_synthetic
from recsys_embed.report.study_front import front_of
from recsys_embed.search.studies.storage import open_storage

FAST = ["--model", "fm", "--batch-size", "512", "--embedding-dim", "4", "--epochs", "1", "--budgets", "20%",
        "--methods", "hash,optembed", "--set", "search.prune=false", "--set", "search.groups=1"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("synthetic")
    make_synthetic(folder, rows=3000, seed=1)
    return str(folder)


def search(data: str, out: Path, *more: str) -> int:
    return main(["search", "methods", "--data", data, "--out", str(out), *FAST, *more])


def test_latency_is_measured_shown_and_decides_about_the_front(data, tmp_path, capsys):
    assert search(data, tmp_path, "--trials", "3", "--objectives", "auc,bytes,latency") == 0
    shown = capsys.readouterr().out
    assert "| trial | validation AUC | bytes | of full | lookup ms | plan |" in shown
    found = json.loads((tmp_path / "results.json").read_text())
    times = [t["latency"] for t in found["trials"] if t["state"] == "complete"]
    assert times
    assert all(0 < t < 1000 for t in times)
    assert [f"{r['latency']:.3f}" in shown for r in found["front"]] == [True] * len(found["front"])
    assert {r["trial"] for r in found["front"]} >= {min(found["trials"], key=lambda t: t["latency"] or 9e9)["trial"]}


def test_a_trial_is_on_the_front_for_whichever_objective_it_leads_in():
    rows = [
        {"state": "complete", "auc": auc, "bytes": size, "latency": ms}
        for auc, size, ms in ((0.7, 10, 2.0), (0.7, 10, 2.0), (0.7, 20, 1.0), (0.6, 20, 3.0), (0.8, 30, 4.0))
    ]
    assert [r["latency"] for r in front_of(rows)] == [2.0, 1.0, 4.0]
    assert [r["bytes"] for r in front_of([{k: r[k] for k in ("state", "auc", "bytes")} for r in rows])] == [10, 30]


def test_a_study_without_a_complete_trial_says_why(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("recsys_embed.search.studies.study.MethodStudy.bytes", lambda self, config: 10**9)
    assert search(data, tmp_path, "--trials", "2") == 1
    assert "no trial of 2 is complete, so there is no front. Most often: not trained" in capsys.readouterr().err


def test_a_folder_moves_with_its_study_and_keeps_to_it(data, tmp_path, capsys, monkeypatch):
    assert search(data, tmp_path / "a", "--trials", "1") == 0
    shutil.move(tmp_path / "a", tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert search(data, Path("b"), "--trials", "1") == 0
    assert main(["search", "pick", "b", "--trial", "7"]) == 2
    assert "no finished trial 7; it has 0" in capsys.readouterr().err
    assert search(data, Path("b"), "--storage", "other.db") == 2
    assert "a study in another storage" in capsys.readouterr().err
    (tmp_path / "b" / "study.db").unlink()
    for again in (lambda: main(["search", "pick", "b", "--trial", "0"]), lambda: search(data, Path("b"))):
        assert again() == 2
        assert "study.db does not exist: it was moved or removed" in capsys.readouterr().err
    assert not (tmp_path / "b" / "study.db").exists()
    assert not (tmp_path / "other.db").exists()
    asked = (tmp_path / "b" / "study.json").read_text()
    for text, fault in (
        ("{", "is not valid JSON"),
        ("[]", "must hold an object"),
        (asked.replace('"device"', '"devise"'), "unknown setting 'devise'; did you mean 'device'?"),
        (asked.replace('"cpu"', "1"), "`device` must be text; got 1"),
    ):
        (tmp_path / "b" / "study.json").write_text(text)
        assert main(["search", "pick", "b", "--trial", "0"]) == 2
        err = capsys.readouterr().err
        assert "study.json is damaged; remove it" in err
        assert fault in err


@pytest.mark.slow
def test_a_servers_password_is_neither_kept_nor_shown(data, tmp_path, capsys, monkeypatch):
    asked = []

    def server(where: str) -> object:
        asked.append(where)
        return open_storage(str(tmp_path / "server.db"))

    monkeypatch.setattr("recsys_embed.search.studies.storage._server", server)
    run, url = tmp_path / "run", "postgresql://me:{}@host/db?host=/tmp"
    for password in ("secret", "another"):
        assert search(data, run, "--trials", "1", "--storage", url.format(password)) == 0
    assert search(data, run, "--trials", "1", "--storage", url.replace(":{}", "")) == 0
    assert main(["search", "pick", str(run), "--trial", "0"]) == 0
    assert asked == [url.format("secret"), url.format("another"), url.replace(":{}", ""), asked[-1]]
    assert "secret" not in asked[-1]
    (run / "study.json").write_text((run / "study.json").read_text().replace("me@", "me:old-secret@"))
    assert search(data, run, "--trials", "1", "--storage", url.format("secret")) == 0, "as versions before kept it"
    assert search(data, tmp_path / "other", "--storage", url.format("secret"), "--methods", "hash") == 2
    assert search(data, tmp_path / "w", "--trials", "1", "--warm-from", url.format("secret")) == 0
    shown = capsys.readouterr()
    assert "postgresql://me@host/db?host=%2Ftmp holds a study of another space" in shown.err
    assert "from postgresql://me@host/db" in shown.err
    for text in (shown.out, shown.err, *(p.read_text() for p in tmp_path.rglob("*.json"))):
        assert "secret" not in text


def test_what_is_no_setting_ends_with_one_line(data, tmp_path, capsys):
    for more, message in (
        (["--set", "search=3"], "search.KEY=value sets one of a search; got 'search=3'"),
        (["--set", "search.sampler_args.a=1", "--set", "search.sampler_args.b=2"], "sampler_args"),
        (["--set", "search.pruner=median"], "did you mean 'prune'"),
        (["--storage", "a b://"], "is a file, or a URL"),
        (["--warm-from", str(tmp_path / "none.db"), "--trials", "1"], "none.db does not exist"),
    ):
        assert search(data, tmp_path / str(len(message)), *more) == 2, more
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none.db").exists()
