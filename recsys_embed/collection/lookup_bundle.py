"""From ids of all features to vectors of all features: gathers by group, heads, and the modules that run themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_embed.collection.bags import Bags, pick
from recsys_embed.collection.batched_lookup import BATCHED_LOOKUPS, BatchedFeatures, BatchedLookup
from recsys_embed.collection.feature_lookups import FeatureLookups
from recsys_embed.collection.first_readers import by_first_reader
from recsys_embed.collection.generated_rows import GeneratedLookup
from recsys_embed.collection.head_tables import HeadTables, TensorOptions
from recsys_embed.collection.torch_features import features_for_torch, readers_of_shared_places
from recsys_embed.embedding.compressed_embedding import CompressedEmbedding
from recsys_embed.errors import UnknownNameError, raise_faults, unknown_name
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.kernels.distinct_ids import DistinctIds, distinct_ids
from recsys_embed.kernels.id_checks import given_ids
from recsys_embed.kernels.indexes import first_of_equals
from recsys_embed.kernels.native.autograd import NativeStep
from recsys_embed.kernels.native.masks import MaskParameters
from recsys_embed.kernels.places import Gather, Place, absent_ids
from recsys_embed.kernels.pooling import pool_vectors
from recsys_embed.kernels.reference import ReferenceLookup
from recsys_embed.kernels.unseen_ids import UnseenIds, with_unseen
from recsys_embed.kernels.vectorised import VectorisedLookup
from recsys_embed.plan import Plan, table_key
from recsys_embed.registry import get_method
from recsys_embed.utils.types import FeatureIds


def _own(name: str) -> str:
    """Keeps features called "items" or "type" apart from the attributes of the dictionary that holds their modules."""
    return "feature_" + name


class LookupBundle(FeatureLookups):
    """The lookups of all features of a schema.

    Features whose rows kernels gather form groups; a feature whose method computes (``config.computes``) is a module
    of its own. Outputs come back in schema order.
    """

    def __init__(
        self,
        schema: Schema,
        plan: Plan,
        places: Mapping[str, Place],
        storages: Mapping[str, tuple[int, int]],
        like: Tensor,
        backend: str,
        kernels: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.schema = schema
        self._positions = {name: i for i, name in enumerate(schema.names)}
        self.hashes = tuple(plan[s.name].accepts_raw for s in schema)
        options: TensorOptions = {"device": like.device, "dtype": like.dtype}
        # Modules of features that compute, and the tables of heads that belong to one feature.
        self.own = nn.ModuleDict()
        self.programs = plan.gathered(schema)
        gathers: list[int] = []
        for i, spec in enumerate(schema):
            config = plan[spec.name]
            if spec.name in self.programs:
                gathers.append(i)
                continue
            if _own(spec.table_name) in self.own:
                continue
            cls = get_method(config.method).embedding_cls
            self.own[_own(spec.table_name)] = cls(
                spec.num_embeddings,
                spec.embedding_dim,
                config=config,
                name=spec.table_name,
                init=spec.init,
                unseen=spec.unseen,
                **options,
            )
        specs = [schema.features[i] for i in gathers]
        programs = list(self.programs.values())
        where = [
            {t.name: places[table_key(s, t)] for t in p.tables if not t.dense}
            for s, p in zip(specs, programs, strict=True)
        ]
        # Features that batched kernels leave to torch: always, and for bags.
        lacking = features_for_torch(specs, programs, where, bags=False) if kernels else set()
        unpooled = features_for_torch(specs, programs, where, bags=True) if kernels else set()
        keys = [
            (s.pooling, j in lacking, j in unpooled, j if p.generates or (p.head and not p.head.stacks) else None)
            for j, (s, p) in enumerate(zip(specs, programs, strict=True))
        ]
        with torch.device(like.device):
            lookup = ReferenceLookup if backend == "reference" else VectorisedLookup
            self.unseen = UnseenIds(schema.features, self.hashes)
            zeros = self.unseen.zeros
            # What the features of one table share: the first of them has the index arrays.
            owners = first_of_equals([s.table_name for s in specs])
            optional = [zeros[i] for i in gathers]
            self.kernel: VectorisedLookup | ReferenceLookup = lookup(programs, where, keys, optional, owners=owners)
        # Positions in the schema of each part of the output: the groups, then the features that run themselves.
        self.parts = [tuple(gathers[j] for j in g.features) for g in self.kernel.groups]
        self.grouped = len(self.parts)
        place = {i: j for j, i in enumerate(gathers)}
        # Features whose rows are computed, each a part of its own, which is looked up by the distinct ids of a batch.
        generated = {j for j, program in enumerate(programs) if program.generates}
        self._generated = frozenset(p for p, part in enumerate(self.parts) if place.get(part[0]) in generated)
        self.parts += [(i,) for i in range(len(schema)) if i not in place]
        self.caches = None
        self.projections = nn.ParameterDict()
        self.heads = HeadTables(schema, self.programs, zeros, self.projections, self.own, _own, options)
        for g, part in enumerate(self.parts[: self.grouped]):
            self.heads.add(f"part{g}", part)
        every = [self.programs[n] if n in self.programs else self._module(n).program for n in schema.names]
        self.vectors = [program.vectors for program in every]
        self.widths = [
            self.programs[n].width if n in self.programs else self._module(n).output_dim for n in schema.names
        ]
        widths = {w // v for w, v in zip(self.widths, self.vectors, strict=True)}
        # Width of every output vector, None where features differ.
        self.output_dim = widths.pop() if len(widths) == 1 else None
        self.ordered = self._add_order("order", self.parts, like.device)
        # By name of kernels, for single ids and for bags; where a kernel runs nothing, none.
        self.batched: dict[str, BatchedLookup] = {}
        self.batched_bags: dict[str, BatchedLookup] = {}
        # Of single features, by name of kernels; made when they are first looked up.
        self._unpooled: list[dict[str, BatchedLookup | None]] = [{} for _ in schema]
        self._makers: dict[str, BatchedFeatures] = {}
        self._places = {i: p for p, part in enumerate(self.parts[: self.grouped]) for i in part}
        for i in gathers:
            self.heads.add(f"unpooled{i}_0", (i,))
        self._add_batched(kernels, specs, where, gathers, (lacking, unpooled), storages, like.device)

    def _add_batched(
        self,
        kernels: Sequence[str],
        specs: Sequence[FeatureSpec],
        where: Sequence[Mapping[str, Place]],
        gathers: Sequence[int],
        left_to_torch: tuple[set[int], set[int]],
        storages: Mapping[str, tuple[int, int]],
        device: torch.device,
    ) -> None:
        """Make the lookups that kernels run: of all features but those left to torch, for single ids and for bags.

        Args:
            specs, where: of the features whose rows are gathered.
            gathers: their positions in the schema.
        """
        place = {i: j for j, i in enumerate(gathers)}
        programs = list(self.programs.values())
        generated = {j for j, program in enumerate(programs) if program.generates}
        shares = not generated.isdisjoint(readers_of_shared_places(where))

        def features_of(run: Sequence[int]) -> BatchedFeatures:
            positions = [gathers[j] for j in run]
            return BatchedFeatures(
                self.schema, run, positions, positions, [programs[j] for j in run], [where[j] for j in run],
                self.kernel.index, storages, self.unseen, self.heads, self.vectors, self.output_dim,
            )  # fmt: skip

        for left, found, end in zip(left_to_torch, (self.batched, self.batched_bags), ("", "_bags"), strict=True):
            run = [j for j in range(len(specs)) if j not in left | generated]
            rest = [p for p, part in enumerate(self.parts) if p >= self.grouped or place[part[0]] not in run]
            for name in kernels:
                computed = generated - left if BATCHED_LOOKUPS[name].reads_generated else set[int]()
                if not (known := sorted({*run, *computed})):
                    continue
                if not end:
                    self._makers[name] = features_of(known)
                if end and rest == (self.batched[name].rest if name in self.batched else None):
                    found[name] = self.batched[name]
                    continue
                found[name] = BATCHED_LOOKUPS[name](features_of(run), rest, f"{name}{end}")
                found[name].ordered = self._add_order(found[name].order, self._batched_parts(found[name]), device)
                # Rows that only one call reads can be stepped by it; those that torch reads beside it are collected.
                by_torch = [p for p in rest if p not in self._generated or place[self.parts[p][0]] not in computed]
                found[name].mixed = shares or bool(by_torch)

    def _batched_parts(self, batched: BatchedLookup) -> list[tuple[int, ...]]:
        return [*batched.parts, *(self.parts[p] for p in batched.rest)]

    def _module(self, name: str) -> CompressedEmbedding:
        return cast("CompressedEmbedding", self.own[_own(self.schema[name].table_name)])

    def _add_order(self, name: str, parts: Sequence[tuple[int, ...]], device: torch.device) -> bool:
        """Where each output column (or vector) stands among the concatenated parts; True if in its place already."""
        unit = self.vectors if self.output_dim is not None else self.widths
        start, starts = 0, {}
        for part in parts:
            for i in part:
                starts[i] = start
                start += unit[i]
        order = [starts[i] + j for i in range(len(self.schema)) for j in range(unit[i])]
        self.add_constant(name, order, device)
        return order == sorted(order)

    def dense_tables(self) -> dict[str, Tensor]:
        """Each table of a head by its key, as a view where it is stacked with others."""
        return self.heads.tables()

    def assign_(self, counts: Mapping[str, Tensor | Mapping[str, Tensor]]) -> None:
        """Fill the index buffers of the named features; see :meth:`EmbeddingCollection.assign_`."""
        known = set(self.schema.names)
        unknown = [str(unknown_name("feature", name, known)) for name in counts if name not in known]
        raise_faults(unknown, "assign_", UnknownNameError)
        place = {name: number for number, name in enumerate(self.programs)}
        for name, values in by_first_reader(self.schema, counts).items():
            if name in self.programs:
                sets = isinstance(values, Mapping)
                stored = values if sets else with_unseen(self.schema[name], cast("Tensor", values))
                self.kernel.index.assign_(place[name], stored)
            else:
                self._module(name).assign_(values)

    def reset_own(self, seed: int) -> None:
        """Draw the initial weights of the modules that run themselves."""
        for module in self.own.values():
            if isinstance(module, CompressedEmbedding):
                module.reset_parameters(seed)

    def given(self, ids: Mapping[str, FeatureIds], near: nn.Module) -> dict[str, FeatureIds]:
        """Ids per feature as users give them, tensors beside ``near`` for the strings and arrays of hashing ones."""
        out = dict(ids)
        for spec, hashes in zip(self.schema, self.hashes, strict=True):
            value = out.get(spec.name)
            if isinstance(value, tuple) and len(value) == 2:
                out[spec.name] = (given_ids(value[0], spec, hashes, near), value[1])
            elif value is not None:
                out[spec.name] = given_ids(value, spec, hashes, near)
        return out

    def position(self, feature: str) -> int:
        """Position of a feature in the schema.

        Raises:
            UnknownNameError: it has none.
        """
        if feature not in self._positions:
            raise unknown_name("feature", str(feature), self.schema.names)
        return self._positions[feature]

    # -- running --------------------------------------------------------------------------------------------------

    def single(self, ids: Tensor, gather: Gather) -> Tensor:
        """One id per sample and feature: int64 ``ids [B, F]``."""
        out = self._singles(self.unseen(ids), range(len(self.parts)), gather)
        return self._assemble(out, self.ordered, "order")

    def _singles(
        self, ids: Tensor, parts: Sequence[int], gather: Gather, by_kernels: GeneratedLookup | None = None
    ) -> list[Tensor]:
        """Vectors ``[B, columns]`` of some parts, of resolved ids.

        Args:
            by_kernels: of features whose rows are computed.
        """
        out: dict[int, Tensor] = {}
        distinct: dict[int, DistinctIds] = {}
        asked: dict[int, Tensor] = {}
        for p in parts:
            part = self.parts[p]
            asked[p] = ids if len(part) == ids.shape[1] and self.ordered else ids[:, list(part)]
            if p not in self._generated:
                continue
            vectors = self._generated_rows(part[0], asked[p][:, 0], gather, by_kernels)
            if vectors is not None:
                out[p] = vectors
                continue
            distinct[p] = distinct_ids(asked[p][:, 0])
            asked[p] = distinct[p].ids.unsqueeze(1)
        groups = [p for p in parts if p < self.grouped and p not in out]
        found = self.kernel([asked[p] for p in groups], None, gather, groups) if groups else []
        for p, value in zip(groups, found, strict=True):
            headed = self.heads.head(f"part{p}") is not None
            value = (self.heads.vectors(f"part{p}", value, asked[p]) if headed else value).flatten(1)
            out[p] = distinct[p].scatter(value) if p in distinct else value
        for p in parts:
            if p >= self.grouped:
                out[p] = self.vectors_of(self.parts[p][0], asked[p][:, 0]).flatten(1)
        return [out[p] for p in parts]

    def single_batched(
        self,
        kernels: str,
        ids: Tensor,
        tables: list[Tensor],
        step: NativeStep | None,
        sparse: bool,
        gather: Gather,
        mask: MaskParameters | None = None,
    ) -> Tensor:
        """As :meth:`single`, by one of the kernels in ``batched``; what these leave to torch by ``gather``.

        Args:
            tables: float32 per storage, on the CPU.
            step, sparse: see :func:`look_up`.
            mask: of all vectors, where the kernels take one.
        """
        batched = self.batched[kernels]
        if not batched.rest:
            parts = batched.single(ids, tables, step, sparse, mask)
        else:
            ids = self.unseen(ids.long())
            parts = batched.single(ids, tables, step, sparse, mask, resolved=True)
            parts += self._singles(
                ids,
                batched.rest,
                gather,
                self._by_kernels(kernels, tables, step, sparse),
            )
        return self._assemble(parts, batched.ordered, batched.order)

    def pooled_batched(
        self, kernels: str, bags: Bags, tables: list[Tensor], step: NativeStep | None, sparse: bool, gather: Gather
    ) -> Tensor:
        """As :meth:`pooled`, by one of the kernels in ``batched_bags`` that take the bags."""
        batched = self.batched_bags[kernels]
        known = self.unseen.replaces or self.unseen.counting
        bags = self.resolved(bags) if known else bags
        parts = batched.pooled(bags, tables, step, sparse, lambda: self.resolved(bags))
        if batched.rest:
            by_kernels = self._by_kernels(kernels, tables, step, sparse)
            parts += self._pooled(bags, None, batched.rest, gather, check=not known, by_kernels=by_kernels)
        return self._assemble(parts, batched.ordered, batched.order)

    def vectors_of(self, feature: int, ids: Tensor) -> Tensor:
        """Vectors of resolved ``ids [n]`` of a feature that runs itself: ``[n, width]``."""
        return self._module(self.schema.names[feature]).lookup_resolved(ids, self.unseen.zeros[feature])

    def pooled(self, bags: Bags, gather: Gather) -> Tensor:
        """Bags of ids, pooled per feature as its spec says."""
        feature = self._feature_of(bags)
        bags = bags._replace(values=self.unseen(bags.values, feature))
        out = self._pooled(bags, feature, range(len(self.parts)), gather)
        return self._assemble(out, self.ordered, "order")

    def _pooled(
        self,
        bags: Bags,
        feature: Tensor | None,
        parts: Sequence[int],
        gather: Gather,
        check: bool = False,
        by_kernels: GeneratedLookup | None = None,
    ) -> list[Tensor]:
        """Pooled vectors ``[B, columns]`` of some parts, of resolved bags.

        Args:
            feature: of each id, where it is known already.
            check: the ids may be out of range.
            by_kernels: of features whose rows are computed.
        """
        batch, lengths = bags.batch, bags.lengths.view(len(self.schema), bags.batch)
        picks: list[tuple[Tensor | slice | None, Tensor]] = []
        for p in parts:
            # A slice needs its bounds as numbers, which compiled models do not know.
            if len(self.parts[p]) == 1 and feature is None and not torch.compiler.is_compiling():
                picks.append(self._pick_one(self.parts[p][0], bags))
                continue
            feature = self._feature_of(bags) if feature is None else feature
            picks.append(pick(self.parts[p], feature, len(self.schema)))
        values = [bags.values if at is None else bags.values[at] for at, _ in picks]
        for p, ids, (_, local) in zip(parts, values, picks, strict=True) if check else ():
            members = torch.tensor(self.parts[p], device=local.device)
            self.unseen.check(ids, members[local])
        weighted = [bags.weights if bags.weights is None or at is None else bags.weights[at] for at, _ in picks]
        ends = [F.pad(lengths[list(self.parts[p])].reshape(-1).cumsum(0), (1, 0)) for p in parts]
        # Ids to look up; of rows that are computed, the distinct ones. Vectors of those that kernels look up.
        distinct: dict[int, DistinctIds] = {}
        computed: dict[int, Tensor] = {}
        for p, ids in zip(parts, values, strict=True):
            if p in self._generated:
                vectors = self._generated_rows(self.parts[p][0], ids, gather, by_kernels)
                if vectors is None:
                    distinct[p] = distinct_ids(ids)
                else:
                    computed[p] = vectors
        asked = {
            p: (distinct[p].ids, local[: len(distinct[p].ids)]) if p in distinct else (ids, local)
            for p, ids, (_, local) in zip(parts, values, picks, strict=True)
            if p < self.grouped and p not in computed
        }
        columns: dict[int, Tensor] = {}
        if asked:
            rows, locals_ = zip(*asked.values(), strict=True)
            columns = dict(zip(asked, self.kernel(rows, locals_, gather, list(asked)), strict=True))
        out = []
        for at, p in enumerate(parts):
            part, (_, local), weights, offsets, ids = self.parts[p], picks[at], weighted[at], ends[at], values[at]
            if p >= self.grouped:
                out.append(self.pooled_own(part[0], ids, offsets, weights))
                continue
            mode, key = self.schema.features[part[0]].pooling, f"part{p}"
            value, head = computed[p] if p in computed else columns[p], self.heads.head(key)
            if p in computed:
                head = None
            elif p in distinct:
                value, head = distinct[p].scatter(self.heads.vectors_of_ids(key, value, *asked[p])), None
            elif head is not None and (head.pools == "ids" or (head.pools == "either" and mode == "max")):
                # Maxima do not commute with the head, so it applies to every id.
                value, head = self.heads.vectors_of_ids(key, value, ids, local), None
            skipped = absent_ids(ids) if self.unseen.zeros[part[0]] else None
            value = pool_vectors(value, offsets, mode, weights, skipped, include_last_offset=True)
            value = value.view(len(part), batch, value.shape[-1])
            value = value.transpose(0, 1)
            out.append((value if head is None else self.heads.vectors(key, value)).flatten(1))
        return out

    def pooled_own(self, feature: int, values: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """Pooled vectors of resolved ids of a feature that runs itself: ``[B, width]`` for ``offsets [B + 1]``."""
        own = self._module(self.schema.names[feature])
        skipped = absent_ids(values) if self.unseen.zeros[feature] else None
        mode = self.schema.features[feature].pooling
        vectors = own.before_pool_resolved(values, self.unseen.zeros[feature])
        return own.after_pool(pool_vectors(vectors, offsets, mode, weights, skipped, include_last_offset=True))

    def _feature_of(self, bags: Bags) -> Tensor:
        """Position of each id's feature: int64 ``[n]``."""
        sizes = bags.lengths.view(len(self.schema), bags.batch).sum(1)
        return torch.repeat_interleave(torch.arange(len(self.schema), device=bags.values.device), sizes)

    def resolved(self, bags: Bags) -> Bags:
        """``bags`` after the policies for unseen ids."""
        return bags._replace(values=self.unseen(bags.values, self._feature_of(bags)))

    def _pick_one(self, feature: int, bags: Bags) -> tuple[slice, Tensor]:
        """As :func:`pick`, of one feature, whose ids stand together."""
        first, last = (int(bags.offsets[i * bags.batch]) for i in (feature, feature + 1))
        return slice(first, last), torch.zeros(last - first, dtype=torch.int64, device=bags.values.device)

    def _assemble(self, parts: list[Tensor], ordered: bool, order: str) -> Tensor:
        """Parts ``[B, columns]``, or as the output is, to the output in schema order."""
        dim = self.output_dim
        if ordered and len(parts) == 1 and (dim is None or parts[0].dim() == 3):
            return parts[0]
        if dim is not None:
            # Sizes in full: an empty batch has no element from which to infer one.
            parts = [p if p.dim() == 3 else p.reshape(p.shape[0], p.shape[1] // dim, dim) for p in parts]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return joined if ordered else joined.index_select(1, self.constant(order, joined))
