"""The memory report as text, Markdown, JSON and HTML: numbers agree, names cannot break out, nothing is fetched."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import recsys_embed as rse
from recsys_embed import FeatureSpec, Plan, Schema
from recsys_embed.core.footprint import format_bytes
from recsys_embed.report.memory.alternatives import alternatives
from recsys_embed.report.memory.arrays import ArrayStorage
from recsys_embed.report.memory.page import COLUMNS, RATIOS, WhatIf, _script_json
from recsys_embed.report.memory.report import MemoryReport, memory_report
from recsys_embed.report.memory.state_size import OptimizerStateSize

EVIL = '</script><b onmouseover="x">\'&amp; |`*_\u2028'


SCHEMA = Schema([FeatureSpec("C1", 50_000, 16), FeatureSpec("C2", 100, 16), FeatureSpec("C3", 900, 16)])


@cache
def report(**more) -> MemoryReport:
    counts = (1e5 / torch.arange(1, 50_001)).ceil()
    return memory_report(SCHEMA, optimizer="rowwise_adagrad", stats={"C1": counts}, **more)


class Page(HTMLParser):
    """Tags, attributes and texts of a page, and whether its elements nest."""

    VOID = frozenset({"meta", "input", "line", "polyline", "br", "img", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.texts.append(data)


def script(page: str) -> str:
    return re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]


def test_text_fits_and_holds_the_totals() -> None:
    rep = report()
    text = str(rep)
    assert max(map(len, text.splitlines())) <= 100
    for value in (rep.total("serve"), rep.total("train"), rep.footprint.optimizer, rep.plain):
        assert format_bytes(value) in text
    for info in rse.list_methods():
        # Full tables as they are need no line of their own.
        assert bool(re.search(rf"^{info.name}\b", text, re.M)) == (info.name != "full")
    hashed = memory_report(Plan.uniform(SCHEMA, "hash", budget="1MiB"), schema=SCHEMA)
    assert re.search(r"^full, whole", str(hashed), re.M)


@given(st.lists(st.text(st.characters(exclude_characters=".#", exclude_categories=("Cs",)), min_size=1, max_size=150)))
def test_any_name_fits_a_line(names: list[str]) -> None:
    schema = Schema([FeatureSpec(n, 10, 4) for n in dict.fromkeys(names)] or [FeatureSpec("a", 10, 4)])
    lines = memory_report(schema).to_text().splitlines()
    assert max(map(len, lines)) <= 100
    assert not any(c in line for line in lines for c in "\x1b\r\t\x08")


def test_long_names_give_way_to_numbers() -> None:
    order = {"order": "counts", "num_frequent": 400, "num_buckets": 50}
    schema = Schema([FeatureSpec("x" * 90 + str(i), 200_000_000 + i, 16) for i in range(2)])
    plan = Plan({n: rse.get_method("adaptive").config_cls.from_params(order) for n in schema.names})
    lines = memory_report(plan, schema=schema, optimizer=torch.optim.Adam).to_text().splitlines()
    assert max(map(len, lines)) <= 100
    # Names keep their ends, which tell them apart.
    assert [line.split()[0][-1] for line in lines if line.startswith("…")] == ["0", "1"]


def test_many_tables_are_summed_in_one_line() -> None:
    rep = memory_report(Schema([FeatureSpec(f"f{i}", 1000 + i, 4) for i in range(50)]))
    text = rep.to_text(limit=10)
    assert "40 smaller ones" in text
    assert format_bytes(sum(16 * (1000 + i) for i in range(40))) in text
    assert "f49" in text
    assert "f39 " not in text
    assert "smaller ones" not in rep.to_text(limit=None)


def test_markdown_tables_are_rectangular_whatever_the_names() -> None:
    rep = memory_report(Schema([FeatureSpec(EVIL, 1000, 4), FeatureSpec("b", 10, 4)]))
    lines = rep.to_markdown().splitlines()
    widths: list[set[int]] = [set()]
    for line in lines:
        if not line.startswith("|"):
            widths.append(set())
            continue
        widths[-1].add(len(re.findall(r"(?<!\\)\|", line)))
    assert all(len(w) <= 1 for w in widths)
    assert "<b" not in re.sub(r"\\<", "", rep.to_markdown())


def test_json_says_the_same_and_is_versioned(tmp_path: Path) -> None:
    rep = report(precision="int8")
    text = rep.to_json(tmp_path / "deep" / "report.json")
    data = json.loads(text)
    assert json.loads((tmp_path / "deep" / "report.json").read_text()) == data
    assert (data["kind"], data["version"]) == ("recsys_embed.memory_report", 1)
    assert data["totals"]["serve"] == rep.total("serve") == sum(t["bytes"]["serve"] for t in data["tables"])
    assert data["totals"]["train"] == rep.total("train") == sum(t["bytes"]["train"] for t in data["tables"])
    assert data["precisions"]["int8"] == rep.total("serve")
    assert sum(t["share"] for t in data["tables"]) == pytest.approx(1.0)
    assert [a["method"] for a in data["alternatives"]] == [m.name for m in rse.list_methods()]
    assert data["tables"][0]["statistics"]["collisions_measured"] == {"ids": 0.0, "traffic": 0.0, "mixed": 0.0}
    for table in data["tables"]:
        b = table["bytes"]
        assert b["weights"] + b["index"] == sum(a["bytes"] for a in table["arrays"])
        assert b["train"] == b["weights"] + b["index"] + b["optimizer"] + b["gradient"]


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("before")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        report().to_html(path)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_page_nests_and_fetches_nothing() -> None:
    text = report().to_html()
    page = Page(text)
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "action", "onclick", "onload"} & attributes.keys()
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|import\(", text)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a["aria-labelledby"] in ids for _, a in page.tags if "aria-labelledby" in a)
    assert all(a["for"] in ids for t, a in page.tags if t == "label")
    assert any(a.get("name") == "viewport" for _, a in page.tags)
    assert "prefers-color-scheme: dark" in text


def test_page_escapes_every_name() -> None:
    schema = Schema([FeatureSpec(EVIL, 5000, 16), FeatureSpec("b", 900, 8)])
    plan = Plan.uniform(schema, "unified", budget="64KiB", dim=4)
    one = {"distinct": 5000, "num_embeddings": 5000, "coverage": {"1": 0.2, "10000": 1.0}}
    stats = {"splits": {"train": {"rows": 10_000}}, "fields": {EVIL: one, EVIL + "2": one}}
    for rep in (
        memory_report(schema, stats=stats),
        memory_report(plan, schema=schema),
        memory_report(torch.nn.ModuleDict({EVIL.replace(".", ""): torch.nn.Embedding(3, 3)})),
    ):
        text = rep.to_html()
        page = Page(text)
        assert page.open == []
        assert not any(t == "b" and a for t, a in page.tags)
        assert not any("onmouseover" in a for _, a in page.tags)
        assert sum(t == "script" for t, _ in page.tags) == 2
        assert any(EVIL[:20] in t for t in page.texts)
        json.loads(script(text))


def test_data_of_the_page_cannot_close_its_element() -> None:
    text = _script_json({"a": EVIL, "b": "<!--<script>"})
    assert not re.search(r"[<>&\u2028]", text)
    assert json.loads(text) == {"a": EVIL, "b": "<!--<script>"}


def test_page_without_tables_and_with_one_byte() -> None:
    assert Page(memory_report(torch.nn.Linear(2, 2)).to_html()).open == []
    assert Page(memory_report(Schema([FeatureSpec("a", 1, 1)])).to_html()).open == []


def test_what_if_points_are_those_of_the_alternatives() -> None:
    rep = report()
    data = json.loads(script(rep.to_html()))
    assert data["columns"] == list(COLUMNS)
    for ratio in RATIOS[:3]:
        for a in rep.alternatives(ratio):
            point = {"kept": a.elements / (rep.plain // 4), **{p: a.serve[p] for p in COLUMNS[:-1]}, "train": a.train}
            assert point in data["methods"][a.method]


def test_what_if_keeps_more_with_more_budget_and_never_above_it() -> None:
    what_if = WhatIf.of(report())
    budgets = [what_if.low * (what_if.high / what_if.low) ** (i / 40) for i in range(41)]
    for method, points in what_if.methods.items():
        for column in COLUMNS:
            kept = [what_if.kept(method, column, b) or 0.0 for b in budgets]
            assert kept == sorted(kept)
            smallest = min(p[column] for p in points)
            assert [k > 0 for k in kept] == [b >= smallest for b in budgets]
    assert what_if.kept("full", "fp32", what_if.plain) == 1.0
    assert what_if.kept("hash", "fp32", what_if.plain / 10) == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize("info", rse.list_methods(), ids=lambda m: m.name)
@pytest.mark.parametrize("ratio", [1.0, 4.0, 50.0])
def test_alternatives_are_what_a_plan_of_those_sizes_takes(info: rse.MethodInfo, ratio: float) -> None:
    """Each table alone against the method's own sizing by bytes."""
    spec = FeatureSpec("C1", 50_000, 16)
    rep = memory_report(Schema([spec]), optimizer=rse.Adam())
    (found,) = [a for a in rep.alternatives(ratio) if a.method == info.name]
    if info.name == "full":
        assert found.serve["fp32"] == 50_000 * 64
        return
    if found.missed:
        with pytest.raises(rse.RecsysEmbedError):
            info.config_cls.for_budget(spec, int(50_000 * 64 / ratio))
        return
    config = info.config_cls.for_budget(spec, int(50_000 * 64 / ratio))
    best = config.footprint(spec).serve
    assert found.serve["fp32"] <= 50_000 * 64 / ratio
    assert found.serve["fp32"] >= 0.99 * best
    assert found.per_table == {"C1": found.serve["fp32"]}
    if config.computes:
        assert found.train == 2 * found.serve["fp32"], "networks have gradients, and an optimizer of their own"
        return
    held = config.footprint(spec).train if found.own_precisions else found.serve["fp32"]
    dense = found.train - 3 * held
    assert abs(dense) <= 0.02 * found.train  # two moments per number; a little less where a part is an index


def test_the_least_table_that_is_sized_and_the_least_bytes_that_a_method_takes() -> None:
    for rows, kept in ((199, True), (200, False)):
        (found,) = [
            a for a in memory_report(Schema([FeatureSpec("a", rows, 8)])).alternatives(200) if a.method == "hash"
        ]
        assert (found.serve["fp32"] == rows * 32) == kept
        assert found.missed == 0, "one row of 32 bytes is what is available"


def test_what_is_frozen_has_no_optimizer_state() -> None:
    size, table = OptimizerStateSize("adam", fused=rse.Adam(lr=0.1)), ArrayStorage("weight", 10, 4, 4, "table")
    assert size.state_bytes(table, "fused")[0] == rse.Adam(lr=0.1).state_bytes(10, 4) > 0
    assert size.state_bytes(table, "frozen") == (0, 0)


def test_small_tables_stay_plain_and_unfit_ones_are_counted() -> None:
    small = memory_report(Schema([FeatureSpec("a", 150, 8)]))
    assert {a.serve["fp32"] for a in small.alternatives()} == {150 * 32}
    raw = memory_report(
        Plan({"a": rse.get_method("hash").config_cls.from_params({"num_buckets": 100})}),
        schema=Schema([FeatureSpec("a", 5000, 8, ids="raw")]),
    )
    by_method = {a.method: a for a in raw.alternatives()}
    assert by_method["hash"].unfit == 0
    assert by_method["lowdim"].unfit == 1
    assert raw.plain == 5000 * 32


def test_fused_state_of_an_alternative_is_that_of_its_tables() -> None:
    schema = Schema([FeatureSpec("C1", 50_000, 16)])
    found = {a.method: a for a in memory_report(schema, optimizer=rse.Adagrad(lr=0.1)).alternatives(4.0)}
    config = rse.get_method("lowdim").config_cls.for_budget(schema["C1"], 50_000 * 16)
    tables = {t.name: 4 * t.rows * t.width for t in config.program(schema["C1"]).tables}
    # The projection has an ordinary gradient and no fused state.
    assert found["lowdim"].train == 2 * sum(tables.values())


def test_only_the_largest_shapes_are_sized() -> None:
    storages = [t.storage for t in memory_report(Schema([FeatureSpec(f"f{i}", 300 + i, 8) for i in range(90)])).tables]
    (found,) = alternatives(storages, 10.0, None, "dense", methods=["hash"])
    plain = [n for n, size in found.per_table.items() if size == 32 * (300 + int(n[1:]))]
    assert sorted(plain, key=lambda n: int(n[1:])) == [f"f{i}" for i in range(30)]


@pytest.mark.parametrize("info", rse.list_methods(), ids=lambda m: m.name)
def test_training_an_alternative_takes_what_a_collection_of_it_holds(info: rse.MethodInfo) -> None:
    """Weights, arrays, fused state, and gradients of what no fused optimizer steps, after a backward of all ids."""
    spec = FeatureSpec("C1", 600, 48)
    schema = Schema([spec])
    (found,) = [
        a for a in memory_report(schema, optimizer=rse.Adagrad(lr=0.1)).alternatives(3.0) if a.method == info.name
    ]
    if info.name == "full":
        plan = Plan.full(schema)
    else:
        plan = Plan({"C1": info.config_cls.for_budget(spec, 600 * 48 * 4 // 3)})
    coll = rse.EmbeddingCollection(schema, plan, rse.Adagrad(lr=0.1))
    coll(torch.arange(600).unsqueeze(1)).sum().backward()
    gradients = sum(p.grad.nbytes for p in coll.parameters() if p.grad is not None)
    assert gradients == 0 or gradients > 2000, "enough to be seen beside what kernels note of a collection"
    held = sum(t.nbytes for t in (*coll.parameters(), *coll.buffers())) + gradients
    size = plan["C1"].footprint(spec).serve
    assert found.train == pytest.approx(held * found.serve["fp32"] / size, abs=1000)
