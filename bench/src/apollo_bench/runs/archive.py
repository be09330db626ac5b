"""Archives of finished runs: text files, so that git shows what changed.

``runs.json`` holds the content of ``run.json`` and ``result.json`` of every run; what all runs have
in common is stored once. ``evaluations.csv`` has one line per evaluation. ``curvature.csv`` has one
line per measurement of all tensors, for runs with ``--diagnostics``. An archive holds no weights
and no paths of a machine. The tables are read and written with ``csv``, not pandas: a record lacks
the keys whose cells are empty, and whole numbers stay whole beside them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from apollo_bench.atomic_write import write_atomically
from apollo_bench.errors import ExperimentError
from apollo_bench.runs import compatibility
from apollo_bench.runs.curvature_log import Curvature, curvature_of
from apollo_bench.runs.run_directory import Record, RunDirectory
from apollo_qn.diagnostics import TensorDiagnostics

RUNS, EVALUATIONS, CURVATURE = "runs.json", "evaluations.csv", "curvature.csv"
_FORMAT = 1
_POSITION_COLUMNS = ("run", "step", "epoch")  # first columns of evaluations.csv
_TIME_COLUMNS = ("seconds", "optimizer_ms", "step_ms")  # its last columns


class Archived(NamedTuple):
    """A run of an archive."""

    path: Path  # folder of the archive, with the run's name
    manifest: Record
    result: Record
    evaluations: list[Record]
    curvature: list[Curvature]


def write(directories: Iterable[RunDirectory], out: Path) -> int:
    """Write an archive; an existing archive is replaced, other files are not.

    Example:
        >>> runs = [RunDirectory(path) for path in Path("runs/mine/runs").glob("*")]
        >>> write(runs, Path("results/mine"))
        0

    Args:
        directories: directories of finished runs.
        out: folder of the archive.

    Returns:
        Number of runs in the archive.

    Raises:
        ExperimentError: a run is unfinished or damaged, or ``out`` holds runs or other files of
            these names.
    """
    _check_out(out)
    manifests, results, lines = {}, {}, []
    curvature: dict[str, list[Curvature]] = {}
    for directory in directories:
        label = directory.spec().label
        result = directory.verdict()
        if result is None:
            raise ExperimentError(
                f"{directory.path}: not finished; run the command that started it again"
            )
        if label in manifests:
            raise ExperimentError(f"{directory.path}: a second run of the name {label}")
        records = directory.complete_records(result)
        manifests[label] = _anonymous(directory.read())
        results[label] = {**result, "time": _rounded(result["time"])}
        lines += [
            {"run": label, **{key: value for key, value in record.items() if key != "kind"}}
            for record in records
            if record["kind"] == "evaluation"
        ]
        if found := curvature_of(directory):
            curvature[label] = found
    common = _common(list(manifests.values()))
    runs = [
        {"run": label, "manifest": _without(manifest, common), "result": results[label]}
        for label, manifest in manifests.items()
    ]
    # one line per run, so that a change of one run changes one line
    run_lines = ",\n".join(json.dumps(run, allow_nan=False) for run in runs)
    tables = {EVALUATIONS: _table(lines).encode()}
    if curvature:
        tables[CURVATURE] = _curvature_table(curvature).encode()
    # the checksums tie the files together
    sums = {name: hashlib.sha256(table).hexdigest() for name, table in tables.items()}
    head = {"format": _FORMAT, **sums, "common": common}
    out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_atomically(out / name, table)
    begun = json.dumps(head, indent=1)[:-2]
    write_atomically(out / RUNS, f'{begun},\n "runs": [\n{run_lines}\n]}}\n'.encode())
    if not curvature:
        (out / CURVATURE).unlink(missing_ok=True)
    return len(runs)


def _check_out(out: Path) -> None:
    if compatibility.find_run_directories(out):
        raise ExperimentError(
            f"--out is {out}, which holds runs; a report would find them twice: choose another "
            "folder"
        )
    there = [name for name in (RUNS, EVALUATIONS, CURVATURE) if (out / name).exists()]
    if there and not is_archive(out):
        raise ExperimentError(
            f"{out / there[0]}: not of an archive, and would be overwritten; choose another --out"
        )


def is_archive(folder: Path) -> bool:
    """Return whether runs.json is of an archive, even if a table was lost or is damaged."""
    try:
        content = json.loads((folder / RUNS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"format", "common", "runs"} <= content.keys()


def read(folder: Path) -> list[Archived]:
    """Return the runs of an archive; none if the folder is no archive.

    Example:
        >>> [run.result["verdict"] for run in read(Path("runs/compare"))][0]
        'finished'

    Args:
        folder: folder with runs.json.

    Raises:
        ExperimentError: the archive is damaged, or of a later version.
    """
    path = folder / RUNS
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ExperimentError(
                f"{path}: format is {content['format']!r}, this version reads {_FORMAT}"
            )
        lines = _evaluations(_verified_table(folder / EVALUATIONS, content[EVALUATIONS]))
        curvature: dict[str, list[Curvature]] = {}
        if CURVATURE in content:
            curvature = _curvatures(_verified_table(folder / CURVATURE, content[CURVATURE]))
        labels = {run["run"] for run in content["runs"]}
        if strange := sorted({*lines, *curvature} - labels):
            raise ExperimentError(f"{folder}: a table has runs that {RUNS} lacks: {strange[0]}")
        return [
            Archived(
                folder / run["run"],
                _merged(content["common"], run["manifest"]),
                run["result"],
                lines.get(run["run"], []),
                curvature.get(run["run"], []),
            )
            for run in content["runs"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExperimentError(f"{folder}: damaged archive ({error!r})") from None


def _verified_table(path: Path, digest: str) -> str:
    table = path.read_bytes()
    if hashlib.sha256(table).hexdigest() != digest:
        raise ExperimentError(
            f"{path}: does not match {RUNS}; write the archive again with `apollo-bench archive`"
        )
    return table.decode()


def _anonymous(manifest: Record) -> Record:
    """Return a manifest without the paths of the machine."""
    command = [_anonymous_word(word) for word in manifest["command"]]
    return {
        **manifest,
        "data": {**manifest["data"], "folder": None},
        "code": [{**source, "folder": None} for source in manifest.get("code", [])],
        "command": ["apollo-bench", *command[1:]],
    }


def _anonymous_word(word: str) -> str:
    """Return the last name of a path that reveals a location, also of ``--option=path``."""
    option, equals, value = word.rpartition("=")
    path = Path(value)
    return f"{option}{equals}{path.name}" if path.is_absolute() or ".." in path.parts else word


def _rounded(times: Record) -> Record:
    return {key: None if value is None else round(value, 3) for key, value in times.items()}


def _table(lines: list[Record]) -> str:
    metrics = dict.fromkeys(
        key for line in lines for key in line if key not in (*_POSITION_COLUMNS, "time")
    )
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*_POSITION_COLUMNS, *metrics, *_TIME_COLUMNS])
    for line in lines:
        times = _rounded(line["time"])
        values = [line.get(key, "") for key in metrics]
        position = [line[key] for key in _POSITION_COLUMNS]
        writer.writerow([*position, *values, *(times.get(key) for key in _TIME_COLUMNS)])
    return buffer.getvalue()


def _evaluations(table: str) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for row in csv.DictReader(io.StringIO(table)):
        numbers = {key: float(value) for key, value in row.items() if key != "run" and value}
        times = {key: numbers.pop(key, None) for key in _TIME_COLUMNS}
        record = {**numbers, "step": int(row["step"]), "time": times}
        found.setdefault(row["run"], []).append(record)
    return found


def _curvature_table(found: dict[str, list[Curvature]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["run", "at_step", "epoch", *(field.name for field in fields(TensorDiagnostics))]
    )
    for label, curvature in found.items():
        for one in curvature:
            # repr keeps every digit of a float
            writer.writerow([label, one.step, one.epoch, *asdict(one.tensors).values()])
    return buffer.getvalue()


def _curvatures(table: str) -> dict[str, list[Curvature]]:
    found: dict[str, list[Curvature]] = {}
    for row in csv.DictReader(io.StringIO(table)):
        label, step, epoch = row.pop("run"), int(row.pop("at_step")), float(row.pop("epoch"))
        numbers: dict[str, Any] = {
            key: float(value) if value else None for key, value in row.items() if key != "name"
        }
        tensors = TensorDiagnostics(
            **{**numbers, "numel": int(row["numel"]), "step": int(row["step"])}, name=row["name"]
        )
        found.setdefault(label, []).append(Curvature(step, epoch, tensors))
    return found


def _common(records: list[Record]) -> Record:
    """Return the entries that are equal in all records."""
    if not records:
        return {}
    same: dict[str, Any] = {}
    for key, value in records[0].items():
        if not all(key in record for record in records):
            continue
        values = [record[key] for record in records]
        if all(one == value for one in values):
            same[key] = value
        elif all(isinstance(one, dict) for one in values):
            same[key] = _common(values)
    return same


def _without(record: Record, common: Record) -> Record:
    rest = {}
    for key, value in record.items():
        if key not in common:
            rest[key] = value
        elif value != common[key]:
            rest[key] = _without(value, common[key])
    return rest


def _merged(common: Record, own: Record) -> Record:
    merged = dict(common)
    for key, value in own.items():
        shared = common.get(key)
        merged[key] = _merged(shared, value) if isinstance(shared, dict) else value
    return merged
