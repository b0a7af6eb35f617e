"""Runs a program on every backend and holds outputs, gradients, tables and optimizer states against float64.

The oracle is the ``reference`` backend in float64, one feature and one row at a time, with ordinary gradients; rules
are applied to them here, to all rows touched (or all rows there are), so that neither kernels nor laziness take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_embed import EmbeddingCollection
from recsys_embed.features import FeatureSpec
from tests.fuzz.programs import Program, Step

BACKENDS = ("native", "torch")


class Disagreement(AssertionError):
    """Backends differ; ``what`` names the quantity without numbers: by it a smaller program is seen to fail alike."""

    def __init__(self, what: str, text: str) -> None:
        super().__init__(f"{what}: {text}")
        self.what = what


def close(what: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Raise unless float32 ``got`` is ``wanted`` up to ``tolerance``, relative to the larger of 1 and the number."""
    if got.shape != wanted.shape:
        raise Disagreement(what, f"shape {tuple(got.shape)}, not {tuple(wanted.shape)}")
    got, wanted = got.detach().double(), wanted.detach().double()
    if got.numel() == 0:
        return
    error = (got - wanted).abs() / wanted.abs().clamp_min(1.0)
    if not bool((error <= tolerance).all()):
        at = int(error.nan_to_num(torch.inf).argmax())
        pair = f"{got.reshape(-1)[at]:.7g}, not {wanted.reshape(-1)[at]:.7g}"
        raise Disagreement(what, f"{int((~(error <= tolerance)).sum())} of {got.numel()} numbers differ, e.g. {pair}")


def same(what: str, got: Tensor, wanted: Tensor) -> None:
    if not torch.equal(got, wanted):
        raise Disagreement(what, f"not the same bits: {int((got != wanted).sum())} of {wanted.numel()} numbers")


# -- ids --------------------------------------------------------------------------------------------------------------


class Jagged:
    """What a KeyedJaggedTensor says of itself, without TorchRec."""

    def __init__(self, keys: Sequence[str], values: Tensor, offsets: Tensor, weights: Tensor | None) -> None:
        self._keys, self._values, self._offsets, self._weights = list(keys), values, offsets, weights

    def keys(self) -> list[str]:
        return self._keys

    def values(self) -> Tensor:
        return self._values

    def offsets(self) -> Tensor:
        return self._offsets

    def weights_or_none(self) -> Tensor | None:
        return self._weights

    def variable_stride_per_key(self) -> bool:
        return False


@dataclass(frozen=True)
class Arguments:
    """Of one call, and the weights of ids feature after feature, where there are any."""

    given: tuple[Any, ...]
    weights: Tensor | None
    unpooled: tuple[str, Tensor] | None = None

    def __call__(self, coll: Any) -> Tensor:
        """The vectors, and after them all numbers of those of single ids, where there are such."""
        out: Tensor = coll(*self.given)
        return out if self.unpooled is None else torch.cat([out.reshape(-1), coll.lookup(*self.unpooled).reshape(-1)])


def _strided(values: Tensor) -> Tensor:
    return torch.stack([values, values + 1], -1)[..., 0]


def flat(bags: Sequence[Sequence[Sequence[int]]], step: Step) -> tuple[Tensor, Tensor]:
    """Values and offsets of the bags of some features, feature after feature."""
    dtype = torch.int32 if step.int32 else torch.int64
    values = torch.tensor([i for feature in bags for bag in feature for i in bag], dtype=dtype)
    sizes = torch.tensor([len(bag) for feature in bags for bag in feature], dtype=torch.int64)
    return _strided(values) if step.strided else values, F.pad(sizes.cumsum(0), (1, 0))


def arguments(step: Step, names: Sequence[str], dtype: torch.dtype) -> Arguments:
    """The ids of a step in its form, with weights of ``dtype``."""
    batch = len(step.ids[0])
    if step.form == "matrix":
        values, _ = flat(step.ids, step)
        return Arguments((values.view(len(names), batch).t(),), None)
    if step.form == "dict":
        return Arguments(({n: flat([bags], step) for n, bags in zip(names, step.ids, strict=True)},), None)
    order = list(range(len(names)))
    if step.form == "jagged" and step.strided:
        order.reverse()
    values, offsets = flat([step.ids[i] for i in order], step)
    weights = given = None
    if step.weights is not None:
        generator = torch.Generator().manual_seed(step.weights)
        weights = torch.randn(values.numel(), generator=generator).to(dtype).requires_grad_(bool(step.weights % 2))
        parts = weights.split([sum(map(len, bags)) for bags in step.ids])
        given = torch.cat([parts[i] for i in order])
    if step.form == "jagged":
        return Arguments((Jagged([names[i] for i in order], values, offsets, given),), weights)
    return Arguments((values, offsets, given), weights)


def every_lookup(step: Step, names: Sequence[str], dtype: torch.dtype) -> Arguments:
    """Arguments of a step and of what it looks up beside."""
    call = arguments(step, names, dtype)
    if step.unpooled is None:
        return call
    return replace(call, unpooled=(names[step.unpooled], flat([step.ids[step.unpooled]], step)[0]))


def plainest(step: Step) -> Step:
    """The same ids in the form that takes the fewest lines to read."""
    return replace(step, form="bags", int32=False, strided=False)


def direction(seed: int, shape: torch.Size) -> Tensor:
    """Gradient of the loss in the vectors of a step."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def direction_seed(program: Program, number: int) -> int:
    return 1000 * (program.seed % 10**6) + number


# -- the oracle -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Right:
    """What a step comes to: vectors, and for a gradient ``direction`` in them those by parameter and of the weights."""

    vectors: Tensor
    direction: Tensor
    grads: dict[str, Tensor]
    of_weights: Tensor | None


class Oracle:
    """The collection in float64 with its rule applied to all of its gradients in the plainest way."""

    def __init__(self, program: Program, start: EmbeddingCollection) -> None:
        self.rule = program.optimizer()
        options = {"seed": 0, "backend": "reference", "dtype": torch.float64}
        # Sparse gradients name the rows that were read.
        self.coll = EmbeddingCollection(program.schema(), program.plan(), sparse=True, **options)
        self.coll.load_state_dict(start.state_dict())
        self.lr, self.steps = 0.0 if self.rule is None else self.rule.lr, 0
        self.state: dict[str, Tensor] = {}
        if self.rule is not None:
            self.state = {k: v.double() for k, v in start.optimizer_state_dict()["state"].items()}

    def gradients(self, call: Arguments, seed: int) -> Right:
        """What a step is to come to."""
        named = dict(self.coll.named_parameters())
        out = call(self.coll)
        learns = call.weights is not None and call.weights.requires_grad
        named = {name: p for name, p in named.items() if p.requires_grad}  # some projections are frozen
        inputs = [*named.values(), *([call.weights] if learns else [])]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        w = direction(seed, out.shape)
        if out.requires_grad:
            found = torch.autograd.grad((out * w.double()).sum(), inputs, allow_unused=True)
        grads = {name: g for name, g in zip(named, found, strict=False) if g is not None}
        return Right(out.detach(), w, grads, found[-1] if learns else None)

    @torch.no_grad()
    def move(self, grads: dict[str, Tensor]) -> None:
        """One step of the rule."""
        if self.rule is None:
            return
        self.steps += 1
        for name in self.coll.storages:
            table, grad = self.coll.get_parameter(name), grads.get(name)
            # Rules that move rows without a gradient move all; what others keep of such a row may stay as it is.
            everything = self.rule.lazy
            if everything:
                rows = torch.arange(len(table))
                sums = torch.zeros_like(table) if grad is None else grad.to_dense()
            elif grad is not None:
                grad = grad.coalesce()
                rows, sums = grad.indices()[0], grad.values()
            if not everything and (grad is None or not rows.numel()):
                continue
            keys = [k for k in self.rule.tensors if k != "last"]
            state = {k: self.state[f"{name}_{k}"][rows] for k in keys}
            sums = sums + self.rule.weight_decay * table[rows]
            table[rows] = self.rule.update(table[rows].clone(), sums, state, self.lr, self.steps)
            for k in keys:
                self.state[f"{name}_{k}"][rows] = state[k]


def _reads(feature: FeatureSpec, i: int) -> bool:
    """Whether an id has a vector."""
    return i != feature.padding_idx and (0 <= i < feature.num_embeddings or feature.unseen != "zero")


def plain_vectors(feature: FeatureSpec, table: Tensor, bags: Sequence[Sequence[int]], weights: Tensor | None) -> Tensor:
    """What torch gives for a full table: nothing of this library."""
    n = feature.num_embeddings
    kept = [[i if 0 <= i < n else n for i in bag if _reads(feature, i)] for bag in bags]
    flat = torch.tensor([i for bag in kept for i in bag], dtype=torch.int64)
    offsets = F.pad(torch.tensor([len(bag) for bag in kept], dtype=torch.int64).cumsum(0), (1, 0))
    if not len(bags) or not flat.numel():
        return table.new_zeros(len(bags), table.shape[1])
    return F.embedding_bag(
        flat, table, offsets, mode=feature.pooling, per_sample_weights=weights, include_last_offset=True
    )


@torch.no_grad()
def nearly_tied(step: Step, colls: Sequence[EmbeddingCollection]) -> bool:
    """Whether rounding to float32 decides which ids of a bag are its largest, and so which rows get the gradient.

    Ids of one method's colliding rows have vectors that are equal but for the order of a sum.
    """
    if step.form == "matrix":
        return False
    for feature, bags in zip(colls[0].schema, step.ids, strict=True):
        if feature.pooling != "max":
            continue
        for bag in bags:
            ids = sorted({i for i in bag if _reads(feature, i)})
            if len(ids) < 2:
                continue
            pairs = [coll.lookup(feature.name, torch.tensor(ids)).double().topk(2, dim=0).values for coll in colls]
            gaps = torch.stack([(first - second) / first.abs().clamp_min(1.0) for first, second in pairs])
            if bool(((gaps.amin(0) < 1e-5) & (gaps.amax(0) > 0)).any()):
                return True
    return False


# -- one program ------------------------------------------------------------------------------------------------------


def build(program: Program, backend: str) -> EmbeddingCollection:
    coll = EmbeddingCollection(
        program.schema(), program.plan(), program.optimizer(), seed=0, backend=backend, sparse=program.sparse
    )
    for feature in program.features:
        if feature.counts is not None:
            generator = torch.Generator().manual_seed(feature.counts)
            n = feature.spec["num_embeddings"]
            coll.assign_({feature.spec["name"]: torch.randint(0, 1 + n, (n,), generator=generator)})
    return stepped_as(program, coll)


def stepped_as(program: Program, coll: EmbeddingCollection) -> EmbeddingCollection:
    """The collection, with a torch optimizer where the program has one."""
    coll.__dict__["at_step"] = coll.make_optimizer() if program.at_step and coll.optimizer is not None else None
    return coll


def set_rate(coll: EmbeddingCollection, lr: float | None) -> None:
    if lr is None or coll.optimizer is None:
        return
    optimizer = coll.__dict__["at_step"]
    if optimizer is None:
        coll.lr = lr
    else:
        optimizer.param_groups[0]["lr"] = lr


def take_step(coll: EmbeddingCollection) -> None:
    if coll.__dict__["at_step"] is not None:
        coll.__dict__["at_step"].step()
        coll.zero_grad()


def restarted(program: Program, coll: EmbeddingCollection, backend: str) -> EmbeddingCollection:
    """A new collection with all that checkpoints hold."""
    again = EmbeddingCollection(
        program.schema(), program.plan(), program.optimizer(), seed=7, backend=backend, sparse=program.sparse
    )
    again.load_state_dict(coll.state_dict())
    again = stepped_as(program, again)
    optimizer = again.__dict__["at_step"]
    if optimizer is not None:
        optimizer.load_state_dict(coll.__dict__["at_step"].state_dict())
    elif program.seed % 2:
        again.load_optimizer_state_dict(coll.optimizer_state_dict())
    else:
        set_rate(again, coll.lr)
    return again


def run(program: Program) -> None:
    """All checks of a program.

    Raises:
        Disagreement: says what differs.
        Exception: whatever a backend raises.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(program.threads)
    try:
        if program.few_bits:
            from tests.fuzz.few_bits import run_few_bits

            run_few_bits(program)
        else:
            _run(program)
    finally:
        torch.set_num_threads(before)


def _run(program: Program) -> None:
    names = program.schema().names
    colls = {backend: build(program, backend) for backend in BACKENDS}
    oracle = Oracle(program, colls["torch"])
    for number, step in enumerate(program.steps):
        wide, narrow = every_lookup(plainest(step), names, torch.float64), every_lookup(step, names, torch.float32)
        if nearly_tied(step, [oracle.coll, *colls.values()]):
            return
        right = oracle.gradients(wide, direction_seed(program, number))
        for backend in BACKENDS:
            if step.before == "restart":
                colls[backend] = restarted(program, colls[backend], backend)
            _step(program, step, backend, colls[backend], narrow, right)
        if step.lr is not None and oracle.rule is not None:
            oracle.lr = step.lr
        _check_plain(program, step, oracle, wide, right.vectors)
        oracle.move(right.grads)
        for backend in BACKENDS:
            _check_tables(f"{backend} after a step", oracle, colls[backend])
    from tests.fuzz.beside import check_beside

    check_beside(program, colls["native"])


def _step(
    program: Program,
    step: Step,
    backend: str,
    coll: EmbeddingCollection,
    call: Arguments,
    right: Right,
) -> None:
    wanted, grads, of_weights = right.vectors, right.grads, right.of_weights
    if step.before == "look":
        close(f"{backend} vectors in evaluation", call(coll.eval()), wanted, 1e-4 if program.rule else 2e-5)
        coll.train()
    set_rate(coll, step.lr)
    coll.zero_grad()
    if call.weights is not None:
        call.weights.grad = None
    out = call(coll)
    close(f"{backend} vectors", out, wanted, 1e-4 if program.rule else 2e-5)
    if not out.requires_grad:
        return
    (out * right.direction).sum().backward()
    for name, p in coll.named_parameters():
        at_step = coll.__dict__["at_step"] is not None
        # Half of the steps come without anything having read the gradients.
        if name in coll.storages and coll.optimizer is not None and (not at_step or program.seed % 2):
            continue
        right_grad = grads.get(name)
        if p.grad is None and right_grad is not None and right_grad.to_dense().any():
            raise Disagreement(f"{backend} gradient", f"none of {name}")
        if p.grad is not None:
            right_dense = torch.zeros_like(p, dtype=torch.float64) if right_grad is None else right_grad.to_dense()
            close(f"{backend} gradient", p.grad.to_dense(), right_dense, 2e-4)
            if program.sparse and name in coll.storages and p.grad.is_sparse and right_grad is not None:
                rows, right_rows = p.grad.coalesce().indices(), right_grad.coalesce().indices()
                same(f"{backend} rows of the sparse gradient", rows, right_rows)
    take_step(coll)
    if of_weights is not None:
        found = call.weights.grad if call.weights is not None else None
        close(
            f"{backend} gradient of weights",
            torch.zeros(of_weights.shape) if found is None else found,
            of_weights,
            2e-4,
        )


def _check_plain(program: Program, step: Step, oracle: Oracle, call: Arguments, wanted: Tensor) -> None:
    """The oracle itself, where torch can say what is right."""
    widths, batch = oracle.coll.bundle.widths, len(step.ids[0])
    columns = wanted.reshape(-1)[: batch * sum(widths)].view(batch, sum(widths)).split(widths, 1)
    sizes = [sum(map(len, bags)) for bags in step.ids]
    parts = None if call.weights is None else call.weights.detach().split(sizes)
    for i, feature in enumerate(program.features):
        # Unseen ids that hash would need the library's hash.
        if feature.method != "full" or feature.spec.get("unseen") == "hash":
            continue
        spec = feature.make()
        table = oracle.coll.table(f"{spec.table_name}.weight").detach()
        weights = None if parts is None else _seen(spec, step.ids[i], parts[i])
        close("reference vectors beside torch's", columns[i], plain_vectors(spec, table, step.ids[i], weights), 1e-12)


def _seen(spec: FeatureSpec, bags: Sequence[Sequence[int]], weights: Tensor) -> Tensor:
    return weights[torch.tensor([_reads(spec, i) for bag in bags for i in bag], dtype=torch.bool)]


def _check_tables(where: str, oracle: Oracle, coll: EmbeddingCollection) -> None:
    if oracle.rule is None:
        return
    saved = coll.optimizer_state_dict()["state"]  # brings rows up to date
    for name in coll.storages:
        close(f"{where}: tables", coll.get_parameter(name), oracle.coll.get_parameter(name), 5e-4)
    for key, value in oracle.state.items():
        if not key.endswith("_last"):
            close(f"{where}: optimizer state {key.partition('_')[2]}", saved[key], value, 1e-3)
