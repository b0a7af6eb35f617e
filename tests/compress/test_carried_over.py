"""compress_: options, hooks, attributes and ids that are new, as the modules had them."""

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import recsys_embed as rse
from recsys_embed.compress import compress_, materialize_
from recsys_embed.errors import ConfigError
from tests.compress.models import Model, snapshot, uniform

# -- options and what else a module carries ---------------------------------------------------------------------------


@pytest.mark.slow
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
    compress_(model, rse.Plan.full(rse.Schema.from_model(model)))  # full tables keep them
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
    model, plan = with_user(lambda m: setattr(m, "head", nn.Linear(8, 400)))
    model.head.weight = model.user.weight
    model.head.register_state_dict_post_hook(lambda *a: None)
    with pytest.raises(ConfigError, match="output layer has _state_dict_hooks"):
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
    head = nn.Bilinear(8, 1, 400, bias=False)
    head.weight = table.weight
    return head


ORDERED = [m.name for m in rse.list_methods() if m.config_cls.order_option]


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
            assert torch.equal(store.value(0, index.name), wanted)
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
    assert all("as in torch" in t.note for t in report.tables) == (policy != "raise")


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
