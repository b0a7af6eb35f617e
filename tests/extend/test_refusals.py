"""What a newcomer gets wrong when extending the library is told before any time is lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed.core.codes import Codes, CodesIndex
from recsys_embed.core.index import IndexArray
from recsys_embed.data import Batch
from recsys_embed.errors import ConfigError
from recsys_embed.extend import FusedOptimizer
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.kernels.native.records import _transform
from recsys_embed.models import CTRModel, list_models, register
from recsys_embed.models.base import MLPParams
from recsys_embed.optim import register_rule
from recsys_embed.plan import Plan
from recsys_embed.train import TrainConfig, run_training
from tests.train.toy import ToyData, ToySource, toy_config

CONFIG = toy_config(model="lr", model_args={}, epochs=1)

# -- data sources --------------------------------------------------------------------------------------------------


def read_with(change: Callable[[Batch], object], memory_limit: int) -> ToySource:
    class Mine(ToySource):
        def read(self, split: str, start: int, stop: int) -> Any:
            return change(super().read(split, start, stop))

    return Mine(memory_limit=memory_limit)


READS: dict[str, tuple[Callable[[Batch], object], str]] = {
    "columns": (lambda b: replace(b, dense=b.dense[:, :2]), r"`dense` must have 3 columns \(`num_dense`\); got 2"),
    "features": (lambda b: replace(b, ids=b.ids[:, :1]), r"`ids` must have 4 columns .*; got 1"),
    "short": (lambda b: b.map(lambda part: part[:-5]), r"expected 600 rows; got 595.*`splits`"),
    "uneven": (lambda b: replace(b, label=b.label[1:]), "equally many rows; got dense 600, ids 600, label 599"),
    "double": (lambda b: replace(b, dense=b.dense.double()), "`dense` must be float32; got torch.float64"),
    "float ids": (lambda b: replace(b, ids=b.ids.float()), "`ids` must be int32 or int64; got torch.float32"),
    "label column": (lambda b: replace(b, label=b.label.unsqueeze(1)), r"the shape \[B\]; got \[600, 1\]"),
    "extra": (lambda b: replace(b, extra={"weight": np.ones(600)}), "part 'weight' must be a torch.Tensor.*as_tensor"),
    "tuple": (lambda b: (b.dense, b.ids, b.label), r"expected a recsys_embed.data.Batch\(.*got tuple"),
    "nothing": (lambda b: None, "got NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("memory_limit", [0, 1 << 30])
@pytest.mark.parametrize("case", READS)
def test_what_read_returns_is_held_to_what_the_source_says(case: str, memory_limit: int) -> None:
    change, text = READS[case]
    with pytest.raises(ConfigError, match=text) as told:
        run_training(CONFIG, read_with(change, memory_limit))
    assert "Mine.read('train', 0, 600)" in str(told.value)


def test_all_faults_of_a_read_are_told_at_once() -> None:
    wrong = read_with(lambda b: replace(b, dense=b.dense[:, :2], ids=b.ids.float()), 1 << 30)
    with pytest.raises(ConfigError, match=r"(?s)2 faults in Mine.read.*`dense`.*`ids`"):
        run_training(CONFIG, wrong.held_out(0.5))


def test_a_batch_of_arrays_names_them() -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)2 faults in Batch:.*`dense` must be a torch.Tensor; got ndarray.*`label`"
    ):
        Batch(np.zeros((2, 1), "f4"), torch.zeros(2, 1, dtype=torch.int64), np.ones(2))  # type: ignore[arg-type]
    one = Batch(torch.zeros(1, 0), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1))
    with pytest.raises(ConfigError, match="the same further parts"):
        Batch.cat([one, replace(one, extra={"weight": torch.ones(1)})])


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"splits": lambda: {"train": 1}}, r"`splits` must be a mapping.*make it a property"),
        ({"splits": "train"}, "`splits` must be a mapping"),
        ({"splits": {"valid": 3}}, "must name a split 'train'; got valid"),
        ({"splits": {"train": "many"}}, "`splits` must map to numbers of rows"),
        ({"num_dense": 2.0}, r"`num_dense` must be the number of numeric columns; got 2.0"),
        ({"num_dense": None}, "`num_dense` must be the number of numeric columns; got None"),
        ({"num_dense": lambda: 2}, r"`num_dense` .*make it a property"),
        ({"schema": rse.Schema([rse.FeatureSpec("a", 3, 4)])}, "`schema` must be a method"),
        ({"schema": lambda width: [width]}, "`schema` of SimpleNamespace must return a recsys_embed.Schema.*got list"),
        ({"digest": 7}, "`digest` of SimpleNamespace must be a text.*got int"),
        ({"batches": lambda *a, **k: iter(())}, r"`batches` of SimpleNamespace must return an iterable with len\(\)"),
        ({"batches": lambda *a, **k: [(1, 2, 3)]}, r"got tuple, which lacks dense, ids, label"),
    ],
)
def test_members_of_another_kind_are_named(members: dict[str, Any], text: str) -> None:
    toy = ToyData(60)
    kinds = ("splits", "num_dense", "digest", "schema", "batches", "numeric_moments")
    data = SimpleNamespace(**{name: getattr(toy, name) for name in kinds} | members)
    with pytest.raises(ConfigError, match=text):
        run_training(CONFIG, data)  # type: ignore[arg-type]


def test_the_splits_of_rows_read_by_number_have_numbers() -> None:
    data = ToySource()
    data.splits = ["train", "valid"]  # type: ignore[misc, assignment]
    with pytest.raises(ConfigError, match=r"`splits` must map the names.*got \['train', 'valid'\]"):
        run_training(CONFIG, data)


# -- update rules --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mine(FusedOptimizer):
    """A rule whose update is given from outside."""

    state: ClassVar[dict[str, str]] = {"mean": "row"}
    does: ClassVar[Callable[..., Any]]

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        return type(self).does(weight, grad, state)


def per_weight(weight: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Tensor:
    state["mean"] = state["mean"] + grad
    return weight


def undeclared(weight: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Tensor:
    state["speed"] = grad
    return weight


@pytest.mark.parametrize("rows", ["touched", "all"])
@pytest.mark.parametrize(
    ("does", "text"),
    [
        (lambda w, g, s: None, r"return the new weights \[3, 4\]; got NoneType: end it with `return weight`"),
        (lambda w, g, s: w.mean(), r"return the new weights \[3, 4\]; got \[\]"),
        (lambda w, g, s: w[:1], r"return the new weights \[3, 4\]; got \[1, 4\]"),
        (per_weight, r"`state\['mean'\]` must keep the shape \[3, 1\]; got \[3, 4\]"),
        (undeclared, r"`state\['speed'\]` is no state of this rule"),
    ],
)
def test_an_update_that_breaks_its_contract_changes_nothing(does: Any, text: str, rows: str) -> None:
    Mine.does = does
    coll = rse.EmbeddingCollection(rse.Schema([rse.FeatureSpec("a", 9, 4)]), None, Mine(rows=rows))
    before = {name: value.detach().clone() for name, value in coll.named_parameters()}
    with pytest.raises(ConfigError, match=rf"{text}.*Mine\.update"):
        coll(torch.tensor([[1], [4], [5]])).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in coll.named_parameters())


def test_a_rule_is_declared_in_known_words() -> None:
    class Odd(FusedOptimizer):
        state: ClassVar[dict[str, str]] = {"mean": "rows"}

        def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
            return weight

    with pytest.raises(ConfigError, match=r"kept per 'row', 'element' or 'step'; got {'mean': 'rows'}"):
        Odd()
    with pytest.raises(ConfigError, match="named by a word"):
        register_rule("my rule")(Mine)


# -- models --------------------------------------------------------------------------------------------------------


def test_a_model_class_is_told_all_that_it_lacks() -> None:
    class Nothing(CTRModel):
        def __init__(self, fields: int, width: int, depth: int) -> None:
            raise AssertionError

    with pytest.raises(
        ConfigError, match=r"(?s)4 faults in model class Nothing.*`key`.*got None.*`params_cls`.*`logits"
    ):
        register(Nothing)

    class NoWord(CTRModel):
        key, params_cls = "two words", MLPParams

        def logits(self, dense: Tensor, ids: Tensor) -> Tensor:
            return dense.sum(1)

    with pytest.raises(ConfigError, match=r"`key` must be its name in settings.*'two words'"):
        register(NoWord)
    with pytest.raises(ConfigError, match=r"`__init__` must take \(spec, params\).*got __init__\(spec"):
        register(type("OneArgument", (CTRModel,), {"key": "one", "params_cls": MLPParams, "logits": NoWord.logits}))
    with pytest.raises(ConfigError, match="a model is a subclass"):
        register(dict)  # type: ignore[type-var]
    taken = type("Taken", (NoWord,), {"key": "deepfm", "__init__": lambda self, spec, params: None})
    with pytest.raises(ConfigError, match="'deepfm' is already registered by DeepFM"):
        register(taken)
    assert not {"two words", "one", None} & set(list_models())


def test_a_plan_as_it_is_names_the_way_out() -> None:
    plan = Plan.full(rse.Schema([rse.FeatureSpec("a", 9, 4)]))
    with pytest.raises(ConfigError, match=r"`plan` must be values by name.*give its to_dict\(\)"):
        TrainConfig(method="planned", plan=plan)  # type: ignore[arg-type]
    TrainConfig(method="planned", plan=plan.to_dict())


# -- indexes and transforms ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Uneven(CodesIndex):
    @property
    def arrays(self) -> tuple[IndexArray, ...]:
        return (IndexArray("first", torch.int32, 4), IndexArray("second", torch.float32, 5))


@dataclass(frozen=True)
class Filled(CodesIndex):
    @property
    def arrays(self) -> tuple[IndexArray, ...]:
        return (IndexArray("mine", torch.uint8, self.size),)

    def initial(self, device: torch.device) -> dict[str, Tensor]:
        return {"short": {"mine": torch.zeros(1)}, "wide": {"mine": torch.full((self.size,), 300)}, "none": {}}[
            self.name
        ]


def test_arrays_of_an_index_are_held_to_what_it_declares() -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)2 faults in index 'c', Uneven.*got first 4, second 5.*'second' must be one"
    ):
        IndexStore([[Uneven("c", 4, 1, 8)]])
    for name, text in (
        ("short", r"'mine' must be a tensor \[4\]; got \[1\]"),
        ("wide", "torch.int64 numbers that torch.uint8 cannot"),
        ("none", r"'mine' must be a tensor \[4\]; got NoneType"),
    ):
        with pytest.raises(ConfigError, match=text):
            IndexStore([[Filled(name, 4, 1, 8)]])


@pytest.mark.parametrize("fields", [{"bitts": 3}, {"bits": 2**63}])
def test_fields_that_no_kernel_reads_are_named(fields: dict[str, int]) -> None:
    class Misspelt(Codes):
        def encoded(self) -> tuple[str, dict[str, int]]:
            return "codes", fields

    index = CodesIndex("c", 4, 1, 8)
    transform = Misspelt(index)
    with pytest.raises(ConfigError, match=r"`encoded` of Misspelt must name fields .*bits.*got {'bit"):
        _transform(transform, IndexStore([[index]]), 0)


# -- plugins -------------------------------------------------------------------------------------------------------

HOSTILE = {
    "stops": "raise KeyboardInterrupt.__base__('stop')",
    "cancelled": "import asyncio; raise asyncio.CancelledError",
    "exits": "import sys; sys.exit(3)",
    "speechless": "class E(Exception):\n    def __str__(self): raise RuntimeError\nraise E",
    "thief": "from recsys_embed.optim import SGD, register_rule\nregister_rule('adam')(type('Adam', (SGD,), {}))",
    "nameless": "from recsys_embed.optim import SGD, register_rule\nregister_rule('')(type('Nameless', (SGD,), {}))",
    "round": "from recsys_embed.optim import list_rules\nlist_rules()",
    "syntax": "def",
}


@pytest.mark.parametrize("warnings", ["default", "error"])
def test_whatever_a_plugin_does_the_library_works(warnings: str, tmp_path: Path) -> None:
    package = tmp_path / "hostile"
    package.mkdir()
    for name, text in {"__init__": "", **HOSTILE}.items():
        (package / f"{name}.py").write_text(text)
    info = tmp_path / "hostile-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hostile\nVersion: 1.0\n")
    lines = [f"{name} = hostile.{name}" for name in HOSTILE] + ["absent = hostile:nothing", "odd = not a module!"]
    (info / "entry_points.txt").write_text("[recsys_embed.rules]\n" + "\n".join(lines) + "\n")
    script = f"""
import sys, warnings
sys.path.insert(0, {str(tmp_path)!r})
from recsys_embed.optim import Adam, list_rules, make_rule
from recsys_embed.utils.plugins import RULES, load_plugins
warnings.simplefilter({warnings!r})
try:
    list_rules()
except RuntimeWarning:
    pass
assert type(make_rule("adam")) is Adam
broken = {{p.name for p in load_plugins(RULES) if p.fault is not None}}
assert broken == {set(HOSTILE) - {"round"} | {"absent", "odd"}!r}, broken
try:
    make_rule("nameles")
except ValueError as e:
    assert "plugin 'nameless'" in str(e), e
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
