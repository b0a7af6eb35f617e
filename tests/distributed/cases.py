"""What the worker processes run: each case compares a sharded model with an unsharded one in the same process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

import recsys_embed as rse
from recsys_embed.optim import unfused_parameters
from recsys_embed.sharding import CompressedEBC, ManagedEBC, Optimizers, ShardableCollection, load, save, shard
from recsys_embed.sharding.sharders import splits_by_row

SIZES = {"C1": 1000, "C2": 5000, "C3": 70, "C4": 300}
RULES: dict[str, Any] = {
    "sgd": rse.SGD(lr=0.02),
    "adagrad": rse.Adagrad(lr=0.02),
    "rowwise_adagrad": rse.RowwiseAdagrad(lr=0.02),
    "adam": rse.Adam(lr=0.02),
}


def schema_for(
    dims: tuple[int, ...] = (16,), pooling: tuple[str, ...] = ("sum",), shared: bool = False, **options: Any
) -> rse.Schema:
    """``shared``: the last feature reads the table of the second."""
    whole = rse.Schema(
        [
            rse.FeatureSpec(
                n, size, dims[i % len(dims)], pooling=pooling[i % len(pooling)], init="uniform:0.5", **options
            )
            for i, (n, size) in enumerate(SIZES.items())
        ]
    )
    if not shared:
        return whole
    second, last = whole["C2"], whole["C4"]
    last = replace(second, name="C4", pooling=last.pooling, table="C2")
    return rse.Schema([whole["C1"], second, whole["C3"], last])


def plan_for(schema: rse.Schema, method: str, **options: Any) -> rse.Plan:
    if options or method == "full":
        return rse.Plan.uniform(schema, method, **options)
    # Of tiers in few bits that would leave no ids to the last.
    mixed = rse.get_method(method).config_cls.has_own_precisions
    return rse.Plan.uniform(schema, method, budget="75KiB" if mixed else "120KiB", full_below=100)


def found_plan(schema: rse.Schema, method: str) -> rse.Plan:
    """Such as a search leaves: with sets of the ids it kept, in no order, and widths or columns of their own."""
    from recsys_embed.search.extract import choose, make_plan
    from recsys_embed.search.pruning import FieldBlocks, choose_elements

    g = torch.Generator().manual_seed(4)
    chosen = {}
    for spec in schema:
        ids, width = spec.num_ids, spec.embedding_dim
        if method == "optembed":
            chosen[spec.name] = choose(spec, torch.rand(ids, generator=g) < 0.4, width // 2, "oov")
        elif method == "pep":
            chosen[spec.name] = choose_elements(spec, torch.rand(ids, width, generator=g) < 0.2, "zero")
        else:
            order, sizes = torch.randperm(ids, generator=g), [ids // 3, ids - ids // 3]
            blocks = FieldBlocks(spec, sizes, list(order.split(sizes)), order, torch.zeros(2, width))
            chosen[spec.name] = blocks.choose(torch.rand(2, width, generator=g) < 0.5, "oov")
    return make_plan(schema, chosen)


def single(seed: int, batch: int = 24) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, n, (batch,), generator=g) for n in SIZES.values()], 1)


def jagged(seed: int, batch: int = 12, weighted: bool = False) -> KeyedJaggedTensor:
    """Bags of 0 to 4 ids, features in another order than the schema's."""
    g = torch.Generator().manual_seed(seed)
    names = list(SIZES)[::-1]
    lengths = torch.randint(0, 5, (len(names), batch), generator=g)
    values = [torch.randint(0, SIZES[n], (int(lengths[i].sum()),), generator=g) for i, n in enumerate(names)]
    total = int(lengths.sum())
    weights = torch.rand(total, generator=g) if weighted else None
    return KeyedJaggedTensor(names, torch.cat(values), weights=weights, lengths=lengths.view(-1))


def joined(parts: list[Any]) -> Any:
    """Batches of all ranks as one: a step of the unsharded collection."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    names = parts[0].keys()
    held = [p.to_dict() for p in parts]
    weights = None
    if parts[0].weights_or_none() is not None:
        weights = torch.cat([h[n].weights() for n in names for h in held])
    values, lengths = ([getattr(h[n], kind)() for n in names for h in held] for kind in ("values", "lengths"))
    return KeyedJaggedTensor(names, torch.cat(values), weights=weights, lengths=torch.cat(lengths))


def kinds_for(collection: ShardableCollection, kind: str | None, world: int) -> Any:
    """``"mixed"``: the kinds in turn over the tables."""
    if kind != "mixed":
        return kind
    turns = ["table_wise", "row_wise", "data_parallel"]
    if not isinstance(collection.optimizer, rse.RowwiseAdagrad):
        turns.append("column_wise")
    chosen = {key: turns[i % len(turns)] for i, key in enumerate(collection.physical_tables)}
    small = {k for k, physical in collection.physical_tables.items() if not splits_by_row(physical, world)}
    return {k: "table_wise" if k in small and kind == "row_wise" else kind for k, kind in chosen.items()}


def loss_of(out: Tensor, seed: int) -> Tensor:
    """A loss whose gradient differs for every element, so that nothing cancels."""
    g = torch.Generator().manual_seed(seed)
    return (out * torch.rand(out.shape, generator=g)).sum() + out.square().sum()


def parity(
    group: Any,
    rank: int,
    world: int,
    method: str,
    kind: str | None,
    pool: str = "tables",
    rule: str = "sgd",
    form: str = "single",
    dims: tuple[int, ...] = (16,),
    pooling: tuple[str, ...] = ("sum",),
    steps: int = 3,
    weighted: bool = False,
    device: str = "meta",
    options: dict[str, Any] | None = None,
    spec: dict[str, Any] | None = None,
    found: bool = False,
) -> dict[str, Any]:
    """Forward before training, differences after, and what did not move."""
    schema = schema_for(dims, pooling, **(spec or {}))
    plan = found_plan(schema, method) if found else plan_for(schema, method, **(options or {}))
    optimizer = RULES[rule]
    whole = rse.EmbeddingCollection(schema, plan, optimizer, seed=3, backend="torch")
    coll = ShardableCollection(schema, plan, optimizer, seed=3, pool=pool, weighted=weighted, device=device)
    model = shard(coll, kinds_for(coll, kind, world), group=group)
    make: Any = single if form == "single" else lambda seed: jagged(seed, weighted=weighted)
    optimizers = Optimizers(model, lambda params: torch.optim.SGD(params, lr=0.02))
    before = snapshot(coll)
    ordinary = unfused_parameters(whole)
    dense = torch.optim.SGD(ordinary, lr=0.02) if ordinary else None
    first = (model(make(rank)), whole(make(rank)))
    equal = torch.equal(*first)
    start = float((first[0] - first[1]).abs().max())
    for step in range(steps):
        loss_of(model(make(10 * step + rank)), rank).backward()
        optimizers.step()
        optimizers.zero_grad()
        parts = [make(10 * step + r) for r in range(world)]
        outs = whole(joined(parts)).chunk(world)
        (sum(loss_of(out, r) for r, out in enumerate(outs)) / world).backward()
        if dense is not None:
            dense.step()
            dense.zero_grad()
    after, expected = model(make(77 + rank)), whole(make(77 + rank))
    moved = snapshot(coll)
    return {
        "equal": equal,
        "start": start,
        "after": float((after - expected).abs().max()),
        "moved": float((expected - first[1]).abs().max()),
        "still": sorted(k for k in before if torch.equal(before[k], moved[k])),
        "shape": list(after.shape) == list(expected.shape),
    }


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter here by name; shards of a table are told apart by where they begin."""
    found = {n: p.detach().clone() for n, p in model.named_parameters() if p.numel()}
    for coll in [m for m in model.modules() if isinstance(m, ShardableCollection)]:
        found |= {f"{s.physical.key} {s.row} {s.column}": s.tensor.clone() for s in coll.shards() if s.tensor.numel()}
    return found


def torchrec_model(name: str, ebc: nn.Module) -> nn.Module:
    """TorchRec's own model, built as for an EmbeddingBagCollection."""
    from torchrec.models.deepfm import SimpleDeepFMNN
    from torchrec.models.dlrm import DLRM, DLRM_DCN

    torch.manual_seed(5)
    if name == "deepfm":
        return SimpleDeepFMNN(4, ebc, hidden_layer_size=8, deep_fm_dimension=3)
    options: dict[str, Any] = {
        "dense_in_features": 4,
        "dense_arch_layer_sizes": [8, 16],
        "over_arch_layer_sizes": [8, 1],
    }
    if name == "dlrm_dcn":
        return DLRM_DCN(ebc, dcn_num_layers=2, dcn_low_rank_dim=4, **options)
    return DLRM(ebc, **options)


def torchrec_models(group: Any, rank: int, world: int, name: str, method: str, kind: str) -> dict[str, Any]:
    """A model of TorchRec over a compressed collection, sharded, beside itself unsharded in one process."""
    schema = schema_for()
    plan = plan_for(schema, method)
    rule = rse.SGD(lr=0.05)
    whole = torchrec_model(name, CompressedEBC(schema, plan, seed=3))
    ebc = CompressedEBC(schema, plan, rule, seed=3, device="meta")
    model = shard(torchrec_model(name, ebc), kinds_for(ebc.collection, kind, world), group=group)
    optimizers = Optimizers(model, lambda params: torch.optim.SGD(params, lr=0.05))
    single_process = torch.optim.SGD(whole.parameters(), lr=0.05)

    def batch(seed: int) -> tuple[Tensor, KeyedJaggedTensor]:
        return torch.randn(12, 4, generator=torch.Generator().manual_seed(seed)), jagged(seed)

    before = snapshot(model)
    start = [m(*batch(rank)) for m in (model, whole)]
    for step in range(3):
        parts = [batch(10 * step + r) for r in range(world)]
        loss_of(model(*parts[rank]), rank).backward()
        optimizers.step()
        optimizers.zero_grad()
        outs = whole(torch.cat([d for d, _ in parts]), joined([k for _, k in parts])).chunk(world)
        (sum(loss_of(out, r) for r, out in enumerate(outs)) / world).backward()
        single_process.step()
        single_process.zero_grad()
    end = [m(*batch(77 + rank)) for m in (model, whole)]
    moved = snapshot(model)
    return {
        "start": float((start[0] - start[1]).abs().max()),
        "after": float((end[0] - end[1]).abs().max()),
        "moved": float((end[1] - whole(*batch(rank))).abs().max() + (start[1] - whole(*batch(rank))).abs().max()),
        "still": sorted(k for k in before if torch.equal(before[k], moved[k])),
    }


class Net(nn.Module):
    """A collection and a dense layer."""

    def __init__(self, collection: Any) -> None:
        super().__init__()
        self.embedding = collection
        torch.manual_seed(1)
        self.top = nn.Linear(collection.output_dim, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.top(self.embedding(ids).tanh().sum(1)).squeeze(-1)


def net(
    kind: str, method: str, rule: str, pool: str, group: Any, world: int, seed: int = 3, dim: int = 16
) -> tuple[Any, Optimizers]:
    schema = schema_for((dim,))
    coll = ShardableCollection(schema, plan_for(schema, method), RULES[rule], pool=pool, seed=seed, device="meta")
    model = shard(Net(coll), kinds_for(coll, kind, world), group=group)
    return model, Optimizers(model, lambda params: torch.optim.Adam(params, lr=0.01))


def step(model: nn.Module, optimizers: Any, seed: int, rank: int, world: int) -> None:
    """One step on 48 samples whoever shares them."""
    ids = single(seed, 48)
    wanted = torch.rand(48, generator=torch.Generator().manual_seed(seed))
    mine = slice(48 * rank // world, 48 * (rank + 1) // world)
    loss = (model(ids[mine]) - wanted[mine]).square().sum() * world / 48
    loss.backward()
    optimizers.step()
    optimizers.zero_grad()


def save_net(group: Any, rank: int, world: int, folder: str, **form: Any) -> tuple[Tensor, Tensor]:
    """Train, save, and return the outputs then and one step later."""
    model, optimizers = net(group=group, world=world, **form)
    for seed in range(3):
        step(model, optimizers, seed, rank, world)
    save(folder, model, optimizers, extra={"note": world}, group=group)
    then = model(single(99)).detach()
    step(model, optimizers, 50, rank, world)
    return then, model(single(99)).detach()


def load_net(group: Any, rank: int, world: int, folder: str, **form: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The same from a checkpoint, in a model that starts from other weights."""
    model, optimizers = net(group=group, world=world, seed=8, **form)
    with torch.no_grad():
        model.module.top.weight.zero_()
    extra = load(folder, model, optimizers, group=group)
    then = model(single(99)).detach()
    step(model, optimizers, 50, rank, world)
    return then, model(single(99)).detach(), extra


def uneven(group: Any, rank: int, world: int, pool: Any, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Bags of a batch of another size on every process, sharded by rows, and the same unsharded."""
    schema = schema_for()
    whole, ours = (
        ShardableCollection(schema, plan_for(schema, "full"), RULES["rowwise_adagrad"], pool=pool, seed=1) for _ in "ab"
    )
    sharded = shard(torch.nn.ModuleDict({"c": ours}), "row_wise", group=group).module["c"]
    bags = jagged(rank, batch=max(1, sizes[rank]))
    wanted = whole(bags).detach()
    if not sizes[rank]:
        none = torch.zeros(0, dtype=torch.int64)
        bags, wanted = KeyedJaggedTensor(bags.keys(), none, lengths=none), wanted[:0]
    found = sharded(bags)
    if pool == "ids":
        found.sum().backward()
    return found.detach(), wanted


def save_and_die(group: Any, rank: int, world: int, folder: str, **form: Any) -> None:
    """The second process fails after the files of the first are written."""
    from torch.distributed.checkpoint import FileSystemWriter

    model, optimizers = net(group=group, world=world, **form)
    if rank == 1:

        def fail(*_: Any, **__: Any) -> None:
            raise OSError("the disk is full")

        FileSystemWriter.write_data = fail
    save(folder, model, optimizers, group=group)


def train_run(group: Any, rank: int, world: int, data: str, settings: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A run of the training command on all processes."""
    from recsys_embed.data import open_dataset
    from recsys_embed.sharding.run import run_sharded
    from recsys_embed.train.config import TrainConfig

    outcome = run_sharded(TrainConfig.from_dict(settings), open_dataset(data), **options)
    return outcome.result.to_dict()


def metrics_of_parts(group: Any, rank: int, world: int, scores: Tensor, labels: Tensor, ends: list[int]) -> Any:
    """Exact metrics over uneven parts of known predictions."""
    from recsys_embed.sharding.process_group import global_metrics
    from recsys_embed.train.metrics import BinaryMetrics

    mine = BinaryMetrics()
    part = slice(ends[rank], ends[rank + 1])
    if ends[rank] < ends[rank + 1]:
        mine.update(scores[part], labels[part])
    return global_metrics(mine, torch.device("cpu"))


def stop_in(group: Any, rank: int, world: int, data: str, settings: dict[str, Any], **options: Any) -> str:
    """One process gets SIGTERM in the middle of training; all stop at the same step, with a checkpoint."""
    import os
    import signal

    from recsys_embed.sharding.trainer import ShardedTrainer
    from recsys_embed.train.stop_request import Interrupted

    real, seen = ShardedTrainer._step, []

    def step_and_stop(self: Any, batch: Any) -> float:
        seen.append(1)
        if rank == 2 and len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch)

    ShardedTrainer._step = step_and_stop  # type: ignore[method-assign]
    try:
        train_run(group, rank, world, data, settings, **options)
    except Interrupted as e:
        return str(e)
    finally:
        ShardedTrainer._step = real  # type: ignore[method-assign]
    return "not stopped"


def bytes_held(group: Any, rank: int, world: int, method: str, kind: Any, rule: str) -> dict[str, int]:
    """Bytes of this rank's shards and optimizer state, and what the placement of the very same plan predicts."""
    from recsys_embed.sharding.placement import Cluster, place

    schema = schema_for()
    plan = plan_for(schema, method)
    coll = ShardableCollection(schema, plan, RULES[rule], device="meta")
    kinds = kinds_for(coll, kind, world)
    cluster = Cluster(world, device="cpu", batch_size=512)
    predicted = place(schema, plan, cluster, optimizer=RULES[rule], kinds=kinds)
    model = shard(coll, kinds, group=group, topology=cluster.topology())
    optimizers = Optimizers(model, lambda params: torch.optim.SGD(params, lr=0.1))
    held = sum(s.tensor.nbytes for s in coll.shards())
    for states in optimizers.fused.state_dict()["state"].values():
        for values in states.values():
            held += sum(s.tensor.nbytes for s in values.local_shards())
    for table in optimizers.tables:
        for group_ in table.param_groups:
            for parameter in group_["params"]:
                held += sum(v.nbytes for v in table.state_of(parameter).values() if isinstance(v, Tensor))
    return {"weights": held, "predicted": predicted.weights[rank]}


def unbounded(seed: int, batch: int = 40, values: int = 60) -> KeyedJaggedTensor:
    """One id per sample and feature, of any 64 bits; which ones are frequent drifts with the seed."""
    g = torch.Generator().manual_seed(seed)
    known = torch.randint(-(2**62), 2**62, (2, 4000), generator=torch.Generator().manual_seed(1))
    picks = (torch.rand(2, batch, generator=g).square() * values).long() + 5 * seed
    return KeyedJaggedTensor(["u", "v"], known.gather(1, picks).view(-1), lengths=torch.ones(2 * batch).long())


def owners_and_rows(ebc: ManagedEBC) -> dict[str, tuple[Tensor, Tensor, list[Tensor]]]:
    """Per table: the id that owns each local row, its weights, and its optimizer state."""
    found = {}
    mcc, bags = ebc.managed._managed_collision_collection, ebc.managed._embedding_module.embedding_bags
    for table, module in mcc._managed_collision_modules.items():
        weight = bags.get_parameter(f"{table}.weight").detach()
        owner = torch.empty(len(weight), dtype=torch.int64)
        owner[module._mch_remapped_ids_mapping - module._output_global_offset] = module._mch_sorted_raw_ids
        if hasattr(ebc.managed, "_table_to_tbe_and_index"):
            kernel, index = ebc.managed._table_to_tbe_and_index[table]
            states = [s.view(len(weight), -1) for s in kernel.split_optimizer_states()[int(index)]]
        else:
            held = bags[table].weight
            optimizers = [*getattr(held, "_in_backward_optimizers", []), *ebc.watched_optimizers]
            states = [v for o in optimizers for v in o.state[held].values() if isinstance(v, Tensor) and v.dim()]
        found[table] = (owner, weight.clone(), [s.reshape(len(weight), -1).clone() for s in states])
    return found


def exchanges(before: Any, after: Any) -> dict[str, int]:
    """Checks rows across a forward in training: new owners start afresh, the others keep everything."""
    passed = {"kept": 0, "renewed": 0}
    for table, (owner, weight, states) in after.items():
        old_owner, old_weight, old_states = before[table]
        same = owner == old_owner
        assert torch.equal(weight[same], old_weight[same])
        for state, old in zip(states, old_states, strict=True):
            assert torch.equal(state[same], old[same])
            assert not state[~same].any()
        assert bool((weight[~same] != old_weight[~same]).any(1).all())
        passed["kept"] += int(same.sum())
        passed["renewed"] += int((~same).sum())
    return passed


def managed_rows(
    group: Any, rank: int, world: int, rule: str, policy: str, steps: int = 12, form: str = "sharded"
) -> dict[str, Any]:
    schema = rse.Schema([rse.FeatureSpec("u", 32, 8, init="uniform:0.5"), rse.FeatureSpec("v", 48, 8, pooling="mean")])
    ebc = ManagedEBC(schema, RULES[rule], policy=policy, interval=2, seed=1)
    model: Any = ebc
    if form == "sharded":
        model = shard(nn.ModuleDict({"ebc": ebc}), group=group).module["ebc"]
        ebc = model
    elif form == "in_backward":
        ebc.optimize()
    optimizer = ebc.watch(torch.optim.Adam(ebc.parameters(), lr=0.05)) if form == "watched" else None
    total = {"kept": 0, "renewed": 0, "trained": 0}
    for number in range(steps):
        before = owners_and_rows(ebc)
        out = model(unbounded(world * number + rank))
        passed = exchanges(before, owners_and_rows(ebc)) if number > 1 else {}
        total = {k: n + passed.get(k, 0) for k, n in total.items()}
        loss_of(out.values(), number).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        total["trained"] += sum(int(s.any()) for *_, states in owners_and_rows(ebc).values() for s in states)
    model.eval()
    again = [model(unbounded(3)).values().detach().clone() for _ in range(2)]
    frozen = owners_and_rows(ebc)
    model(unbounded(99))
    exchanges(frozen, owners_and_rows(ebc))
    now = owners_and_rows(ebc)
    same_owner = all(torch.equal(now[table][0], owner) for table, (owner, *_) in frozen.items())
    return {**total, "stable": torch.equal(*again), "frozen": same_owner, "out": again[0]}


def managed_checkpoint(group: Any, rank: int, world: int, folder: str, reads: bool) -> Tensor:
    """Trains and saves, or reads into a model that starts elsewhere; what known ids then give."""
    ebc = ManagedEBC(rse.Schema([rse.FeatureSpec("u", 32, 8), rse.FeatureSpec("v", 48, 8)]), RULES["adagrad"],
                     interval=1, seed=7 if reads else 1)  # fmt: skip
    model: Any = shard(nn.Sequential(ebc, KeyedLinear()), group=group)
    optimizers = Optimizers(model, lambda params: torch.optim.SGD(params, lr=1e-4))
    for number in range(0 if reads else 6):
        loss_of(model(unbounded(world * number + rank)), number).backward()
        optimizers.step()
        optimizers.zero_grad()
    if reads:
        load(folder, model, optimizers, group=group)
    else:
        save(folder, model, optimizers, group=group)
    return model.eval()(unbounded(4)).detach()


class KeyedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 1)

    def forward(self, vectors: Any) -> Tensor:
        return self.layer(vectors.values())


def search_run(group: Any, rank: int, world: int, data: str, settings: dict[str, Any], storage: str) -> int:
    """A worker of a study: its first process asks and reports, all train; a trial that cannot be is one that failed."""
    import optuna

    from recsys_embed.data import open_dataset
    from recsys_embed.errors import BudgetError
    from recsys_embed.sharding.run import run_sharded
    from recsys_embed.sharding.study_trials import search_together
    from recsys_embed.train.config import TrainConfig

    trained = []

    def train(config: TrainConfig) -> Any:
        outcome = run_sharded(config, open_dataset(data), save_model=False)
        trained.append(config.learning_rate)
        return outcome

    def lead(run: Any) -> None:
        study = optuna.load_study(study_name="s", storage=study_storage(storage))

        def objective(trial: Any) -> float:
            rate = trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)
            budget = "8B" if len(trained) == 1 and not trial.study.user_attrs.get("failed") else "20KiB"
            trial.study.set_user_attr("failed", budget == "8B" or bool(trial.study.user_attrs.get("failed")))
            config = TrainConfig.from_dict({**settings, "learning_rate": rate, "budget": budget})
            return run(config).result.test.auc

        study.optimize(objective, n_trials=3, catch=(BudgetError,))

    search_together(lead, train)
    return len(trained)


def study_storage(path: str) -> Any:
    import optuna

    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path))


def refusal(group: Any, rank: int, world: int, settings: dict[str, Any], rows: int, label: float | None) -> str:
    """What a run on all processes says of its rows; ``label`` is put into the last one, which no first look sees."""
    from recsys_embed.data import RowSource
    from recsys_embed.errors import ConfigError, DataError
    from recsys_embed.sharding import process_group
    from recsys_embed.sharding.run import run_sharded
    from tests.train.toy import ToySource, toy_config

    data = ToySource(rows, memory_limit=0)
    if label is not None:
        data.toy.parts["train"].label[-1] = label
        RowSource.check_values = lambda self, **_: None  # type: ignore[method-assign]
    process_group._inside.append(True)  # an error would end the worker
    try:
        run_sharded(toy_config(model="dnn", epochs=1, **settings), data)
    except (ConfigError, DataError) as e:
        return f"{type(e).__name__}: {e}"
    finally:
        process_group._inside.pop()
    return "trained"
