"""What registering a method checks, and names of earlier versions."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal, Self

import pytest
import torch

import recsys_embed as rse
from recsys_embed import FeatureSpec, Plan, Schema, registry
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.program import Initializer, LookupProgram, MixedRadixDigit, RowLookup, Table
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import ConfigError, UnknownNameError
from recsys_embed.methods.hash import HashConfig
from recsys_embed.planning import FrequencyCurve
from recsys_embed.registry import config_from_dict, with_current_names

SPEC = FeatureSpec("C1", 100, 4)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def counts(spec: FeatureSpec) -> torch.Tensor:
    return 1e6 / (1 + torch.arange(spec.num_embeddings))


def zipf(spec: FeatureSpec) -> FrequencyCurve:
    return FrequencyCurve.zipf(spec.num_embeddings)


def embedding_of(config: Any) -> type[CompressedEmbedding]:
    return type("FoldEmbedding", (CompressedEmbedding,), {"config_cls": config})


@dataclass(frozen=True, kw_only=True)
class FoldConfig(MethodConfig):
    method: ClassVar[str] = "fold"
    rows: int = param(MISSING, "rows", low=1)

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        table = Table("weight", self.rows, spec.embedding_dim, Initializer.plain(spec))
        return LookupProgram((table,), (RowLookup("weight", MixedRadixDigit(mod=self.rows)),))

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        return cls.from_params({**params, "rows": size})


def test_all_faults_of_a_method_are_named_when_it_is_registered() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Faulty(FoldConfig):
        accepts_raw: ClassVar[Any] = "yes"
        order_option: ClassVar[str | None] = "order"
        width_option: ClassVar[str | None] = "width"
        renamed_options: ClassVar[Mapping[str, str]] = {"lines": "row"}
        order: Literal["ids", "freq"] = param("ids", "order")
        init: str = param("plain", "taken by the constructor")
        schema: str = param("", "taken by Plan.uniform")
        size: int = param(1, "taken by `sized`")
        check: int = param(0, "hides a method")  # type: ignore[assignment]

        def planing_loss(self, spec: FeatureSpec, curve: Any) -> float:
            return 0.0

        def planning_variants(self, spec: FeatureSpec, curve: Any) -> Any:  # type: ignore[override]
            return ({},)

        def footprint(self) -> Any:  # type: ignore[override]
            return None

    with pytest.raises(ConfigError) as e:
        registry.register(embedding_of(Faulty), paper="none")
    for text in (
        "`accepts_raw` of Faulty must be true or false; got 'yes'",
        "option `order` of Faulty, its `order_option`, must offer 'ids' and 'counts'",
        "`width_option` of Faulty must be None or one of its options; got 'width'",
        "`renamed_options` of Faulty must lead from former options to present ones; got 'lines': 'row'",
        "option `init` of Faulty is hidden by the argument of that name",
        "option `schema` of Faulty is hidden by the argument of that name",
        "option `size` of Faulty is hidden by the argument of that name by which methods are sized",
        "option `check` of Faulty hides what MethodConfig has under that name",
        "Faulty defines `planing_loss`; did you mean `planning_loss`?",
        "`planning_variants` of Faulty must be a class method",
        "`footprint` of Faulty must take (self, spec, itemsize)",
    ):
        assert text in str(e.value)
    assert "fold" not in [m.name for m in rse.list_methods()]


def test_classes_that_cannot_work_are_refused() -> None:
    class Undecorated(FoldConfig):
        colour: str = "red"

    class Empty(MethodConfig):
        method: ClassVar[str] = "empty"

    for wrong, text in (
        (embedding_of(Undecorated), "`colour` of Undecorated is no option; decorate with @dataclass"),
        (embedding_of(Empty), "(?s)Empty must define `build_program`.*Empty must define `sized`"),
        (embedding_of(int), "`config_cls` must be a subclass of MethodConfig"),
        (int, "registered by a subclass of CompressedEmbedding"),
    ):
        with pytest.raises(ConfigError, match=text):
            registry.register(wrong, paper="none")
    registry.register(embedding_of(FoldConfig), paper="none")
    assert rse.make_embedding("fold", 10, 4, rows=3)(torch.tensor([4])).shape == (1, 4)


def test_what_is_no_program_is_refused_by_name() -> None:
    class Empty(FoldConfig):
        def build_program(self, spec: FeatureSpec) -> Any:
            return None

    with pytest.raises(ConfigError, match=r"`build_program` must return a LookupProgram; got None \(Empty, feature"):
        Empty(rows=3).program(SPEC)


def test_methods_of_the_version_before_work_and_warn() -> None:
    with pytest.warns(DeprecationWarning, match="'_program' is now called 'build_program'") as caught:

        @dataclass(frozen=True, kw_only=True)
        class Old(HashConfig):
            method: ClassVar[str] = "fold"
            order: Literal["ids", "counts"] = param("ids", "order")

            def _program(self, spec: FeatureSpec) -> LookupProgram:
                return super()._program(spec)  # type: ignore[misc,no-any-return]

    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="should declare") as caught:
        registry.register(embedding_of(Old), paper="none", tags=("search",))
    texts = [str(w.message) for w in caught]
    assert [t.partition(", which")[0].partition("declare ")[2] for t in texts] == [
        "`plannable = False`",
        "`order_option = 'order'`",
    ]
    assert (Old.plannable, Old.order_option) == (False, "order")
    assert Old(num_buckets=7).program(SPEC) == HashConfig(num_buckets=7).program(SPEC)


BEFORE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"method": "compositional", "num_collisions": 4, "init": "xavier", "combine": "add"},
     {"method": "compositional", "num_collisions": 4, "initializer": "xavier", "combine": "sum"}),
    ({"method": "multihash", "num_buckets": 9, "head": 5, "law": "cce"},
     {"method": "multihash", "num_buckets": 9, "num_frequent": 5, "initializer": "cce"}),
    ({"method": "mixeddim", "dims": [4, 2], "blocks": [10], "law": "xavier"},
     {"method": "mixeddim", "dims": [4, 2], "blocks": [10], "initializer": "xavier"}),
    ({"method": "adaptive", "num_hot": 3, "num_buckets": 9},
     {"method": "adaptive", "num_frequent": 3, "num_buckets": 9}),
    ({"method": "freqcut", "num_kept": 3}, {"method": "freqcut", "num_frequent": 3}),
    ({"method": "pep", "kept": [1, 2, 3, 4]}, {"method": "pep", "num_kept": [1, 2, 3, 4]}),
    ({"method": "unified", "num_rows": 9, "num_probes": 2, "chunk_dim": 3},
     {"method": "unified", "num_buckets": 9, "num_hashes": 2, "dim": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("before", "now"), BEFORE, ids=[old["method"] for old, _ in BEFORE])
def test_options_under_their_earlier_names(before: dict[str, Any], now: dict[str, Any]) -> None:
    wanted, schema = config_from_dict(now), Schema([SPEC])
    # What was written is read without a word: plans, states, settings of runs.
    assert config_from_dict(before) == wanted
    plan = Plan.from_dict({"version": 1, "features": {"C1": before}})
    assert plan == Plan({"C1": wanted})
    options, current = ({k: v for k, v in d.items() if k != "method"} for d in (before, now))
    settings = [{"method": d["method"], "method_args": o} for d, o in ((before, options), (now, current))]
    assert with_current_names({"train": [settings[0]]}) == {"train": [settings[1]]}
    # In code each earlier name is a warning at the caller's line.
    old = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    builds: list[Callable[[], Any]] = [
        lambda: type(wanted)(**old),
        lambda: type(wanted).from_params(old),
        lambda: Plan.uniform(schema, before["method"], **old)["C1"],
    ]
    if "init" not in old:  # which the constructor took for its own argument
        builds.append(lambda: rse.make_embedding(before["method"], 100, 4, **old).config)
    for build in builds:
        with pytest.warns(DeprecationWarning, match="earlier name goes") as caught:
            assert build() == wanted
        assert {w.filename for w in caught} == {__file__}
        assert len(caught) == sum(now.get(key) != value for key, value in before.items())
    for name in options.keys() - current.keys():
        with pytest.warns(DeprecationWarning, match=name):
            assert getattr(wanted, name) == getattr(wanted, type(wanted).renamed_options[name])
    with pytest.raises(AttributeError, match="no attribute 'never'"):
        wanted.never  # type: ignore[attr-defined]  # noqa: B018
    assert copy.deepcopy(wanted) == pickle.loads(pickle.dumps(wanted)) == wanted


def test_arguments_of_sizing_under_their_earlier_names() -> None:
    with pytest.warns(DeprecationWarning, match="'hot_share' is now called 'frequent_share'"):
        emb = rse.make_embedding("adaptive", 1000, 4, budget="4KiB", hot_share=0.25)
    assert emb.config == rse.make_embedding("adaptive", 1000, 4, budget="4KiB", frequent_share=0.25).config
    schema = Schema([FeatureSpec("A", 3000, 4), FeatureSpec("B", 5000, 4)])
    with pytest.warns(DeprecationWarning, match="'num_probes'"):
        plan = Plan.uniform(schema, "unified", budget="9KiB", num_probes={"A": 1, "B": 2}, dim=2)
    assert plan == Plan.uniform(schema, "unified", budget="9KiB", num_hashes={"A": 1, "B": 2}, dim=2)
    with pytest.warns(DeprecationWarning, match="'head_share'"):
        planned = rse.plan_for_budget(
            schema, "9KiB", methods={"multihash": {"head_share": 0.5}}, stats={s.name: counts(s) for s in schema}
        )
    assert {c.num_frequent > 0 for c in planned.configs.values()} == {True}  # type: ignore[attr-defined]


def test_both_names_of_an_option_and_unknown_ones() -> None:
    with pytest.raises(ConfigError, match="`law` is the earlier name of `initializer`; give one"):
        rse.MultihashConfig(num_buckets=3, law="cce", initializer="cce")
    with pytest.raises(UnknownNameError, match="'num_hashe'; did you mean 'num_hashes'"):
        rse.UnifiedConfig.from_params({"num_buckets": 3, "num_hashe": 2})


def test_states_of_the_version_before_load() -> None:
    def before(module: torch.nn.Module, key: str) -> dict[str, Any]:
        state = module.state_dict()
        text = bytes(state[key].numpy()).decode()
        former = text.replace('"initializer"', '"law"').replace('"num_frequent"', '"head"')
        assert former != text
        return {**state, key: torch.frombuffer(bytearray(former.encode()), dtype=torch.uint8)}

    options: dict[str, Any] = {"num_buckets": 9, "num_frequent": 5}
    emb = rse.make_embedding("multihash", 100, 4, **options)
    coll = rse.EmbeddingCollection(Schema([SPEC]), Plan({"C1": config_from_dict({"method": "multihash", **options})}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        emb.load_state_dict(before(emb, "_extra_state"))
        coll.load_state_dict(before(coll, "_extra_state"))
    other = rse.make_embedding("multihash", 100, 4, **options | {"num_frequent": 6})
    with pytest.raises(RuntimeError, match=r"config\.num_frequent: saved 5, here 6"):
        other.load_state_dict(before(emb, "_extra_state"))
