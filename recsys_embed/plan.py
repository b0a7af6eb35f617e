"""Which method, at which size, for which feature: a value that people can read and machines can check."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from recsys_embed.config import MethodConfig
from recsys_embed.errors import ConfigError, raise_faults, unknown_name
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.memory import Footprint, parse_bytes
from recsys_embed.optim import FusedOptimizer
from recsys_embed.program import Table
from recsys_embed.registry import config_from_dict, get_method

PLAN_VERSION = 1


def table_key(spec: FeatureSpec, table: Table) -> str:
    """Name of a physical table among all features: shared tables keep theirs, others belong to their feature."""
    return table.name if table.shared else f"{spec.name}.{table.name}"


@dataclass(frozen=True)
class Plan:
    """A method configuration per feature name.

    >>> schema = Schema([FeatureSpec("C1", 1000, 16), FeatureSpec("C2", 50_000, 16)])
    >>> plan = Plan.uniform(schema, "hash", budget="100KiB")
    >>> plan["C2"].method, plan.footprint(schema).serve <= 100 * 1024
    ('hash', True)
    """

    configs: Mapping[str, MethodConfig]

    def __post_init__(self) -> None:
        object.__setattr__(self, "configs", dict(self.configs))
        wrong = [(name, c) for name, c in self.configs.items() if not isinstance(c, MethodConfig)]
        faults = [f"expected a method configuration; got {c!r:.80} (feature {name!r})" for name, c in wrong]
        raise_faults(faults, "Plan")

    def __getitem__(self, feature: str) -> MethodConfig:
        return self.configs[feature]

    def __iter__(self) -> Iterator[str]:
        return iter(self.configs)

    def __len__(self) -> int:
        return len(self.configs)

    @classmethod
    def full(cls, schema: Schema) -> Plan:
        """Plain tables everywhere."""
        return cls.uniform(schema, "full")

    @classmethod
    def uniform(cls, schema: Schema, method: str, budget: int | str | None = None, **params: Any) -> Plan:
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
        if budget is None:
            config = config_cls.from_params(params)
            return cls({s.name: config for s in schema})
        plain = get_method("full").config_cls.from_params({})
        return cls(config_cls.plan(tuple(schema), parse_bytes(budget), plain, **params))

    def check(self, schema: Schema) -> None:
        """Raise unless the plan covers exactly the features of ``schema`` and suits each; all faults at once."""
        faults = [f"feature {n!r} has no entry in the plan" for n in schema.names if n not in self.configs]
        faults += [f"the plan names {n!r}, which the schema does not have" for n in self if n not in schema.names]
        for spec in schema:
            if spec.name in self.configs:
                faults += [f"{fault} (feature {spec.name!r})" for fault in self[spec.name].check(spec)]
        raise_faults(faults, "Plan")

    def tables(self, schema: Schema) -> dict[str, Table]:
        """Every physical table once, by its key; tables shared between features must agree in shape.

        Features whose lookup is a module of its own (``config.computes``) are not listed.
        """
        self.check(schema)
        tables: dict[str, Table] = {}
        for spec in schema:
            if self[spec.name].computes:
                continue
            for table in self[spec.name].program(spec).tables:
                known = tables.setdefault(table_key(spec, table), table)
                if known != table:
                    raise ConfigError(
                        f"shared table {table.name!r} is {known.rows} x {known.width}, {known.init}, for one feature "
                        f"and {table.rows} x {table.width}, {table.init}, for {spec.name!r}; give both the same options"
                    )
        return tables

    def footprint(self, schema: Schema, optimizer: FusedOptimizer | None = None, itemsize: int = 4) -> Footprint:
        """Bytes of all features together; shared tables count once.

        With ``optimizer`` the state of the tables it updates is included; projections and other dense parameters are
        left to the model's own optimizer and its account.
        """
        total = Footprint()
        for table in self.tables(schema).values():
            state = 0 if optimizer is None or table.dense else optimizer.state_bytes(table.rows, table.width)
            total += Footprint(weights=itemsize * table.rows * table.width, optimizer=state)
        for spec in schema:
            if self[spec.name].computes:
                total += self[spec.name].footprint(spec, itemsize)
            else:
                total += Footprint(index=self[spec.name].footprint(spec).index)
        return total

    def to_dict(self) -> dict[str, Any]:
        return {"version": PLAN_VERSION, "features": {name: c.to_dict() for name, c in self.configs.items()}}

    def to_json(self) -> str:
        """Text a person can read, diff and edit; :meth:`from_dict` of its parse gives the plan back."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: another version, or an unknown method or option.
        """
        found = data if isinstance(data, Mapping) else {}
        if found.get("version") != PLAN_VERSION or not isinstance(found.get("features"), Mapping):
            raise ConfigError(
                f"a plan is an object with 'version': {PLAN_VERSION} and 'features'; got {data!r:.80}, "
                f"version {found.get('version')!r}"
            )
        for key in found:
            if key not in ("version", "features"):
                raise unknown_name("key of a plan", str(key), ("version", "features"))
        configs, errors = {}, []
        for name, config in found["features"].items():
            try:
                configs[name] = config_from_dict(config)
            except ConfigError as e:
                errors.append((type(e), f"{e} (feature {name!r})"))
        kinds = {kind for kind, _ in errors}
        raise_faults([fault for _, fault in errors], "Plan", kinds.pop() if len(kinds) == 1 else ConfigError)
        return cls(configs)
