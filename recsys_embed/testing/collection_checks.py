"""What a method must do beside others in a collection."""

from __future__ import annotations

from dataclasses import replace

import torch

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.errors import RecsysEmbedError
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.optim import SGD, Adam, unfused_parameters
from recsys_embed.plan import Plan
from recsys_embed.planning.costs import Costs
from recsys_embed.registry import MethodInfo
from recsys_embed.report.memory import memory_report
from recsys_embed.testing.helpers import ROWS, WIDTH, example, poisoned_memory


def runs_in_a_collection(method: MethodInfo) -> None:
    schema = Schema([FeatureSpec("a", ROWS, WIDTH), FeatureSpec("b", 50, WIDTH), FeatureSpec("c", 999, WIDTH)])
    need = {s.name: method.config_cls.sized(s, 1).footprint(s).serve for s in schema}
    plan = Plan({s.name: method.config_cls.for_budget(s, max(need[s.name], s.num_embeddings * 16)) for s in schema})
    try:
        collection = EmbeddingCollection(schema, plan)
    except RecsysEmbedError:  # features that share a table must agree in its size
        plan = Plan.uniform(schema, method.name, budget=max(sum(need.values()), 1452 * 16))
        collection = EmbeddingCollection(schema, plan)
    ids = torch.tensor([[402, 49, 998], [0, 0, 0]])
    out = collection(ids)
    vectors = sum(plan[s.name].program(s).vectors for s in schema)
    assert out.shape == (2, vectors, WIDTH), f"a collection must give (2, {vectors}, {WIDTH}); got {tuple(out.shape)}"
    torch.testing.assert_close(out, EmbeddingCollection(schema, plan, backend="reference")(ids))
    torch.testing.assert_close(collection(ids.T.reshape(-1), torch.arange(7)), out)
    with poisoned_memory():
        fused = EmbeddingCollection(schema, plan, optimizer=SGD(lr=0.1))
    out.square().sum().backward()
    fused(ids).square().sum().backward()
    for name, p in collection.named_parameters():
        after = fused.get_parameter(name)
        expected = p - 0.1 * p.grad if p.grad is not None and name in fused.storages else p
        torch.testing.assert_close(after, expected, msg=f"{name}: a fused step must equal a plain one")
        if after.requires_grad and name not in fused.storages:
            torch.testing.assert_close(after.grad, p.grad)


def _mixed(method: MethodInfo, width: int) -> tuple[Schema, Plan]:
    """The method beside full tables of a width."""
    schema = Schema(
        [FeatureSpec("plain", 50, width), FeatureSpec("embedding", ROWS, WIDTH), FeatureSpec("last", 9, width)]
    )
    plain = Plan.full(schema)
    return schema, Plan({**plain.configs, "embedding": example(method).config})


def stands_beside_others_in_a_collection(method: MethodInfo) -> None:
    ids = torch.tensor([[49, 402, 8], [0, 0, 0], [3, 7, 1]])
    for width in (WIDTH, WIDTH + 4):
        schema, plan = _mixed(method, width)
        for backend in ("auto", "torch", "reference"):
            collection = EmbeddingCollection(schema, plan, backend=backend)
            module = method.embedding_cls(
                ROWS, WIDTH, config=plan["embedding"], init=schema["embedding"].init, mode="sum"
            )
            own = module(ids[:, 1:2])
            plain, last = (collection.table(f"{n}.weight")[ids[:, i]] for n, i in (("plain", 0), ("last", 2)))
            wanted = torch.cat([plain, own, last], 1)
            for out in (collection(ids), collection(ids.T.reshape(-1), torch.arange(10))):
                where = f"beside full tables of width {width}, backend {backend!r}"
                assert out.numel() == wanted.numel(), f"{where}: expected {wanted.shape[1]} columns, got {out.shape}"
                torch.testing.assert_close(out.flatten(1), wanted, msg=f"{where}: other vectors than alone")


def shares_a_table_and_skips_padding(method: MethodInfo) -> None:
    """Features of one table read the same rows, once in a step; padding reads none, in bags and unpooled."""
    config, pad = example(method).config, 7
    spec = FeatureSpec("embedding", ROWS, WIDTH, init="normal:1")
    history = replace(spec, name="history", pooling="mean", table="embedding", padding_idx=pad)
    schema, alone = Schema([spec, history]), Schema([spec])
    ids, kept = torch.tensor([[402, 31], [3, pad]]), torch.tensor([402, 3, 31])
    for backend in ("auto", "torch", "reference"):
        collection = EmbeddingCollection(schema, Plan(dict.fromkeys(schema.names, config)), backend=backend)
        single = EmbeddingCollection(alone, Plan({"embedding": config}), backend=backend)
        assert collection.footprint() == single.footprint(), "a table of two features must be stored once"
        out, wanted = collection(ids).flatten(1), single(kept.unsqueeze(1)).flatten(1)
        width = wanted.shape[1]
        torch.testing.assert_close(out[:, :width], wanted[:2], msg="a shared table gives other vectors than alone")
        torch.testing.assert_close(out[0, width:], wanted[2], msg="a second reader gets other vectors")
        assert not out[1, width:].any(), "padding must give zeros"
        pooled = collection(torch.tensor([402, 3, pad, 31, pad]), torch.tensor([0, 1, 2, 4, 5])).flatten(1)
        torch.testing.assert_close(pooled[:, width:], out[:, width:], msg="bags must skip padding, in means as well")
        each = collection.lookup("history", torch.tensor([[31, pad]]))
        torch.testing.assert_close(each.flatten(1), out[:, width:].reshape(1, -1), msg="unpooled vectors differ")
        out.square().sum().backward()
        wanted.square().sum().backward()
        for (name, p), other in zip(collection.named_parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(p.grad, other.grad, msg=f"{name}: gradients of two readers must add up")


def training_bytes_agree(method: MethodInfo) -> None:
    schema, plan = _mixed(method, WIDTH)
    for optimizer in (SGD(lr=0.1), Adam(lr=0.1)):
        collection = EmbeddingCollection(schema, plan, optimizer)
        collection(torch.tensor([[49, 402, 8]])).square().sum().backward()
        held = collection.footprint().train
        dense = sum(p.nbytes for p in unfused_parameters(collection))
        state = [v for k, v in collection.named_buffers() if k.startswith(collection.storages)]
        index = sum(i.nbytes for s in schema for i in plan[s.name].program(s).indexes)
        allocated = sum(t.nbytes for t in [*collection.parameters(), *state]) + dense + index
        said = {
            "the collection": held,
            "the plan's arithmetic": Costs(optimizer, train=True).plan(plan, schema),
            "the plan's report": memory_report(plan, schema=schema, optimizer=optimizer).total("train"),
            "the collection's report": memory_report(collection).total("train"),
        }
        wrong = {who: n for who, n in said.items() if n != allocated}
        assert not wrong, f"{type(optimizer).__name__} trains on {allocated} bytes; {wrong}"
