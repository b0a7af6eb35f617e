"""compress_: the tables of a model are replaced, and everything else stays."""

import copy
import gc
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import recsys_embed as rse
from recsys_embed.compress import compress_, materialize_
from recsys_embed.discover import find_tables
from recsys_embed.errors import BudgetError, ConfigError
from recsys_embed.shared import PlainView

METHODS = [m.name for m in rse.list_methods()]


class Model(nn.Module):
    """Tables as attributes, in lists and dictionaries, one of them twice."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.user = nn.Embedding(400, 8, **options)
        self.fields = nn.ModuleList([nn.Embedding(300, 8, **options), nn.EmbeddingBag(200, 8, mode="sum", **options)])
        self.tower = nn.Sequential(nn.ModuleDict({"item": nn.Embedding(100, 8, padding_idx=3, **options)}))
        self.again = self.user
        self.head = nn.Linear(8, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of ids ``[B]`` below 100."""
        bags = self.fields[1](ids.unsqueeze(1))
        rows = self.user(ids) + self.fields[0](ids) + bags + self.tower[0]["item"](ids) + self.again(ids)
        return self.head(rows).squeeze(1)


def uniform(model: nn.Module, method: str, share: float = 0.5, **params: Any) -> rse.Plan:
    schema = rse.Schema.from_model(model)
    budget = int(share * sum(4 * f.num_embeddings * f.embedding_dim for f in schema))
    return rse.Plan.uniform(
        schema, method, **({} if method == "full" else {"budget": budget, "full_below": 0}), **params
    )


def snapshot(model: nn.Module) -> Any:
    """What must not change when an attempt fails."""
    modules = [(path, id(m)) for path, m in model.named_modules(remove_duplicate=False)]
    return modules, [(k, v._version) for k, v in model.state_dict().items()], [id(p) for p in model.parameters()]


@pytest.mark.parametrize("init", ["dense", "fresh"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_the_place_of_every_table(method: str, init: Any) -> None:
    model = Model()
    plan = uniform(model, method)
    dry = compress_(model, plan, init=init, dry_run=True)
    before = snapshot(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        report = compress_(model, plan, init=init)
        drawn = torch.rand(1)
        torch.manual_seed(0)
        assert torch.equal(drawn, torch.rand(1)), "the global random state is left alone"
    assert [t.name for t in report.tables] == ["user", "fields/0", "fields/1", "tower/0/item"]
    assert dry.dry_run
    assert [(t.bytes_after, t.method) for t in dry.tables] == [(t.bytes_after, t.method) for t in report.tables]
    assert report.bytes_before == 4 * 8 * 1000
    held = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith("head"))
    index = sum(b.nbytes for n, b in model.named_buffers())  # state that serving reads; none here is plain
    assert report.bytes_after <= held + index
    if method == "full":
        assert snapshot(model) == before
        assert all(t.action == "kept" for t in report.tables)
        return
    assert report.bytes_after <= 0.5 * report.bytes_before
    assert report.bytes_after == plan.footprint(rse.Schema.from_model(model)).serve
    assert model.again is model.user
    assert all(t.kind == "compressed" for t in find_tables(model))
    ids = torch.tensor([3, 7, 99])
    assert model(ids).shape == (3,)
    assert model.tower[0]["item"](ids)[0].eq(0).all(), "the padding id gives zeros"
    errors = [t.relative_error for t in report.replaced]
    if init == "dense":
        assert all(e is not None and 0 <= e <= 1.01 for e in errors)
        assert "error" in str(report)
    else:
        assert errors == [None] * len(errors)
    loss = model(ids).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_compressed_model_learns(method: str) -> None:
    torch.manual_seed(0)
    model = Model()
    compress_(model, uniform(model, method), init="fresh")
    ids = torch.arange(100)
    target = torch.sin(ids * 1.7)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(ids) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_hash_buckets_start_as_weighted_means_of_the_trained_rows() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(50, 4)})
    weight = model["a"].weight.detach().double()
    counts = torch.arange(50) % 7
    plan = rse.Plan({"a": rse.HashConfig(num_buckets=10)})
    report = compress_(model, plan, counts={"a": counts})
    rows = model["a"].program.probes[0].transform.rows(torch.arange(50))
    got = torch.empty(50, 4, dtype=torch.float64)
    for bucket in rows.unique():
        at = rows == bucket
        c = counts[at].double()
        if c.sum() > 0:
            got[at] = (weight[at] * c[:, None]).sum(0) / c.sum()
    seen = counts > 0
    torch.testing.assert_close(model["a"].materialize().double()[seen], got[seen], rtol=1e-4, atol=1e-5)
    lost = ((weight - got).square().sum(1) * counts)[seen].sum() / (weight.square().sum(1) * counts).sum()
    assert report["a"].relative_error == pytest.approx(float(lost.sqrt()), rel=1e-4)


def test_the_padding_row_is_no_part_of_the_error() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(40, 8, padding_idx=3)})
    with torch.no_grad():
        model["a"].weight[3] = 1e4
    report = compress_(model, rse.Plan({"a": rse.LowdimConfig(dim=8)}))
    assert report["a"].relative_error < 1e-5
    assert "padding row" in report["a"].note


def test_low_rank_tables_come_back_exactly() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(60, 8)})
    with torch.no_grad():
        model["a"].weight.copy_(torch.randn(60, 3) @ torch.randn(3, 8))
    weight = model["a"].weight.detach().clone()
    report = compress_(model, rse.Plan({"a": rse.LowdimConfig(dim=3)}))
    torch.testing.assert_close(model["a"].weight + 0, weight, rtol=1e-4, atol=1e-5)
    assert report["a"].relative_error < 1e-5
    materialize_(model)
    torch.testing.assert_close(model["a"].weight.detach(), weight, rtol=1e-4, atol=1e-5)


def test_fresh_rows_are_as_wide_as_those_they_replace() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(5000, 8, padding_idx=0), "m": nn.Embedding(5000, 8, device="meta")})
    with torch.no_grad():
        model["a"].weight.normal_(0, 0.001)
        model["a"].weight[0] = 1000.0
    report = compress_(model, rse.Plan(dict.fromkeys("am", rse.HashConfig(num_buckets=2000))), init="fresh")
    assert abs(float(model["a"].materialize().std()) - 0.001) < 2e-4
    assert "padding row" in report["a"].note
    assert model["m"].table("weight").is_meta
    model["m"].to_empty(device="cpu").reset_parameters()
    assert abs(float(model["m"].materialize().std()) - 1) < 0.2


# -- options and what else a module carries ---------------------------------------------------------------------------


@settings(max_examples=10)
@given(
    padding=st.sampled_from([None, 0, -1, 7]),
    mode=st.sampled_from([None, "sum", "mean", "max"]),
    sparse=st.booleans(),
    last=st.booleans(),
    training=st.booleans(),
    trained=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_call_options_and_state_carry_over_and_back(
    padding: int | None, mode: Any, sparse: bool, last: bool, training: bool, trained: bool, dtype: torch.dtype
) -> None:
    sparse = sparse and mode != "max"
    common: dict[str, Any] = {"padding_idx": padding, "sparse": sparse, "dtype": dtype}
    if mode is None:
        plain: Any = nn.Embedding(40, 4, **common)
    else:
        plain = nn.EmbeddingBag(40, 4, mode=mode, include_last_offset=last, **common)
    plain.requires_grad_(trained).train(training)
    model = nn.ModuleList([plain])
    options = {
        k: getattr(plain, k) for k in ("padding_idx", "sparse", "mode", "include_last_offset") if hasattr(plain, k)
    }
    compress_(model, rse.Plan({"0": rse.HashConfig(num_buckets=9)}))
    new: Any = model[0]
    for key, value in options.items():
        assert getattr(new, key) == value
    assert new.training == training
    assert {p.dtype for p in new.parameters()} == {dtype}
    assert all(p.requires_grad == trained for p in new.parameters())
    args: dict[str, Any] = {"input": torch.tensor([7, 1, 39, 7, 0])}
    if mode is not None:
        args["offsets"] = torch.tensor([0, 2, 2, 5] if last else [0, 2, 2])
    out = new(**args)
    materialize_(model)
    back: Any = model[0]
    assert type(back) is type(plain)
    assert repr(back) == repr(plain)
    assert back.weight.requires_grad == trained
    assert back.weight.dtype == dtype
    assert back.training == training
    torch.testing.assert_close(out, back(**args), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_what_a_method_cannot_do_is_refused_by_name(options: dict[str, Any]) -> None:
    model = Model(**options)
    before = snapshot(model)
    plan = uniform(model, "hash")
    with pytest.raises(ConfigError) as caught:
        compress_(model, plan)
    text = str(caught.value)
    for name in ("user", "fields/0", "fields/1", "tower/0/item"):
        assert f"table '{name}'" in text, "all faults at once"
    assert next(iter(options)) in text
    assert snapshot(model) == before
    compress_(model, rse.Plan.full(rse.Schema.from_model(model)))  # plain tables keep them
    assert snapshot(model) == before


def test_hooks_move_and_their_handles_keep_working() -> None:
    model = Model()
    calls: list[str] = []
    user = model.user
    handles = [
        user.register_forward_hook(lambda m, i, o: calls.append("forward")),
        user.register_forward_hook(lambda m, a, k, o: calls.append("kwargs"), with_kwargs=True, always_call=True),
        user.register_forward_pre_hook(lambda m, i: calls.append("pre")),
        user.register_full_backward_hook(lambda m, i, o: calls.append("backward")),
        user.register_full_backward_pre_hook(lambda m, o: calls.append("backward pre")),
    ]

    def backward() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: no input of the module requires gradients
            model.user(torch.tensor([1])).sum().backward()

    compress_(model, uniform(model, "hash"))
    backward()
    assert sorted(calls) == ["backward", "backward pre", "forward", "kwargs", "pre"]
    for handle in handles[:-1]:
        handle.remove()
    calls.clear()
    backward()
    assert calls == ["backward pre"]
    materialize_(model)
    backward()
    assert calls == ["backward pre"] * 2


def test_attributes_buffers_and_submodules_move() -> None:
    model = Model()
    model.user.feature = "user_id"
    model.user.register_buffer("seen", torch.ones(3))
    model.user.register_buffer("cache", torch.ones(3), persistent=False)
    model.user.child = nn.Linear(2, 2)
    keys = {k for k in model.state_dict() if k.startswith("user.") and k != "user.weight"}
    compress_(model, uniform(model, "hash"))
    for _ in range(2):
        assert model.user.feature == "user_id"
        assert model.user.seen.tolist() == [1, 1, 1]
        assert keys <= set(model.state_dict())
        assert "user.cache" not in model.state_dict()
        if isinstance(model.user, nn.Embedding):
            break
        materialize_(model)
    assert isinstance(model.user, nn.Embedding)


def test_what_cannot_move_is_refused_by_name() -> None:
    def with_user(change: Any) -> tuple[Model, rse.Plan]:
        model = Model()
        plan = uniform(model, "hash")
        change(model)
        return model, plan

    cases: dict[str, Any] = {
        "_state_dict_hooks": lambda m: m.user._register_state_dict_hook(lambda *a: None),
        "_load_state_dict_pre_hooks": lambda m: m.user.register_load_state_dict_pre_hook(lambda *a: None),
        "gradient hooks": lambda m: m.user.weight.register_hook(lambda g: g),
        "'weight' has gradient hooks": lambda m: m.user.weight.register_post_accumulate_grad_hook(lambda p: None),
        "attribute 'config'": lambda m: setattr(m.user, "config", 1),
        "not finite": lambda m: m.user.weight.data[3].fill_(float("nan")),
        "forward is replaced": lambda m: setattr(m.user, "forward", lambda ids: ids),
        "also head.weight": lambda m: setattr(m, "head", _tied(m.user)),
        "'bound'": lambda m: object.__setattr__(m, "bound", m.user.forward),
        "parametrization": lambda m: torch.nn.utils.parametrizations.weight_norm(m.user),
    }
    for text, change in cases.items():
        model, plan = with_user(change)
        before = [id(m) for m in model.modules()]
        with pytest.raises(ConfigError, match=text if text != "'bound'" else "bound holds the replaced table user"):
            compress_(model, plan)
        assert [id(m) for m in model.modules()] == before
    with pytest.raises(ConfigError, match="whole model"):
        compress_(nn.Embedding(9, 2), rse.Plan({"embedding": rse.HashConfig(num_buckets=3)}))
    model, plan = with_user(lambda m: None)
    with torch.inference_mode(), pytest.raises(ConfigError, match="inference_mode"):
        compress_(model, plan)
    wrapped = nn.DataParallel(model)
    plan = uniform(wrapped, "hash")
    with pytest.raises(ConfigError, match="DataParallel"):
        compress_(wrapped, plan)
    model = Model(device="meta")
    plan = uniform(model, "hash")
    with pytest.raises(ConfigError, match=r"meta.*init='fresh'"):
        compress_(model, plan)


@pytest.mark.parametrize("dry_run", [True, False])
def test_every_table_that_cannot_be_fitted_to_is_named(dry_run: bool) -> None:
    tables = {"plain": nn.Embedding(50, 4), "hashed": rse.HashEmbedding(60, 4, num_buckets=9)}
    meta = {
        "absent": nn.Embedding(30, 4, device="meta"),
        "hollow": rse.HashEmbedding(40, 4, num_buckets=9, device="meta"),
    }
    model = nn.ModuleDict(tables | meta)
    with torch.no_grad():
        model["plain"].weight[3] = float("inf")
        next(model["hashed"].parameters())[:2] = float("nan")
    plan = rse.Plan(dict.fromkeys(model, rse.HashConfig(num_buckets=5)))
    before = dict(model)
    with pytest.raises(ConfigError) as caught:
        compress_(model, plan, dry_run=dry_run)
    for text in (
        "4 faults",
        "'plain' has 1 rows that are not",
        "'hashed' has 2 rows",
        "'absent' is on",
        "'hollow' is on",
    ):
        assert text in str(caught.value)
    assert dict(model) == before
    compress_(model, plan, init="fresh", dry_run=dry_run)


def _tied(table: Any) -> nn.Module:
    head = nn.Linear(8, 400, bias=False)
    head.weight = table.weight
    return head


ORDERED = [m.name for m in rse.list_methods() if "order" in m.config_cls.__dataclass_fields__]


@pytest.mark.parametrize("method", ORDERED)
def test_counts_say_which_ids_are_frequent(method: str) -> None:
    counts = torch.arange(300.0) + 1  # the last id is the most frequent

    def fresh() -> nn.ModuleDict:
        return nn.ModuleDict({"a": nn.Embedding(300, 8)})

    plan = uniform(fresh(), method, order="counts")
    if not plan["a"].program(rse.Schema.from_model(fresh())["a"]).indexes:
        pytest.skip("takes no ids apart at this size")
    assert "falling frequency" in compress_(fresh(), plan, dry_run=True)["a"].note
    for init in ("fresh", "dense"):
        model = fresh()
        report = compress_(model, plan, init=init, counts={"a": counts.tolist()})  # type: ignore[arg-type,dict-item]
        assert report["a"].note == ""
        store = model["a"].kernel.index
        assert store.indexes[0]
        for index in store.indexes[0].values():
            wanted = torch.arange(300).flip(0)[index.start : index.start + index.count].sort().values
            assert torch.equal(store.members(0, index.name), wanted)
    by_id = uniform(fresh(), method, order="ids")
    assert "falling frequency" in compress_(fresh(), by_id, dry_run=True)["a"].note
    assert "use order='counts'" in compress_(fresh(), by_id, counts={"a": counts}, dry_run=True)["a"].note
    assert compress_(fresh(), by_id, counts={"a": counts.flip(0)}, dry_run=True)["a"].note == ""


@pytest.mark.parametrize("policy", ["hash", "oov", "zero", "raise"])
def test_ids_never_seen_become_what_one_says(policy: Any) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"big": nn.Embedding(300, 8), "tiny": nn.Embedding(5, 8), "low": nn.Embedding(100, 8)})
    dense = {k: m.weight.detach().clone() for k, m in model.items()}
    plan = {"big": rse.HashConfig(num_buckets=30), "tiny": rse.FullConfig(), "low": rse.LowdimConfig(dim=8)}
    compress_(model, rse.Plan(plan), unseen=policy)
    assert model["tiny"].spec.unseen == policy
    assert model["tiny"].weight.shape == (5, 8)
    torch.testing.assert_close(model["tiny"].weight + 0, dense["tiny"])
    torch.testing.assert_close(model["low"](torch.arange(100)), dense["low"], rtol=1e-4, atol=1e-5)
    beyond = torch.tensor([400, -3])
    for name, module in model.items():
        if policy == "raise":
            with pytest.raises(IndexError):
                module(beyond)
            continue
        out = module(beyond)
        assert out.eq(0).all() == (policy == "zero")
        if policy == "oov":
            torch.testing.assert_close(out[0], out[1])
            if name == "tiny":
                torch.testing.assert_close(out[0], dense["tiny"].mean(0))
    compress_(model, rse.Plan(plan | {"big": rse.LowdimConfig(dim=2)}))
    assert {m.spec.unseen for m in model.values()} == {policy}, "it stays"
    report = materialize_(model)
    assert all(type(m) is nn.Embedding for m in model.values())
    assert [m.weight.shape[0] for m in model.values()] == [300, 5, 100]
    assert all("as torch does" in t.note for t in report.tables) == (policy != "raise")


def test_policies_by_table() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(300, 8), "b": nn.Embedding(300, 8)})
    plan = rse.Plan(dict.fromkeys("ab", rse.LowdimConfig(dim=2)))
    with pytest.raises(ConfigError, match=r"`unseen` names 'c'.*"):
        compress_(model, plan, unseen={"c": "zero"})
    with pytest.raises(ConfigError, match="must be one of hash, oov, zero, raise"):
        compress_(model, plan, unseen="never")  # type: ignore[arg-type]
    compress_(model, plan, unseen={"b": "zero"})
    assert model["b"](torch.tensor([999])).eq(0).all()
    with pytest.raises(IndexError):
        model["a"](torch.tensor([999]))


# -- matching the plan ------------------------------------------------------------------------------------------------


def test_plan_and_tables_must_match_and_every_fault_is_told() -> None:
    model = Model()
    entry = rse.HashConfig(num_buckets=10)
    plan = {"usr": entry, "fields.0": entry, "fields/0": entry, "tower.0.item": rse.HashConfig(num_buckets=101)}
    before = snapshot(model)
    with pytest.raises(ConfigError) as caught:
        compress_(model, plan, counts={"nope": torch.ones(1), "fields/0": torch.ones(5)}, optimizer=[3])
    text = str(caught.value)
    for part in (
        "'usr', which is no table of the model; did you mean 'user'?",
        "table 'fields/0' twice",
        "table 'user' has no entry",
        "table 'fields/1' has no entry",
        "`counts` names 'nope'",
        "must be [300]",
        "`num_buckets` must be in [1, 100]; got 101",
        "`optimizer` must be torch optimizers; got int",
    ):
        assert part in text, part
    assert snapshot(model) == before
    with pytest.raises(ConfigError, match="matches no table"):
        compress_(model, {}, exclude="nope*")
    with pytest.raises(ConfigError, match="leave out"):
        compress_(model, uniform(model, "hash"), exclude="user")
    with pytest.raises(ConfigError, match="`init`"):
        compress_(model, {}, init="warm")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`plan`"):
        compress_(model, "hash")  # type: ignore[arg-type]


def test_dotted_paths_patterns_and_what_is_left_out() -> None:
    model = Model()
    entry = rse.HashConfig(num_buckets=10)
    report = compress_(model, {"again": entry, "tower.0.item": entry}, include=["again", "tower.*"])
    assert [(t.name, t.action) for t in report.tables] == [
        ("user", "replaced"),
        ("fields/0", "skipped"),
        ("fields/1", "skipped"),
        ("tower/0/item", "replaced"),
    ]
    assert report["again"] is report["user"]
    assert "left out" in str(report)
    # What is compressed needs no entry to stay so.
    report = compress_(model, {"fields/0": entry, "fields/1": rse.FullConfig()})
    assert [t.method for t in report.tables] == ["hash", "hash", "full", "hash"]


class Doubled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Named(nn.Embedding):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.label = "x"


class Twice(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * self.table(input)


def test_subclasses_need_an_explicit_word() -> None:
    entry = rse.HashConfig(num_buckets=20)
    model = nn.ModuleDict({"plain": nn.Embedding(20, 4), "doubled": Doubled(20, 4), "named": Named(20, 4)})
    assert compress_(model, {"plain": entry}, dry_run=True)["doubled"].note.endswith("more than its base")
    plan = rse.Plan(dict.fromkeys(model, entry))
    with pytest.raises(ConfigError, match=r"name the class in `subclasses`"):
        compress_(model, plan)
    with pytest.raises(ConfigError, match="Doubled overrides forward"):
        compress_(model, plan, subclasses=[Doubled, Named])
    ids = torch.arange(20)
    lossless = rse.Plan(dict.fromkeys(model, rse.LowdimConfig(dim=4)))
    before = {k: m(ids).detach() for k, m in model.items()}
    compress_(model, lossless, subclasses={Doubled: lambda old, new: Twice(new), Named: None})
    for key, out in before.items():
        torch.testing.assert_close(model[key](ids), out, rtol=1e-4, atol=1e-5)
    assert model["named"].label == "x"
    assert type(model["doubled"]) is Twice
    again = nn.ModuleList([Doubled(20, 4)])
    with pytest.raises(ConfigError, match="must return a module"):
        compress_(again, {"0": entry}, subclasses={Doubled: lambda old, new: None})  # type: ignore[dict-item,return-value]
    assert type(again[0]) is Doubled


# -- tables that share ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, 0])
def test_tied_weights_stay_tied(padding: int | None) -> None:
    model = nn.Module()
    model.a, model.c = nn.Embedding(50, 4, padding_idx=padding), nn.Embedding(50, 4)
    model.b = nn.EmbeddingBag(50, 4, mode="sum", padding_idx=padding)
    model.b.weight = model.a.weight
    plan = rse.Plan.uniform(rse.Schema.from_model(model), "hash", num_buckets=11)
    assert len(plan) == 2
    report = compress_(model, plan)
    assert model.a.table("weight") is model.b.table("weight")
    assert len(list(model.parameters())) == 2
    assert [t.paths for t in find_tables(model)] == [("a", "b"), ("c",)]
    assert report.bytes_after == 2 * 11 * 4 * 4
    ids = torch.arange(1, 50)
    assert torch.equal(model.a(ids), model.b(ids.unsqueeze(1)))
    (model.a(ids).sum() + model.b(ids.unsqueeze(1)).sum()).backward()
    assert model.a.table("weight").grad is not None
    materialize_(model)
    assert model.a.weight is model.b.weight
    assert model.c.weight is not model.a.weight


@pytest.mark.parametrize("method", [m for m in METHODS if m == "unified"] + ["unified sum"])
def test_features_that_name_a_shared_table_store_it_once(method: str) -> None:
    torch.manual_seed(0)
    params: dict[str, Any] = {"combine": "sum"} if method.endswith("sum") else {}
    model = nn.ModuleDict({f"C{i}": nn.Embedding(rows, 8) for i, rows in enumerate((500, 300, 40, 700))})
    schema = rse.Schema.from_model(model)
    plan = rse.Plan.uniform(schema, "unified", budget="8KiB", full_below=100, **params)
    assert plan["C2"].method == "full"
    dry = compress_(model, plan, dry_run=True)
    dense = {k: m.weight.detach().clone() for k, m in model.items()}
    report = compress_(model, plan)
    assert report.bytes_after == plan.footprint(schema).serve == sum(p.nbytes for p in model.parameters())
    assert dry.bytes_after == report.bytes_after
    (shared,) = report.shared
    assert shared.readers == ("C0", "C1", "C3")
    assert "shared by 3" in str(report)
    assert model["C0"].table("unified") is model["C3"].table("unified")
    readers = [model[k] for k in shared.readers]
    table = readers[0].table("unified")
    # The joint fit comes near the least-squares optimum, found by torch from the matrix of the lookup.
    with torch.no_grad():
        reached = sum((m.weight - dense[k]).square().sum() for k, m in zip(shared.readers, readers, strict=True))
        kept = table.clone()
        table.copy_(torch.eye(len(table))[:, : table.shape[1]])
        columns = []
        for start in range(0, len(table), table.shape[1]):
            table.zero_()
            for j in range(min(table.shape[1], len(table) - start)):
                table[start + j, j] = 1.0
            columns.append(torch.cat([m.weight + 0 for m in readers]))
        table.copy_(kept)
    width = table.shape[1]
    target = torch.cat([dense[k] for k in shared.readers])
    blocks = target.shape[1] // width
    matrix = torch.cat([torch.cat([c[:, i * width : (i + 1) * width] for c in columns], 1) for i in range(blocks)])
    matrix = matrix[:, : len(table)].double()
    wanted = torch.cat(target.double().split(width, 1))
    best = wanted - matrix @ torch.linalg.lstsq(matrix, wanted, driver="gelsd").solution
    assert float(best.square().sum()) <= float(reached) * (1 + 1e-6)
    assert float(reached) < 1.01 * float(best.square().sum())
    alone = compress_(nn.ModuleDict({"C0": nn.Embedding(500, 8, _weight=dense["C0"].clone())}), {"C0": plan["C0"]})
    assert alone["C0"].relative_error < report["C0"].relative_error < 1, "sharers press on the rows"
    # All places lead to the one table whatever replaces parameters.
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert readers[0].table("unified") is readers[2].table("unified")
    twin = copy.deepcopy(model)
    assert twin["C0"].table("unified") is twin["C1"].table("unified")
    assert twin["C0"].table("unified") is not table
    twin.to("meta").to_empty(device="cpu")
    assert twin["C0"].table("unified") is twin["C1"].table("unified")
    assert sum(p.nbytes for p in twin.parameters()) == report.bytes_after


def test_sharing_across_dtypes_or_shapes_is_refused() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(50, 8), "b": nn.Embedding(50, 8, dtype=torch.float64)})
    entry = rse.UnifiedConfig(num_rows=10)
    with pytest.raises(ConfigError, match=r"'a' and 'b' cannot share table 'unified': dtype"):
        compress_(model, rse.Plan({"a": entry, "b": entry}))
    with pytest.raises(ConfigError, match="10 x 4 for 'a' and 12 x 4 for 'b'"):
        compress_(model, rse.Plan({"a": entry, "b": rse.UnifiedConfig(num_rows=12)}))
    compress_(model, rse.Plan({"a": entry, "b": rse.UnifiedConfig(num_rows=10, table="other")}))


# -- who else holds the tables ----------------------------------------------------------------------------------------


def test_optimizers_left_behind_are_named_and_given_ones_taken_over() -> None:
    model = Model()
    stale = torch.optim.SGD([{"params": [model.user.weight]}, {"params": model.head.parameters()}], lr=0.1)
    model.optim = torch.optim.Adam(model.parameters())
    model(torch.tensor([3])).sum().backward()
    model.optim.step()
    given = model.optim
    with pytest.warns(UserWarning, match=r"SGD still holds the replaced parameters user:.*optimizer=") as caught:
        compress_(model, uniform(model, "hash"), optimizer=given)
    assert len(caught) == 1
    held = [id(p) for g in given.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in given.state} <= set(held), "no state of tables that are gone"
    assert len(given.state) == 2, "the head keeps its own"
    before = copy.deepcopy(model.state_dict())
    model.zero_grad()
    model(torch.tensor([3, 4])).sum().backward()
    given.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {"user.weight", "fields.0.weight", "fields.1.weight", "tower.0.item.weight", "head.weight"} <= moved
    with pytest.raises(ConfigError, match="SGD holds none"):
        compress_(model, uniform(model, "lowdim"), optimizer=stale)
    with pytest.warns(UserWarning, match=r"Adam \(attribute 'optim' of the model\)"):
        materialize_(model)
    del stale
    gc.collect()


def test_a_warning_turned_into_an_error_leaves_the_model_as_it_was() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="SGD"):
            compress_(model, uniform(model, "hash"))
    assert snapshot(model) == before
    del optimizer


def test_a_table_that_many_share_enters_an_optimizer_once() -> None:
    model = nn.ModuleDict({f"C{i}": nn.Embedding(50, 8) for i in range(4)})
    optimizer = torch.optim.SGD([{"params": [m.weight]} for m in model.values()], lr=0.1)
    held = [[m.weight for m in model.values()]]
    model.held = held
    compress_(model, rse.Plan(dict.fromkeys(model, rse.UnifiedConfig(num_rows=20))), optimizer=optimizer)
    (shared,) = model.parameters()
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 0, 0, 0]
    assert optimizer.param_groups[0]["params"][0] is shared
    assert [id(p) for p in held[0]] == [id(shared)]


def test_parameters_that_stay_in_use_stay_in_the_optimizer() -> None:
    model = nn.ModuleDict({f"C{i}": nn.Embedding(50, 8) for i in range(3)})
    compress_(model, rse.Plan(dict.fromkeys(model, rse.UnifiedConfig(num_rows=20))))
    optimizer = torch.optim.Adam(model.parameters())
    model["C1"](torch.arange(5)).sum().backward()
    optimizer.step()
    shared = model["C1"].table("unified")
    compress_(model, {"C0": rse.HashConfig(num_buckets=9)}, optimizer=[])
    assert optimizer.param_groups[0]["params"] == [shared]
    model["full"] = rse.FullEmbedding(30, 8)
    optimizer.add_param_group({"params": [model["full"].weight]})
    kept = model["full"].weight
    materialize_(model, include="full")
    assert model["full"].weight is kept
    assert optimizer.param_groups[1]["params"][0] is kept
    assert shared in optimizer.state


def test_shared_rows_start_as_wide_as_the_tables_together() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(4000, 8), "b": nn.Embedding(4000, 8)})
    with torch.no_grad():
        model["a"].weight.normal_(0, 0.3)
        model["b"].weight.normal_(0, 0.4)
    compress_(model, rse.Plan(dict.fromkeys("ab", rse.UnifiedConfig(num_rows=3000))), init="fresh")
    assert abs(float(model["a"].table("unified").detach().std()) - (0.125**0.5)) < 0.01


def test_changes_are_made_together_or_not_at_all() -> None:
    from recsys_embed.compress.swap import Change, apply

    done: list[str] = []

    def fails() -> None:
        done.append("half")
        raise KeyboardInterrupt

    first = Change(lambda: done.append("first"), lambda: done.append("undo first"))
    second = Change(fails, lambda: done.append("undo half"))
    with pytest.raises(KeyboardInterrupt):
        apply([first, second, first])
    assert done == ["first", "half", "undo half", "undo first"]


def test_named_and_repeated_groups_of_an_optimizer() -> None:
    model = Model()
    optimizer = torch.optim.SGD(list(model.named_parameters()), lr=0.1)
    compress_(model, uniform(model, "lowdim"), optimizer=[optimizer])
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(group["param_names"]) == len(list(model.parameters()))
    assert {"user.weight.0", "user.weight.1", "head.bias"} <= set(group["param_names"])
    model(torch.tensor([1])).sum().backward()
    optimizer.step()


def test_lists_and_dictionaries_beside_the_tree_follow() -> None:
    model = Model()
    model.tables = [model.user, model.fields[0]]
    model.by_name = {"user": model.user, "nested": [("item", model.tower[0]["item"])]}
    # As DeepCTR-Torch keeps what it regularises.
    model.regularized = [([model.user.weight, model.fields[0].weight, model.head.weight], 0.0, 1e-5)]
    model.named = [("user.weight", model.user.weight)]
    object.__setattr__(model, "alias", model.user)
    cyclic: list[Any] = [model.user]
    cyclic.append(cyclic)
    model.cyclic = cyclic
    inner = model.regularized[0][0]
    compress_(model, uniform(model, "lowdim"))
    assert model.tables == [model.user, model.fields[0]]
    assert model.by_name["user"] is model.user
    assert model.by_name["nested"][0][1] is model.tower[0]["item"]
    assert model.alias is model.user
    assert model.cyclic[0] is model.user
    assert model.regularized[0][0] is inner
    expected = [*model.user.parameters(), *model.fields[0].parameters(), model.head.weight]
    assert [id(p) for p in inner] == [id(p) for p in expected]
    assert [name for name, _ in model.named] == ["user.weight"] * 2
    model.single = {"weight": model.fields[1].table("weight")}
    with pytest.raises(ConfigError, match=r"single\['weight'\] holds the replaced fields/1, which is 2 parameters now"):
        compress_(model, {"fields/1": rse.LowdimConfig(dim=2)})


def test_failure_while_building_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    plan = uniform(model, "hash")
    before = snapshot(model)
    calls = []

    def fails(self: Any, *args: Any) -> None:
        calls.append(self)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(rse.HashEmbedding, "fit_", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        compress_(model, plan)
    assert snapshot(model) == before


# -- the weight as others read it -------------------------------------------------------------------------------------


def test_weight_reads_as_the_plain_table_with_gradients_and_refuses_writes() -> None:
    model = nn.ModuleDict({"item": nn.Embedding(30, 4, padding_idx=0)})
    compress_(model, {"item": rse.HashConfig(num_buckets=7)})
    item: Any = model["item"]
    assert item.weight.shape == (30, 4)
    assert torch.equal(item.weight, item.materialize())
    scores = torch.ones(2, 4) @ item.weight.T
    assert type(scores) is torch.Tensor
    scores.sum().backward()
    everything = item(torch.arange(30))
    wanted = torch.autograd.grad(everything.sum() * 2, [item.table("weight")])[0]
    torch.testing.assert_close(item.table("weight").grad, wanted)
    assert item.state_dict()["weight"].shape == (7, 4)
    writes: list[Any] = [
        lambda w: nn.init.xavier_uniform_(w),
        lambda w: w.data.copy_(torch.zeros(30, 4)),
        lambda w: w.data.zero_(),
        lambda w: w[1:].fill_(0),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.requires_grad_(False),
        lambda w: setattr(w, "requires_grad", False),
        lambda w: setattr(w, "data", torch.zeros(30, 4)),
        lambda w: w.detach().unbind(0)[3].add_(1),
        lambda w: w.register_hook(lambda g: g),
        lambda w: torch.add(torch.ones(30, 4), 1, out=w),
        lambda w: w.__imul__(2),
    ]
    for write in writes:
        with torch.no_grad(), pytest.raises(ConfigError, match="would change nothing"):
            write(item.weight)
    with pytest.raises((TypeError, AttributeError)):
        item.weight = torch.zeros(30, 4)
    with pytest.raises(TypeError):
        nn.Linear(4, 30).weight = item.weight
    assert isinstance(item.weight, PlainView)
    assert repr(item.weight)
    copy.deepcopy(model)


# -- back -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_materialize_undoes_all_but_the_values(method: str) -> None:
    model = Model()
    shape = repr(model)
    keys = [(k, v.shape) for k, v in model.state_dict().items()]
    compress_(model, uniform(model, method))
    ids = torch.tensor([3, 50, 99])
    out = model(ids)
    if method == "full":
        with pytest.raises(ConfigError, match="no compressed table"):
            materialize_(model)
        return
    compressed = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in model.head.parameters())
    report = materialize_(model)
    assert repr(model) == shape
    assert [(k, v.shape) for k, v in model.state_dict().items()] == keys
    assert model.again is model.user
    torch.testing.assert_close(model(ids), out, rtol=1e-5, atol=1e-6)
    assert report.bytes_after == 4 * 8 * 1000
    assert report.bytes_before >= compressed


def test_from_one_method_to_another() -> None:
    model = Model()
    compress_(model, uniform(model, "hash", 0.5))
    ids = torch.arange(100)
    report = compress_(model, uniform(model, "lowdim", 0.3))
    assert {t.kind for t in report.tables} == {"compressed"}
    assert {type(t.module) for t in find_tables(model)} == {rse.LowdimEmbedding}
    report = compress_(model, rse.Plan.full(rse.Schema.from_model(model)))
    assert all(t.action == "replaced" and t.method == "full" for t in report.tables)
    assert isinstance(model.user, nn.Embedding)
    assert model(ids).shape == (100,)


def test_budget_errors_come_from_the_plan() -> None:
    with pytest.raises(BudgetError):
        uniform(Model(), "hash", share=1e-4)
