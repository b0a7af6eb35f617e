"""Plans: the method and size of every feature, as a readable and checkable value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from recsys_embed.core.footprint import Footprint, parse_bytes
from recsys_embed.core.id_sets import members_of_texts
from recsys_embed.core.method_config import STORAGE_OPTIONS, MethodConfig
from recsys_embed.core.plan_arrays import PlanArrays
from recsys_embed.core.program import LookupProgram, Table
from recsys_embed.errors import ConfigError, UnknownNameError, raise_faults, unknown_name
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.optim import FusedOptimizer
from recsys_embed.registry import config_from_dict, get_method
from recsys_embed.utils.files import atomic_write, write_text
from recsys_embed.utils.settings import build, check_settings
from recsys_embed.utils.strict_json import read_object
from recsys_embed.utils.types import JSON, Budget, JSONMapping, Option

PLAN_VERSION = 1
MAX_ROW_LOOKUPS = 1 << 16
REASON = "reason"
SETS = "sets"
ARRAYS = "arrays"
_KEYS = ("version", "notes", "features", SETS, ARRAYS)


def table_key(spec: FeatureSpec, table: Table) -> str:
    """Name of a physical table among all features.

    Tables that a method shares between features keep theirs, others belong to the table that the feature reads.
    """
    return table.name if table.shared else f"{spec.table_name}.{table.name}"


@dataclass(frozen=True)
class PlanNotes:
    """What a planner aimed at and came to; a plan means the same without it.

    Args:
        budget: bytes the plan had to keep to.
        bytes: bytes it takes.
        target: what these bytes cover, ``"serve"`` or ``"train"``.
        optimizer: fused optimizer whose state ``"train"`` counts; None for ordinary gradients.
        predicted_loss: the planner's objective, see :mod:`recsys_embed.planning`: losses, and penalties for what a plan
            resorts to only where bytes do not suffice.
        least_loss: no plan it could have made loses less.
        exact: the plan is proved to be the best of those.
        statistics: where frequencies came from.
        measured: methods whose losses were fitted to measured runs.
        left_out: tables of the model that no plan can replace and the budget does not count: name, bytes and why.
        itemsize: bytes per number that ``bytes`` counts.
        warnings: what the budget did not suffice for, in words, with the budget that would.

    Raises:
        ConfigError: a value of the wrong type.
    """

    budget: int
    bytes: int
    target: str
    optimizer: str | None
    predicted_loss: float
    least_loss: float
    exact: bool
    statistics: str
    measured: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    itemsize: int = 4
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_settings(self, "notes of a plan")

    @classmethod
    def from_dict(cls, data: Any) -> PlanNotes:
        """Inverse of :meth:`to_dict`; unknown and missing keys are errors, all at once."""
        return build(cls, data, "key of a plan's notes", where="notes of a plan")

    def to_dict(self) -> JSON:
        """JSON-ready; what came later only where it says something, so that texts from before it compare alike."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {k: v for k, v in values.items() if k not in _LATER or getattr(self, k) != _LATER[k]}


_LATER = {f.name: f.default for f in fields(PlanNotes) if f.name in ("left_out", "itemsize", "warnings")}


@dataclass(frozen=True)
class Plan:
    """A method configuration per feature name.

    Args:
        configs: by feature name.
        reasons: by feature name, in words, why a planner chose it.
        notes: what the planner aimed at and came to.
        sets: by feature and index, ids that a search chose to own rows, or that a planner counted as frequent, as
            :func:`recsys_embed.core.id_sets.set_text`; features without any own rows by frequency.
        arrays: what other indexes hold, as the codes of a learned clustering; :meth:`save` writes them into a file
            beside the plan's text.

    ``reasons`` and ``notes`` are for people: plans of equal configurations are equal.

    >>> schema = Schema([FeatureSpec("C1", 1000, 16), FeatureSpec("C2", 50_000, 16)])
    >>> plan = Plan.uniform(schema, "hash", budget="100KiB")
    >>> plan["C2"].method, plan.footprint(schema).serve <= 100 * 1024
    ('hash', True)
    """

    configs: Mapping[str, MethodConfig]
    reasons: Mapping[str, str] = field(default_factory=dict, compare=False)
    notes: PlanNotes | None = field(default=None, compare=False)
    sets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    arrays: PlanArrays | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "configs", dict(self.configs))
        object.__setattr__(self, "sets", {name: dict(texts) for name, texts in self.sets.items()})
        object.__setattr__(self, "reasons", dict(self.reasons))
        wrong = [(name, c) for name, c in self.configs.items() if not isinstance(c, MethodConfig)]
        faults = [f"expected a method configuration; got {c!r:.80} (feature {name!r})" for name, c in wrong]
        for name, text in self.reasons.items():
            if name not in self.configs or not isinstance(text, str):
                faults.append(f"a reason is a text for a feature of the plan; got {text!r:.80} (feature {name!r})")
        for name, texts in self.sets.items():
            if name not in self.configs or not all(isinstance(t, str) for t in (*texts, *texts.values())):
                faults.append(f"sets of ids are texts by index, for a feature of the plan; got {name!r}")
        for name in () if self.arrays is None else self.arrays.layout:
            if name not in self.configs:
                faults.append(f"arrays are for features of the plan; got {name!r}")
        raise_faults(faults, "Plan")

    def __getitem__(self, feature: str) -> MethodConfig:
        return self.configs[feature]

    def __iter__(self) -> Iterator[str]:
        return iter(self.configs)

    def __str__(self) -> str:
        """A line per feature, its method and why, and what the planner came to."""
        lines = [
            f"{name}: {config.method}" + (f"; {self.reasons[name]}" if name in self.reasons else "")
            for name, config in self.configs.items()
        ]
        if self.notes is not None:
            lines += [
                f"{self.notes.bytes:,} of {self.notes.budget:,} bytes to {self.notes.target}",
                *self.notes.warnings,
            ]
        return "\n".join(lines)

    def __len__(self) -> int:
        return len(self.configs)

    def members(self, spec: FeatureSpec) -> dict[str, Tensor]:
        """Ids of each index of a feature that a search has filled: int64, ascending.

        Raises:
            ConfigError: a text that is no set, or not of as many ids as the index of this name holds.
        """
        texts = self.sets.get(spec.name)
        return members_of_texts(texts, self[spec.name].program(spec).indexes, spec.num_ids) if texts else {}

    def with_arrays(self, arrays: Mapping[str, Mapping[str, Tensor]]) -> Plan:
        """The same plan with integer tensors by feature and index, as ``assign_`` takes them.

        Raises:
            ConfigError: a tensor of another type, or of a feature that the plan does not have.
        """
        return replace(self, arrays=PlanArrays.of(arrays))

    def assigned(self, schema: Schema) -> dict[str, dict[str, Tensor]]:
        """What indexes hold, by feature and index: sets of ids and arrays, as ``assign_`` takes them.

        Raises:
            ConfigError: the plan's arrays are described, but not at hand.
        """
        out: dict[str, dict[str, Tensor]] = {}
        arrays = {} if self.arrays is None else self.arrays.need_values()
        for rows in ({name: self.members(schema[name]) for name in self.sets}, arrays):
            for name, row in rows.items():
                # Features of one table have what one of them is given.
                first = schema.by_table[schema[name].table_name][0].name
                out.setdefault(first, {}).update(row)
        return out

    def save(self, path: str | Path) -> None:
        """Write the plan's text, and its arrays, if any, into ``NAME.arrays.safetensors`` beside it.

        Args:
            path: of the text, ``NAME.json``.
        """
        path, data = Path(path), self.to_dict()
        arrays = self.arrays
        if arrays is not None:
            arrays.need_values()
            beside = path.with_name(f"{path.stem}.arrays.safetensors")
            atomic_write(beside, lambda file: file.writelines(arrays.pieces()))
            data[ARRAYS] = {**arrays.to_dict(), "file": beside.name}
        write_text(path, json.dumps(data, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan and its arrays.

        Args:
            path: of the text; TOML where its name ends with ``.toml``, else JSON.

        Raises:
            ConfigError: no plan, or a faulty one; arrays that are missing or not those that were saved with it.
        """
        path = Path(path)
        try:
            data = read_object(path, toml=path.suffix == ".toml")
        except OSError as e:
            raise ConfigError(f"{path} is no plan: {e.strerror or e}") from e
        try:
            return cls.from_dict(data, path.parent)
        except ConfigError as e:
            raise type(e)(f"{path}: {e}") from e

    @classmethod
    def full(cls, schema: Schema) -> Plan:
        """Full tables everywhere."""
        return cls.uniform(schema, "full")

    @classmethod
    def uniform(cls, schema: Schema, method: str, budget: Budget | None = None, **params: Option) -> Plan:
        """One method for all features.

        Args:
            schema: the features.
            method: a registered key.
            budget: bytes (or text) all tables and index buffers together may deploy; ``None`` applies ``params`` as
                they are to every feature.
            params: the method's options; with a budget also ``full_below``, see :meth:`MethodConfig.plan`.

        Raises:
            BudgetError: the budget cannot be met.
            ConfigError: an option is wrong.
        """
        config_cls = get_method(method).config_cls
        params = config_cls.current_options(params)
        if budget is None:
            config = config_cls.from_params(params)
            return cls({s.name: config for s in schema})
        # Plain tables train and are served as the others are.
        rounded = {k: params[k] for k in STORAGE_OPTIONS if k in params} if "precision" in params else {}
        plain = get_method("full").config_cls.from_params(rounded)
        once = config_cls.plan(tuple(schema.first_readers), parse_bytes(budget), plain, **params)
        return cls(once).for_readers(schema)

    def for_readers(self, schema: Schema) -> Plan:
        """A plan of the first feature of each table, with entries for all features.

        >>> schema = Schema([FeatureSpec("item", 10, 4), FeatureSpec("history", 10, 4, table="item")])
        >>> Plan.full(schema.first_readers).for_readers(schema).configs.keys() == set(schema.names)
        True
        """
        first = {spec.name: readers[0].name for readers in schema.by_table.values() for spec in readers}
        reasons = {name: self.reasons[first[name]] for name in schema.names if first[name] in self.reasons}
        return replace(self, configs={name: self[first[name]] for name in schema.names}, reasons=reasons)

    def check(self, schema: Schema) -> None:
        """Raise unless the plan covers exactly the features of ``schema`` and suits each; all faults at once."""
        known = set(schema.names)
        faults = [f"feature {n!r} has no entry in the plan" for n in schema.names if n not in self.configs]
        faults += [f"the plan names {n!r}, which the schema does not have" for n in self if n not in known]
        for spec in schema:
            if spec.name in self.configs:
                faults += [f"{fault} (feature {spec.name!r})" for fault in self[spec.name].check(spec)]
        raise_faults(faults + self._sharing_faults(schema), "Plan")

    def _sharing_faults(self, schema: Schema) -> list[str]:
        """Features of one table that the plan treats differently."""
        faults = []
        for table, readers in schema.by_table.items():
            names = [s.name for s in readers if s.name in self.configs]
            differing = [n for n in names if self[n] != self[names[0]]]
            if differing:
                listed = ", ".join(f"{self[n]} of {n!r}" for n in (names[0], *differing))
                faults.append(f"a plan has one configuration for all features of table {table!r}; got {listed}")
            if len({json.dumps(self.sets[n], sort_keys=True) for n in names if n in self.sets}) > 1:
                faults.append(f"a plan has one set of ids for all features of table {table!r}: give it for one of them")
            if self.arrays is not None and sum(n in self.arrays.layout for n in names) > 1:
                faults.append(f"arrays of a plan belong to one of the features of table {table!r}")
        return faults

    def gathered(self, schema: Schema) -> dict[str, LookupProgram]:
        """Lookup programs of the features whose rows are gathered from tables, by name.

        The others compute their vectors (``config.computes``), each by a module of its own.

        Raises:
            ConfigError: together they read more than ``MAX_ROW_LOOKUPS`` rows for one id of each feature.
        """
        programs: dict[str, LookupProgram] = {}
        read = 0
        for spec in schema:
            if self[spec.name].computes:
                continue
            programs[spec.name] = self[spec.name].program(spec)
            read += len(programs[spec.name].row_lookups)
            if read > MAX_ROW_LOOKUPS:
                raise ConfigError(
                    f"a plan may read at most {MAX_ROW_LOOKUPS} rows for one id of each feature; up to {spec.name!r}, "
                    f"which takes {len(programs[spec.name].row_lookups)}, this one reads {read}: use longer blocks, or "
                    "fewer hash functions"
                )
        return programs

    def tables(self, schema: Schema) -> dict[str, Table]:
        """Every physical table that rows are gathered from, or that a head multiplies by, once, by its key.

        Raises:
            ConfigError: features that share a table do not agree in its shape.
        """
        self.check(schema)
        return _tables_of(self.gathered(schema), schema)

    def footprint(self, schema: Schema, optimizer: FusedOptimizer | None = None, itemsize: int = 4) -> Footprint:
        """Bytes of all features together; what several features read counts once.

        With ``optimizer`` the state of the tables it updates is included; projections and other dense parameters are
        left to the model's own optimizer and its account.
        """
        self.check(schema)
        total, gathered = Footprint(), self.gathered(schema)
        for table in _tables_of(gathered, schema).values():
            state = 0 if optimizer is None or table.dense else optimizer.state_bytes(table.rows, table.width)
            weights = table.nbytes(itemsize)
            total += Footprint(weights, optimizer=state, unrounded=table.trained_bytes(itemsize) - weights)
        for spec in schema.first_readers:
            if spec.name in gathered:
                total += Footprint(index=gathered[spec.name].footprint(itemsize).index)
            else:
                total += self[spec.name].footprint(spec, itemsize)
        return total

    def to_dict(self) -> JSON:
        notes = {} if self.notes is None else {"notes": self.notes.to_dict()}
        features = {
            name: {**c.to_dict(), **({REASON: self.reasons[name]} if name in self.reasons else {})}
            for name, c in self.configs.items()
        }
        sets = {SETS: {name: dict(texts) for name, texts in self.sets.items()}} if self.sets else {}
        arrays = {} if self.arrays is None else {ARRAYS: self.arrays.to_dict()}
        return {"version": PLAN_VERSION, **notes, "features": features, **sets, **arrays}

    def to_json(self) -> str:
        """Text a person can read, diff and edit; :meth:`from_dict` of its parse gives the plan back."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: JSONMapping, folder: Path | None = None) -> Plan:
        """Inverse of :meth:`to_dict`.

        Args:
            data: JSON values.
            folder: where the file of the plan's arrays is looked for; without it a plan that names its file by a
                relative path gets their description alone.

        Raises:
            ConfigError: another version, an unknown method or option, or arrays that are not those of the plan.
        """
        found = data if isinstance(data, Mapping) else {}
        if (
            type(found.get("version")) is not int
            or found["version"] != PLAN_VERSION
            or not isinstance(found.get("features"), Mapping)
        ):
            raise ConfigError(
                f"a plan is an object with 'version': {PLAN_VERSION} and 'features'; got {data!r:.80}, "
                f"version {found.get('version')!r}"
            )
        strange = [str(unknown_name("key of a plan", str(key), _KEYS)) for key in found if key not in _KEYS]
        raise_faults(strange, "Plan", UnknownNameError)
        sets = found.get(SETS, {})
        if not isinstance(sets, Mapping) or not all(isinstance(texts, Mapping) for texts in sets.values()):
            raise ConfigError(f"`{SETS}` of a plan are texts by feature and index; got {sets!r:.80}")
        configs, reasons, errors = {}, {}, []
        for name, given in found["features"].items():
            try:
                config = dict(given) if isinstance(given, Mapping) else given
                if isinstance(config, dict) and REASON in config:
                    reasons[name] = config.pop(REASON)
                configs[name] = config_from_dict(config)
            except ConfigError as e:
                errors.append((type(e), f"{e} (feature {name!r})"))
        kinds = {kind for kind, _ in errors}
        raise_faults([fault for _, fault in errors], "Plan", kinds.pop() if len(kinds) == 1 else ConfigError)
        notes = None if found.get("notes") is None else PlanNotes.from_dict(found["notes"])
        arrays = None if found.get(ARRAYS) is None else PlanArrays.from_dict(found[ARRAYS], folder)
        return cls(configs, reasons, notes, sets, arrays)


def _tables_of(programs: Mapping[str, LookupProgram], schema: Schema) -> dict[str, Table]:
    tables: dict[str, Table] = {}
    for name, program in programs.items():
        spec = schema[name]
        for table in program.tables:
            known = tables.setdefault(table_key(spec, table), table)
            if known != table:
                raise ConfigError(
                    f"shared table {table.name!r} is {_described(known)}, for one feature and {_described(table)}, for "
                    f"{spec.name!r}; give both the same options"
                )
    return tables


def _described(table: Table) -> str:
    precision = "" if table.precision == "fp32" else f", {table.precision}"
    training = "" if table.training is None else f", training as {table.training}"
    return f"{table.rows} x {table.width}, {table.init}{precision}{training}"
