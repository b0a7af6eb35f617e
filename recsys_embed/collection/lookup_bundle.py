"""From ids of all features to vectors of all features: groups, projections and the modules that run themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_embed.collection.bags import Bags
from recsys_embed.collection.fused_bundle import BUNDLES, FusedBundle
from recsys_embed.core.program import LookupProgram
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import UnknownNameError, raise_faults, unknown_name
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.kernels.constants import Constants
from recsys_embed.kernels.id_checks import given_ids
from recsys_embed.kernels.native.autograd import NativeStep
from recsys_embed.kernels.native.masks import Stage
from recsys_embed.kernels.pooling import pool_vectors
from recsys_embed.kernels.reference import ReferenceLookup
from recsys_embed.kernels.unseen_ids import Unseen, with_unseen
from recsys_embed.kernels.vectorised import Gather, Place, VectorisedLookup, absent_ids, project
from recsys_embed.plan import Plan, table_key
from recsys_embed.registry import get_method

# Keeps features called "items" or "type" apart from the attributes of the dictionary that holds their modules.
_OWN = "feature_"


class LookupBundle(Constants):
    """The lookups of all features of a schema.

    Features run by the kernel form groups; a feature whose method computes (``config.computes``) is a module of its
    own. Outputs come back in schema order.
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
        self.hashes = tuple(plan[s.name].accepts_raw for s in schema)
        options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.own = nn.ModuleDict()
        kernel: list[int] = []
        for i, spec in enumerate(schema):
            config = plan[spec.name]
            if not config.computes:
                kernel.append(i)
                continue
            cls = get_method(config.method).embedding_cls
            given = {"config": config, "name": spec.name, "init": spec.init, "unseen": spec.unseen, **options}
            self.own[_OWN + spec.name] = cls(spec.num_embeddings, spec.embedding_dim, **given)
        specs = [schema.features[i] for i in kernel]
        programs = [plan[s.name].program(s) for s in specs]
        self.programs = {s.name: p for s, p in zip(specs, programs, strict=True)}
        where = [
            {t.name: places[table_key(s, t)] for t in p.tables if not t.dense}
            for s, p in zip(specs, programs, strict=True)
        ]
        with torch.device(like.device):
            lookup = ReferenceLookup if backend == "reference" else VectorisedLookup
            self.unseen = Unseen(schema.features, self.hashes)
            zeros = self.unseen.zeros
            self.kernel = lookup(programs, where, [s.pooling for s in specs], [zeros[i] for i in kernel])
        # Positions in the schema of each part of the output: the groups, then the features that run themselves.
        self.parts = [tuple(kernel[j] for j in g.features) for g in self.kernel.groups]
        self.parts += [(i,) for i in range(len(schema)) if i not in set(kernel)]
        self._add_projections(options)
        self.vectors = [self._program(s).vectors for s in schema]
        self.widths = [self._program(s).width for s in schema]
        widths = {w // v for w, v in zip(self.widths, self.vectors, strict=True)}
        # Width of every output vector, None where features differ.
        self.output_dim = widths.pop() if len(widths) == 1 else None
        self.ordered = self._add_order("order", self.parts, like.device)
        self.fused: dict[str, FusedBundle] = {}
        for name in kernels if FusedBundle.fits(self) else ():
            self.fused[name] = BUNDLES[name](self, where, storages)
            self.fused_ordered = self._add_order("fused_order", self.fused[name].parts, like.device)

    def _program(self, spec: FeatureSpec) -> LookupProgram:
        return self.programs[spec.name] if spec.name in self.programs else self._module(spec.name).program

    def _module(self, name: str) -> CompressedEmbedding:
        return cast("CompressedEmbedding", self.own[_OWN + name])

    def _add_projections(self, options: dict[str, Any]) -> None:
        """One stacked parameter per shape, features in schema order, whatever groups the kernel makes of them."""
        self.projected: dict[str, list[int]] = {}
        shape_of: dict[int, str] = {}
        for i, spec in enumerate(self.schema):
            program = self.programs.get(spec.name)
            if program is not None and program.projection:
                table = program.table(program.projection)
                shape_of[i] = f"{table.rows}x{table.width}"
                self.projected.setdefault(shape_of[i], []).append(i)
        self.projections = nn.ParameterDict()
        for shape, members in self.projected.items():
            sizes = (int(n) for n in shape.split("x"))
            self.projections[shape] = nn.Parameter(torch.empty(len(members), *sizes, **options))
        self._projection_of = {g: shape_of[part[0]] for g, part in enumerate(self.parts) if part[0] in shape_of}
        for g, shape in self._projection_of.items():
            places = [self.projected[shape].index(i) for i in self.parts[g]]
            self.add_constant(f"projection{g}", places, options["device"])

    def _projection(self, g: int) -> Tensor | None:
        """Projections ``[members, in, out]`` of a part's features, or None where it has none."""
        shape = self._projection_of.get(g)
        if shape is None:
            return None
        stacked: Tensor = self.projections[shape]
        whole = list(self.parts[g]) == self.projected[shape]
        return stacked if whole else stacked.index_select(0, self.constant(f"projection{g}"))

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

    @property
    def limits(self) -> Tensor:
        """Per feature, the bound below which ids must lie, -1 where any id may come: int64 ``[features]``."""
        return self.unseen.constant("limits")

    def dense_tables(self) -> dict[str, Tensor]:
        """Each projection by its table key, as a view of the stacked parameter."""
        out = {}
        for shape, members in self.projected.items():
            for values, i in zip(self.projections[shape], members, strict=True):
                spec = self.schema.features[i]
                program = self.programs[spec.name]
                out[table_key(spec, program.table(program.projection or ""))] = values
        return out

    def assign_(self, counts: Mapping[str, Tensor | Mapping[str, Tensor]]) -> None:
        """Fill the index buffers of the named features; see :meth:`EmbeddingCollection.assign_`."""
        unknown = [
            str(unknown_name("feature", name, self.schema.names)) for name in counts if name not in self.schema.names
        ]
        raise_faults(unknown, "assign_", UnknownNameError)
        for name, values in counts.items():
            if name in self.programs:
                sets = isinstance(values, Mapping)
                stored = values if sets else with_unseen(self.schema[name], cast("Tensor", values))
                self.kernel.index.assign_(list(self.programs).index(name), stored)
            else:
                self._module(name).assign_(values)

    def reset_own(self, seed: int) -> None:
        """Draw the initial weights of the modules that run themselves."""
        for module in self.own.values():
            cast("CompressedEmbedding", module).reset_parameters(seed)

    def given(self, ids: Mapping[str, Any]) -> dict[str, Any]:
        """Ids per feature as users give them, with tensors for the strings and arrays of features that hash."""
        out = dict(ids)
        for spec, hashes in zip(self.schema, self.hashes, strict=True):
            value = out.get(spec.name)
            if isinstance(value, tuple) and len(value) == 2:
                out[spec.name] = (given_ids(value[0], spec, hashes, self.unseen), value[1])
            elif value is not None:
                out[spec.name] = given_ids(value, spec, hashes, self.unseen)
        return out

    # -- running --------------------------------------------------------------------------------------------------

    def single(self, ids: Tensor, gather: Gather) -> Tensor:
        """One id per sample and feature: int64 ``ids [B, F]``."""
        ids = self.unseen(ids)
        columns = [ids if len(p) == ids.shape[1] and self.ordered else ids[:, list(p)] for p in self.parts]
        grouped = len(self.kernel.groups)
        out = []
        for g, value in enumerate(self.kernel(columns[:grouped], None, gather)):
            matrices = self._projection(g)
            out.append(value if matrices is None else project(value, matrices, "bfi,fio->bfo"))
        for part, column in zip(self.parts[grouped:], columns[grouped:], strict=True):
            out.append(self.vectors_of(part[0], column[:, 0]))
        return self._assemble([value.flatten(1) for value in out], self.ordered, "order")

    def single_fused(
        self,
        kernels: str,
        ids: Tensor,
        tables: list[Tensor],
        step: NativeStep | None,
        sparse: bool,
        mask: Stage | None = None,
    ) -> Tensor:
        """As :meth:`single`, by one of the kernels in ``fused``.

        Args:
            tables: float32 per storage, on the CPU.
            step, sparse: see :func:`look_up`.
            mask: of all vectors, where the kernels take one.
        """
        parts = self.fused[kernels].single(self, ids, tables, step, sparse, mask)
        return self._assemble(parts, self.fused_ordered, "fused_order")

    def pooled_fused(
        self, kernels: str, bags: Bags, tables: list[Tensor], step: NativeStep | None, sparse: bool
    ) -> Tensor:
        """As :meth:`pooled`, by one of the kernels in ``fused`` that take the bags."""
        parts = self.fused[kernels].pooled(self, bags, tables, step, sparse)
        return self._assemble(parts, self.fused_ordered, "fused_order")

    def vectors_of(self, feature: int, ids: Tensor) -> Tensor:
        """Vectors of resolved ``ids [n]`` of a feature that runs itself: ``[n, width]``."""
        return self._module(self.schema.names[feature]).lookup_resolved(ids)

    def pooled(self, bags: Bags, gather: Gather) -> Tensor:
        """Bags of ids, pooled per feature as its spec says."""
        batch, lengths, feature = bags.batch, bags.lengths.view(len(self.schema), bags.batch), self._feature_of(bags)
        ids = self.unseen(bags.values, feature)
        picks = [self._pick(part, feature) for part in self.parts]
        values = [ids if at is None else ids[at] for at, _ in picks]
        grouped = len(self.kernel.groups)
        weighted = [bags.weights if bags.weights is None or at is None else bags.weights[at] for at, _ in picks]
        ends = [F.pad(lengths[list(part)].reshape(-1).cumsum(0), (1, 0)) for part in self.parts]
        vectors = self.kernel(values[:grouped], [local for _, local in picks[:grouped]], gather)
        out = []
        for g, part in enumerate(self.parts):
            local, weights, offsets = picks[g][1], weighted[g], ends[g]
            if g >= grouped:
                out.append(self.pooled_own(part[0], values[g], offsets, weights))
                continue
            mode = self.schema.features[part[0]].pooling
            value, matrices = vectors[g], self._projection(g)
            if matrices is not None and mode == "max":
                # Maxima do not commute with the projection, so it applies to every id.
                value, matrices = project(value, matrices[local], "ni,nio->no"), None
            skipped = absent_ids(values[g]) if self.unseen.zeros[part[0]] else None
            value = pool_vectors(value, offsets, mode, weights, skipped, include_last_offset=True)
            value = value.view(len(part), batch, value.shape[-1])
            value = value.transpose(0, 1)
            out.append(value if matrices is None else project(value, matrices, "bfi,fio->bfo"))
        return self._assemble([value.flatten(1) for value in out], self.ordered, "order")

    def pooled_own(self, feature: int, values: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """Pooled vectors of resolved ids of a feature that runs itself: ``[B, width]`` for ``offsets [B + 1]``."""
        own = self._module(self.schema.names[feature])
        skipped = absent_ids(values) if self.unseen.zeros[feature] else None
        mode = self.schema.features[feature].pooling
        vectors = own.before_pool_resolved(values)
        return own.after_pool(pool_vectors(vectors, offsets, mode, weights, skipped, include_last_offset=True))

    def _feature_of(self, bags: Bags) -> Tensor:
        """Position of each id's feature: int64 ``[n]``."""
        sizes = bags.lengths.view(len(self.schema), bags.batch).sum(1)
        return torch.repeat_interleave(torch.arange(len(self.schema), device=bags.values.device), sizes)

    def resolved(self, bags: Bags) -> Bags:
        """``bags`` after the policies for unseen ids."""
        return bags._replace(values=self.unseen(bags.values, self._feature_of(bags)))

    def _pick(self, part: tuple[int, ...], feature: Tensor) -> tuple[Tensor | None, Tensor]:
        """Positions of a part's values (None for all of them) and each value's place among the part's features."""
        if part == tuple(range(len(self.schema))):
            return None, feature
        place = torch.full((len(self.schema),), -1, device=feature.device)
        place[list(part)] = torch.arange(len(part), device=feature.device)
        local = place[feature]
        at = (local >= 0).nonzero().squeeze(1)
        return at, local[at]

    def _assemble(self, parts: list[Tensor], ordered: bool, order: str) -> Tensor:
        """Parts ``[B, columns]``, or as the output is, to the output in schema order."""
        dim = self.output_dim
        if ordered and len(parts) == 1 and (dim is None or parts[0].dim() == 3):
            return parts[0]
        if dim is not None:
            # Sizes in full: an empty batch has no element from which to infer one.
            parts = [p if p.dim() == 3 else p.reshape(p.shape[0], p.shape[1] // dim, dim) for p in parts]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return joined if ordered else joined.index_select(1, self.constant(order))
