"""The heads of a bundle's features, applied to several features at once, and the matrices they multiply by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn

from recsys_embed.core.heads import Head, run_head
from recsys_embed.core.program import LookupProgram
from recsys_embed.features import Schema
from recsys_embed.kernels.constants import Constants
from recsys_embed.kernels.native.trains import run_natively
from recsys_embed.plan import table_key


class TensorOptions(TypedDict):
    """Where a tensor lies and what its numbers are."""

    device: torch.device
    dtype: torch.dtype


class DenseTables(nn.Module):
    """Tables of one feature's head, by their names."""

    def __init__(self, tables: Mapping[str, tuple[int, ...]], **options: Unpack[TensorOptions]) -> None:
        super().__init__()
        for name, shape in tables.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **options)))


class _Part(NamedTuple):
    """Features that run at once; ``matrices`` and ``rows``: which of the stacked tables are theirs."""

    head: Head
    features: tuple[int, ...]
    optional: bool
    matrices: str | None = None
    whole: bool = False


class HeadTables(Constants):
    """Heads of features by position in the schema.

    The parameters are modules of whoever owns the heads, so that they keep their names in its state dict: tables of one
    shape and precision that stack are one parameter, frozen ones apart, features in schema order; others belong to
    their feature.

    Args:
        programs: of the features that have one, by name.
        optional: per feature of the schema, whether the id -1 is none.
        stacked: filled with a parameter ``[features, rows, width]`` per shape ``"{rows}x{width}"`` and precision.
        own: filled with a :class:`DenseTables` per feature whose head's tables do not stack.
        own_name: of a feature in ``own``.
        options: device and dtype.
    """

    def __init__(
        self,
        schema: Schema,
        programs: Mapping[str, LookupProgram],
        optional: Sequence[bool],
        stacked: nn.ParameterDict,
        own: nn.ModuleDict,
        own_name: Callable[[str], str],
        options: TensorOptions,
    ) -> None:
        super().__init__()
        self.schema, self.programs, self._optional = schema, dict(programs), tuple(optional)
        # Not as modules of this one, which would name the parameters a second time.
        self.__dict__["_stacked"], self.__dict__["_own"] = stacked, own
        self._own_name, self._device = own_name, options["device"]
        # Of each shape, the first feature of every table, and the place of each feature's.
        self.members: dict[str, list[int]] = {}
        self._place: dict[int, int] = {}
        first: dict[str, int] = {}
        for i, spec in enumerate(schema):
            program = self.programs.get(spec.name)
            if program is None or program.head is None or not program.head.tables:
                continue
            if first.setdefault(spec.table_name, i) != i:
                if program.head.stacks:
                    self._place[i] = self._place[first[spec.table_name]]
                continue
            shapes = {name: program.table(name).shape for name in program.head.tables}
            if program.head.stacks:
                self._place[i] = len(self.members.setdefault(_named(program), []))
                self.members[_named(program)].append(i)
            else:
                own[own_name(spec.table_name)] = DenseTables(shapes, **options)
        for name, members in self.members.items():
            program = self.programs[schema.names[members[0]]]
            sizes = program.table(program.head.tables[0]).shape if program.head is not None else ()
            frozen = program.table(program.head.tables[0]).frozen if program.head is not None else False
            stacked[name] = nn.Parameter(torch.empty(len(members), *sizes, **options), requires_grad=not frozen)
        self._parts: dict[str, _Part] = {}

    def add(self, key: str, features: Sequence[int]) -> bool:
        """Let :meth:`vectors` run these features, whose programs are of one form, at once; whether they have a head."""
        program = self.programs[self.schema.names[features[0]]]
        if program.head is None:
            return False
        optional = any(self._optional[i] for i in features)
        part = _Part(program.head, tuple(features), optional)
        if program.head.stacks and program.head.tables:
            members = self.members[_named(program)]
            part = part._replace(matrices=_named(program), whole=members == list(features))
            self.add_constant(key, [self._place[i] for i in features], self._device)
        self._parts[key] = part
        return True

    def head(self, key: str) -> Head | None:
        """Of the features added under a key."""
        part = self._parts.get(key)
        return None if part is None else part.head

    def needs_ids(self, key: str) -> bool:
        """Whether :meth:`vectors` of single ids reads the ids."""
        part = self._parts[key]
        return part.head.reads_ids or (part.optional and not part.head.keeps_zero)

    def _tables(self, key: str, part: _Part) -> list[Tensor]:
        if part.matrices is not None:
            stacked: Tensor = self.__dict__["_stacked"][part.matrices]
            return [stacked if part.whole else stacked.index_select(0, self.constant(key, stacked))]
        held = self.__dict__["_own"]
        name = self.schema.features[part.features[0]].table_name
        return [getattr(held[self._own_name(name)], table) for table in part.head.tables]

    def vectors(self, key: str, columns: Tensor, ids: Tensor | None = None, natively: bool = False) -> Tensor:
        """Vectors ``[B, features, width]`` of combined ``columns [B, features, columns]``; where there is a head.

        Args:
            ids: int64 ``[B, features]``; None for columns that bags have pooled.
            natively: by the native kernels, where they know the head.
        """
        part = self._parts[key]
        if natively and part.head.generates and columns.shape[1] == 1:
            found = run_natively(part.head, columns.squeeze(1))
            if found is not None:
                return found.unsqueeze(1)
        tables = self._tables(key, part)
        if part.head.stacks:
            return run_head(part.head, columns, tables, ids, part.optional)
        of = None if ids is None else ids[:, 0]
        return run_head(part.head, columns.squeeze(1), tables, of, part.optional).unsqueeze(1)

    def vectors_of_ids(self, key: str, columns: Tensor, ids: Tensor, local: Tensor) -> Tensor:
        """Vectors ``[n, width]`` of single ``ids [n]``.

        Args:
            columns: ``[n, columns]``.
            local: int64 ``[n]``, which of the features each id belongs to.
        """
        part = self._parts[key]
        tables = self._tables(key, part)
        tables = [t[local] for t in tables] if part.head.stacks else tables
        return run_head(part.head, columns, tables, ids, part.optional)

    def parameter(self, feature: str, table: str) -> nn.Parameter:
        """The parameter that holds a table of a feature's head, alone or stacked with others."""
        program = self.programs[feature]
        if program.head is not None and program.head.stacks:
            return cast("nn.Parameter", self.__dict__["_stacked"][_named(program)])
        name = self.schema[feature].table_name
        return cast("nn.Parameter", getattr(self.__dict__["_own"][self._own_name(name)], table))

    def tables(self, *, stacked_only: bool = False) -> dict[str, Tensor]:
        """Every table of a head by its key, as a view where it is stacked."""
        out = {}
        for i, spec in enumerate(self.schema):
            program = self.programs.get(spec.name)
            if program is None or program.head is None or (stacked_only and not program.head.stacks):
                continue
            for name in program.head.tables:
                if program.head.stacks:
                    values = self.__dict__["_stacked"][_named(program)][self._place[i]]
                else:
                    values = getattr(self.__dict__["_own"][self._own_name(spec.table_name)], name)
                out[table_key(spec, program.table(name))] = values
        return out


def _named(program: LookupProgram) -> str:
    """Name of the parameter in which the table of a head that stacks lies."""
    (name,) = () if program.head is None else program.head.tables
    table = program.table(name)
    precision = "" if table.precision == "fp32" else f"_{table.precision}"
    return "x".join(map(str, table.shape)) + precision + ("_frozen" if table.frozen else "")
