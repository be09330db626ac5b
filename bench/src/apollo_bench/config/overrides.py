"""``--set key=value``: override a value of a recipe."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from apollo_bench.errors import ExperimentError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# shorthand for the tables that the command line selects
_CHOSEN = {"optimizer": "optimizers", "schedule": "schedules"}


def override(
    table: dict[str, Any],
    settings: Iterable[str],
    optimizers: list[str] | None = None,
    schedules: list[str] | None = None,
    renamed_keys: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return a recipe's table with other values, not yet validated.

    Example:
        >>> override({"train": {"batch_size": 32}}, ["train.batch_size=64"])
        {'train': {'batch_size': 64}}

    Args:
        table: table of the recipe; it is not changed.
        settings: for example ``train.batch_size=64``. Values are TOML; strings need no quotes.
            ``optimizer.`` and ``schedule.`` stand for all selected optimizers and schedules. A
            name with a dot is quoted: ``optimizers."a.b".lr=0.1``.
        optimizers: selected optimizers; None: all.
        schedules: selected schedules; None: all.
        renamed_keys: former name of a table: its present name.

    Raises:
        ExperimentError: a setting is not key=value, or its key passes through something that is not
            a table.
    """
    changed = copy.deepcopy(table)
    chosen = {"optimizer": optimizers, "schedule": schedules}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        first, *rest = _parts(key)
        first = renamed_keys.get(first, first)
        if not equals or not text or not all((first, *rest)):
            raise ExperimentError(
                f"--set is {setting!r}, allowed is key=value, as in --set optimizer.lr=0.25"
            )
        value = _value(text)
        if first in _CHOSEN and rest:
            tables = changed.get(_CHOSEN[first], {})
            for name in chosen[first] or tables:
                if name in tables:  # unknown names are reported when the runs are made
                    _put(tables[name], rest, value, setting)
        else:
            _put(changed, [first, *rest], value, setting)
    return changed


def _parts(key: str) -> list[str]:
    """Return the names in a key, which may be quoted as in TOML."""
    if '"' not in key and "'" not in key:
        return key.split(".")
    try:
        table: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return [""]
    parts = []
    while isinstance(table, dict):
        ((name, table),) = table.items()
        parts.append(name)
    return parts


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _put(table: dict[str, Any], keys: list[str], value: Any, setting: str) -> None:
    *way, last = keys
    for key in way:
        if table.get(key) is None:  # the recipe has no such table
            table[key] = {}
        table = table[key]
        if not isinstance(table, dict):
            raise ExperimentError(f"--set {setting}: {key} is {table!r}, it has no keys of its own")
    table[last] = value
