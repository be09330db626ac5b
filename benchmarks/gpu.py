"""Test and time the Triton kernel on a GPU, in one call of less than nine minutes.

    python benchmarks/gpu.py --out FOLDER [--device cuda] [--only PART ...]

It needs torch with Triton and numpy, and for the tests pytest, pytest-timeout, hypothesis and
allpairspy. It installs nothing and writes to FOLDER only. Each part is a process with its own time
limit. A part writes its results to FOLDER as soon as it has them; if one part fails, the others
still run:

    about        versions and device
    tests        tests/test_cuda*.py, then tests/backends/test_backends.py with the fused back end
    bench:SET    median step times of the optimizers, which alternate
    sweep:SET    the same of Apollo with other tunables, beside fused AdamW
    compiled:SET AdamW compiled for one set, last because compiling takes long

FOLDER/summary.txt then has all tables, and which of the criteria are met.

--device cpu --quick tries the script itself on tiny sets.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Both packages and the tests are used from this checkout; nothing needs to be installed.
SOURCES = [str(ROOT / "src"), str(ROOT / "bench/src"), str(ROOT)]
sys.path[:0] = SOURCES

TOTAL = 530.0  # seconds; the rest of nine minutes is for the machine
SETS = ["resnet-110", "resnext-50", "transformer-base", "decoder-1.3b"]
SWEPT = ["resnet-110", "transformer-base", "decoder-1.3b"]
COMPILED_SET = "resnext-50"  # compiling the steps of the others takes more than a minute each
QUICK = ["many-tensors/1000"]
PEER, REFERENCE, MINE, COMPILED = (
    "AdamW fused",
    "Apollo reference",
    "Apollo fused",
    "AdamW compiled",
)
OPTIMIZERS = [PEER, "AdamW foreach", REFERENCE, "Apollo foreach", MINE, "ApolloW fused"]
OPTIMIZERS += ["Apollo fused belief"]

# Largest step time relative to fused AdamW, on an H200.
MAX_RATIOS = {"resnet-110": 1.0, "transformer-base": 1.15, "decoder-1.3b": 1.45}
MIN_BANDWIDTH = 0.85  # of a copy's, of the largest set with 10 values moved per parameter
MIN_SPEEDUP = 10.0  # over the reference back end


@dataclass(frozen=True)
class Tunables:
    """Constants of ``launch_schedule`` and ``kernel`` that the speed depends on."""

    run: int
    window: float  # 1e9: one window for everything
    block: int
    warps: int


def tunables(shipped: Tunables) -> list[Tunables]:
    """Return the tunables to try: one changed at a time.

    The shipped ones come first and last; their difference shows the noise.
    """
    found = [shipped]
    for run in (2048, 4096, 16384):
        found.append(Tunables(run, shipped.window, shipped.block, shipped.warps))
    for window in (0.15, 0.6, 1e9):
        found.append(Tunables(shipped.run, window, shipped.block, shipped.warps))
    for block, warps in ((1024, 4), (2048, 8), (2048, 4)):
        found.append(Tunables(shipped.run, shipped.window, block, warps))
    return [*dict.fromkeys(found), shipped]


def write(path: Path, record: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


# The parts; each runs in its own process.


def about(device: str, _quick: bool, out: Path) -> None:
    import platform

    import torch

    import apollo_qn
    from apollo_bench.steptime import timing
    from apollo_qn.backends import cpu, triton

    write(
        out / "about.json",
        {
            "command": " ".join(sys.argv),
            "device": timing.timer_for(device).about(),
            "torch": torch.__version__,
            "apollo_qn": apollo_qn.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "CPU kernel unavailable because": cpu.why_not(),
            "Triton kernel unavailable because": triton.why_not(),
        },
    )


def bench(device: str, name: str, out: Path, optimizers: list[str], seconds: float) -> None:
    import torch

    from apollo_bench.steptime import candidates, measurement, parameter_sets, timing

    where = timing.timer_for(device)
    (chosen,) = parameter_sets.choose_sets([name], where.device.type)
    result = measurement.measure(
        chosen,
        candidates.choose_candidates(optimizers, where.device.type),
        repeats=100,
        budget=seconds,
        dtype=torch.float32,
        seed=0,
        report_progress=lambda *_: None,
        stop=lambda: False,
        timer=where,
    )
    rows = []
    for taken in result.taken:
        row: dict[str, Any] = {"name": taken.name, "unavailable": taken.unavailable}
        if taken.times:
            copy = result.copy_bandwidth
            row |= {
                "milliseconds": taken.milliseconds,
                "quartiles": taken.quartiles,
                "ratio": taken.ratio,
                "share of a copy, 7 values": result.bandwidth(taken) / copy,
                "share of a copy, 10 values": result.bandwidth(taken, twice=True) / copy,
                "speedup over the reference": result.speedup_over_reference(taken),
                "growth in a step": taken.peak_bytes,
                "rounds": len(taken.times),
            }
        rows.append(row)
    kind = "compiled" if COMPILED in optimizers else "bench"
    record = {"rows": rows, "copy, GB/s": result.copy_bandwidth / 1e9, **result.as_record()}
    write(out / f"{kind}-{name.replace('/', '-')}.json", record)


def sweep(device: str, name: str, out: Path) -> None:
    import torch

    from apollo_bench.steptime import parameter_sets, timing
    from apollo_qn import Apollo
    from apollo_qn.backends.triton import kernel as kernel
    from apollo_qn.backends.triton import launch_schedule as launch

    where = timing.timer_for(device)
    (chosen,) = parameter_sets.choose_sets([name], where.device.type)
    draw = torch.Generator(where.device).manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=where.device)

    params = [torch.nn.Parameter(drawn(shape).mul_(0.05)) for shape in chosen.shapes()]
    for p in params:
        p.grad = drawn(tuple(p.shape)).mul_(0.01)
    peer = torch.optim.AdamW(params, lr=0.0, fused=True)

    def median(step: Callable[[], object], rounds: int = 25) -> tuple[float, float]:
        """Return the median time of a step, and of its ratio to the peer's in the same round."""
        for _ in range(3):
            step()
            peer.step()
        times, ratios = [], []
        for _ in range(rounds):
            times.append(where.milliseconds(step))
            ratios.append(times[-1] / where.milliseconds(peer.step))
        return statistics.median(times), statistics.median(ratios)

    shipped = Tunables(launch.RUN, launch.WINDOW, kernel.BLOCK, kernel.WARPS)
    rows: list[dict[str, Any]] = []
    for tried in tunables(shipped):
        launch.RUN, launch.WINDOW = tried.run, tried.window
        kernel.BLOCK, kernel.WARPS = tried.block, tried.warps
        try:
            # a new optimizer plans its launches again
            optimizer = Apollo(params, lr=0.0, fused=True)
            milliseconds, ratio = median(optimizer.step)
            found: dict[str, Any] = {"milliseconds": milliseconds, "ratio": ratio}
            del optimizer
        except Exception as error:
            found = {"unavailable": f"{type(error).__name__}: {error}"}
        rows.append({**asdict(tried), **found})
        write(out / f"sweep-{name}.json", {"name": name, "rows": rows})
        where.release_memory()


# The main process, which never uses the device.


@dataclass
class Part:
    """A part of the script; it is stopped after ``seconds``, or when the total time is over."""

    name: str
    seconds: float
    command: list[str]


def parts(device: str, quick: bool, out: Path) -> Iterator[Part]:
    this_script = [sys.executable, __file__, "--device", device, "--out", str(out)]
    this_script += ["--quick"] if quick else []

    def part(name: str, seconds: float) -> Part:
        return Part(name, seconds, [*this_script, "--part", name])

    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-rf"]
    yield part("about", 40)
    if quick:
        selected = ["tests/test_functional.py", "-k", "lists"]
        yield Part("tests:quick", 60, [*pytest, *selected])
    else:
        yield Part("tests:cuda", 110, [*pytest, "tests/test_cuda.py", "tests/test_cuda_compile.py"])
        both = ["tests/backends/test_backends.py", "tests/backends/test_device_waits.py"]
        fused = [*both, "-k", "fused"]
        yield Part("tests:back ends", 70, [*pytest, *fused])
    for name in QUICK if quick else SETS:
        yield part(f"bench:{name}", 40)
    if quick:
        return
    for name in SWEPT:
        yield part(f"sweep:{name}", 35)
    yield part(f"compiled:{COMPILED_SET}", 60)


def run_part(part: Part, seconds: float, device: str, out: Path) -> dict[str, Any]:
    """Run a part, end it when its time is over, and return the outcome."""
    log = out / f"{part.name.replace(':', '-').replace('/', '-').replace(' ', '-')}.log"
    environment = {
        **os.environ,
        "APOLLO_QN_TEST_DEVICE": device,
        "PYTHONPATH": os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")]),
    }
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it ends together with the compilers that it starts
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return {
        "part": part.name,
        "exit_status": code,
        "seconds": round(time.monotonic() - start, 1),
        "message": "out of time" if code is None else last[-1] if last else "",
    }


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def criteria(out: Path, done: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return each criterion, the value that was measured, and "pass" or "MISSED"."""
    found = []
    for outcome in done:
        if outcome["part"].startswith("tests"):
            passed = "pass" if outcome["exit_status"] == 0 else "MISSED"
            found.append((outcome["part"], str(outcome["message"]), passed))

    def check(what: str, value: float | None, holds: Callable[[float], bool]) -> None:
        if value is None:
            found.append((what, "not measured", "MISSED"))
        else:
            found.append((what, f"{value:.3g}", "pass" if holds(value) else "MISSED"))

    for name in SETS:
        rows = read(out / f"bench-{name}.json").get("rows", [])
        mine: dict[str, Any] = next((row for row in rows if row["name"] == MINE), {})
        if name in MAX_RATIOS:
            largest = MAX_RATIOS[name]
            what = f"{name}: step <= {largest} x {PEER}"
            check(what, mine.get("ratio"), partial(operator.ge, largest))
        faster = mine.get("speedup over the reference")
        what = f"{name}: >= {MIN_SPEEDUP:g} x the speed of the reference"
        check(what, faster, lambda x: x >= MIN_SPEEDUP)
        if name == SETS[-1]:
            share = bandwidth_at_ten_values(out, name)
            what = f"{name}: >= {MIN_BANDWIDTH:.0%} of a copy's bandwidth at 10 values"
            check(what, share, lambda x: x >= MIN_BANDWIDTH)
    rows = read(out / f"compiled-{COMPILED_SET}.json").get("rows", [])
    row: dict[str, Any] = next((row for row in rows if row["name"] == COMPILED), {})
    check(f"{COMPILED_SET}: {COMPILED} measured", row.get("ratio"), lambda _: True)
    return found


def bandwidth_at_ten_values(out: Path, name: str) -> float | None:
    """Return the bandwidth relative to a copy's; None if it was not measured.

    With one window for everything, 10 values per parameter are moved and not fewer.
    """
    record, rows = (
        read(out / f"bench-{name}.json"),
        read(out / f"sweep-{name}.json").get("rows", []),
    )
    one = [row for row in rows if row["window"] > 100 and "milliseconds" in row]
    if not record or not one:
        return None
    seconds = float(min(row["milliseconds"] for row in one)) / 1e3
    moved: float = 10 * record["element_bytes"] * record["parameters"]
    return moved / seconds / (1e9 * float(record["copy, GB/s"]))


def summary(out: Path, quick: bool, done: list[dict[str, Any]]) -> str:
    device = read(out / "about.json").get("device") or {}
    lines = [str(device.get("title", "the CPU")), ""]
    for outcome in done:
        lines.append(f"{outcome['part']:26}{outcome['seconds']:7.1f} s  {outcome['message']}"[:120])
    for path in sorted([*out.glob("bench-*.json"), *out.glob("compiled-*.json")]):
        record = read(path)
        lines += ["", f"{record['title']}; a copy moves {record['copy, GB/s']:.0f} GB/s"]
        lines += [f"  {'':22}{'ms':>9}{'ratio':>8}{'7 values':>9}{'10 values':>10}{'speedup':>8}"]
        for row in record["rows"]:
            if row["unavailable"] is not None or "ratio" not in row:
                lines.append(f"  {row['name']:22} {row['unavailable']}")
                continue
            faster = row["speedup over the reference"]
            lines.append(
                f"  {row['name']:22}{row['milliseconds']:9.3f}{row['ratio']:8.2f}"
                f"{row['share of a copy, 7 values']:9.0%}{row['share of a copy, 10 values']:10.0%}"
                f"{'' if faster is None else f'{faster:.1f}':>8}"
            )
    for path in sorted(out.glob("sweep-*.json")):
        record = read(path)
        lines += ["", f"{record['name']}: run, window, block, warps"]
        for row in record["rows"]:
            settings = f"{row['run']:6}{row['window']:8.2g}{row['block']:6}{row['warps']:3}"
            if "ratio" in row:
                lines.append(f"  {settings}{row['milliseconds']:10.3f} ms{row['ratio']:8.2f}")
            else:
                lines.append(f"  {settings}  {row['unavailable']}"[:120])
    if not quick:
        lines += ["", "The criteria"]
        lines += [
            f"  {verdict:8}{what}: {value}"[:120] for what, value, verdict in criteria(out, done)
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or, with --quick, cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sets, no sweep, no criteria")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="parts, by the beginning of their names"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device, quick, out = arguments.device, arguments.quick, arguments.out.resolve()
    if arguments.part:
        kind, _, name = arguments.part.partition(":")
        if kind == "about":
            about(device, quick, out)
        elif kind == "bench":
            bench(device, name, out, OPTIMIZERS, 1.0 if quick else 15.0)
        elif kind == "compiled":
            bench(device, name, out, [PEER, COMPILED], 5.0)
        else:
            sweep(device, name, out)
        return 0
    if not quick and not device.startswith("cuda"):
        parser.error(f"--device {device} needs --quick; without it a GPU is needed")
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    done: list[dict[str, Any]] = []
    for part in parts(device, quick, out):
        if not part.name.startswith(tuple(arguments.only)):
            continue
        left = TOTAL - (time.monotonic() - start)
        if left < 5:
            done.append(
                {"part": part.name, "exit_status": None, "seconds": 0.0, "message": "no time left"}
            )
        else:
            done.append(run_part(part, min(part.seconds, left), device, out))
        write(out / "parts.json", done)
        # complete up to this part, also if the script is stopped
        (out / "summary.txt").write_text(summary(out, quick, done))
        print(f"{part.name}: {done[-1]['message']}", file=sys.stderr, flush=True)
        if part.name == "about" and done[-1]["exit_status"] != 0:
            break  # there is no such device
    print((out / "summary.txt").read_text())
    return int(not done or any(outcome["exit_status"] != 0 for outcome in done))


if __name__ == "__main__":
    sys.exit(main())
