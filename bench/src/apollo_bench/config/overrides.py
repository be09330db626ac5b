"""``--set key=value``: another value for anything that a recipe says."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from typing import Any

from apollo_bench.errors import ExperimentError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# what stands for those tables of a kind that the command line has chosen
_CHOSEN = {"optimizer": "optimizers", "schedule": "schedules"}


def override(
    table: dict[str, Any],
    settings: Iterable[str],
    optimizers: list[str] | None = None,
    schedules: list[str] | None = None,
) -> dict[str, Any]:
    """A recipe's table with other values; the schema has still to judge them.

    Args:
        table: of the recipe; stays as it is.
        settings: as ``train.batch_size=64``. Values are TOML's; text needs no quotation marks.
            ``optimizer.`` and ``schedule.`` stand for all that are chosen.
        optimizers: which are chosen; None: all.
        schedules: likewise.

    Raises:
        ExperimentError: not a key and a value, or the key goes through something that is no table.
    """
    changed = copy.deepcopy(table)
    chosen = {"optimizer": optimizers, "schedule": schedules}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        first, *rest = key.split(".")
        if not equals or not text or not all((first, *rest)):
            raise ExperimentError(
                f"--set is {setting!r}, allowed is key=value, as in --set optimizer.lr=0.25"
            )
        value = _value(text)
        if first in _CHOSEN and rest:
            tables = changed.get(_CHOSEN[first], {})
            for name in chosen[first] or tables:
                if name in tables:  # that there is no such name is told when the runs are made
                    _put(tables[name], rest, value, setting)
        else:
            _put(changed, [first, *rest], value, setting)
    return changed


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _put(table: dict[str, Any], keys: list[str], value: Any, setting: str) -> None:
    *way, last = keys
    for key in way:
        if table.get(key) is None:  # a table that the recipe does not have
            table[key] = {}
        table = table[key]
        if not isinstance(table, dict):
            raise ExperimentError(f"--set {setting}: {key} is {table!r}, it has no keys of its own")
    table[last] = value
