"""All that is to be known of the Triton kernel on a GPU, in one call of less than nine minutes.

    python benchmarks/gpu.py --out FOLDER [--device cuda] [--only PART ...]

Needs torch with Triton, numpy, and for the tests pytest, pytest-timeout and hypothesis; nothing is
installed, nothing but FOLDER is written. Parts, each a process of its own with a time of its own;
what a part has found lies in FOLDER as soon as it is known, and where one fails the others go on:

    about        versions and device
    tests        tests/test_cuda.py, then tests/backends/test_backends.py with the fused back end
    bench:SET    step times of the contenders, medians of rounds in turn
    sweep:SET    the same of Apollo alone, with other tunables, beside fused AdamW
    compiled:SET AdamW compiled, last because compiling takes long

At the end the bars, passed or missed, and a table (FOLDER/summary.txt).

--device cpu --quick is a look at the script itself, on tiny sets.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

TOTAL = 530.0  # seconds; the rest of nine minutes is for the machine
SETS = ["resnet-110", "resnext-50", "transformer-base", "decoder-1.3b"]
SWEPT = ["resnet-110", "transformer-base", "decoder-1.3b"]
QUICK = ["many-tensors/1000"]
PEER, RULE, MINE, COMPILED = "AdamW fused", "Apollo rule", "Apollo fused", "AdamW compiled"
CONTENDERS = [PEER, "AdamW foreach", RULE, "Apollo foreach", MINE, "ApolloW fused"]
CONTENDERS += ["Apollo fused belief"]

# Against fused AdamW, on an H200.
RATIOS = {"resnet-110": 1.0, "transformer-base": 1.15, "decoder-1.3b": 1.45}
SHARE_OF_A_COPY = 0.85  # at 10 words, of the largest set
TIMES_THE_RULE = 10.0  # its speed


@dataclass(frozen=True)
class Tunables:
    """Of ``triton_launch`` and ``triton_kernel``."""

    run: int
    window: float  # 1e9: one window
    block: int
    warps: int


def tunables(as_is: Tunables) -> list[Tunables]:
    """One changed at a time, the shipped ones first and again last: they tell the noise."""
    found = [as_is]
    for run in (2048, 8192, 16384):
        found.append(Tunables(run, as_is.window, as_is.block, as_is.warps))
    for window in (0.3, 0.6, 0.9, 1e9):
        found.append(Tunables(as_is.run, window, as_is.block, as_is.warps))
    for block, warps in ((1024, 4), (2048, 8), (2048, 4)):
        found.append(Tunables(as_is.run, as_is.window, block, warps))
    return [*dict.fromkeys(found), as_is]


def write(path: Path, record: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


# The parts, each in its own process.


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
            "no CPU kernel, because": cpu.why_not(),
            "no Triton kernel, because": triton.why_not(),
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
        where=where,
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
                "share of a copy, 7 words": result.bandwidth(taken) / copy,
                "share of a copy, 10 words": result.bandwidth(taken, twice=True) / copy,
                "times the rule's speed": result.faster_than_rule(taken),
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
    from apollo_qn.backends.triton import kernel as triton_kernel
    from apollo_qn.backends.triton import schedule as triton_launch

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
        """Of the step, and of its ratio to the peer's of the same round."""
        for _ in range(3):
            step()
            peer.step()
        times, ratios = [], []
        for _ in range(rounds):
            times.append(where.milliseconds(step))
            ratios.append(times[-1] / where.milliseconds(peer.step))
        return statistics.median(times), statistics.median(ratios)

    as_is = Tunables(
        triton_launch.RUN, triton_launch.WINDOW, triton_kernel.BLOCK, triton_kernel.WARPS
    )
    rows: list[dict[str, Any]] = []
    for chosen_ones in tunables(as_is):
        triton_launch.RUN, triton_launch.WINDOW = chosen_ones.run, chosen_ones.window
        triton_kernel.BLOCK, triton_kernel.WARPS = chosen_ones.block, chosen_ones.warps
        try:
            # a new one plans its launches anew
            optimizer = Apollo(params, lr=1e-6, fused=True)
            milliseconds, ratio = median(optimizer.step)
            found: dict[str, Any] = {"milliseconds": milliseconds, "ratio": ratio}
            del optimizer
        except Exception as error:
            found = {"unavailable": f"{type(error).__name__}: {error}"}
        rows.append({**asdict(chosen_ones), **found})
        write(out / f"sweep-{name}.json", {"name": name, "rows": rows})
        where.give_back()


# The conductor, which never touches the device.


@dataclass
class Part:
    """Its process may take ``seconds``, if that much is left."""

    name: str
    seconds: float
    command: list[str]


def parts(device: str, quick: bool, out: Path) -> Iterator[Part]:
    again = [sys.executable, __file__, "--device", device, "--out", str(out)]
    again += ["--quick"] if quick else []

    def part(name: str, seconds: float) -> Part:
        return Part(name, seconds, [*again, "--part", name])

    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-rf"]
    yield part("about", 40)
    if quick:
        selected = ["tests/test_functional.py", "-k", "lists"]
        yield Part("tests:quick", 60, [*pytest, *selected])
    else:
        yield Part("tests:cuda", 110, [*pytest, "tests/test_cuda.py"])
        fused = ["tests/backends/test_backends.py", "-k", "fused"]
        yield Part("tests:back ends", 70, [*pytest, *fused])
    for name in QUICK if quick else SETS:
        yield part(f"bench:{name}", 40)
    if quick:
        return
    for name in SWEPT:
        yield part(f"sweep:{name}", 35)
    for name in SETS:
        yield part(f"compiled:{name}", 60)


def conduct(part: Part, seconds: float, device: str, out: Path) -> dict[str, Any]:
    """Run it, end it when its time is over, and say how it went."""
    log = out / f"{part.name.replace(':', '-').replace('/', '-').replace(' ', '-')}.log"
    environment = {
        **os.environ,
        "APOLLO_QN_TEST_DEVICE": device,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        ),
    }
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # compilers that it starts end with it
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
        "exit": code,
        "seconds": round(time.monotonic() - start, 1),
        "said": "out of time" if code is None else last[-1] if last else "",
    }


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def bars(out: Path, done: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """What was asked, what was found, and whether that is enough."""
    found = []
    for outcome in done:
        if outcome["part"].startswith("tests"):
            passed = "pass" if outcome["exit"] == 0 else "MISSED"
            found.append((outcome["part"], str(outcome["said"]), passed))

    def check(what: str, value: float | None, holds: Callable[[float], bool]) -> None:
        if value is None:
            found.append((what, "not measured", "MISSED"))
        else:
            found.append((what, f"{value:.3g}", "pass" if holds(value) else "MISSED"))

    for name in SETS:
        rows = read(out / f"bench-{name}.json").get("rows", [])
        mine = next((row for row in rows if row["name"] == MINE), {})
        if name in RATIOS:
            most = RATIOS[name]
            what = f"{name}: step <= {most} x {PEER}"
            check(what, mine.get("ratio"), lambda x, most=most: x <= most)
        faster = mine.get("times the rule's speed")
        what = f"{name}: >= {TIMES_THE_RULE:g} x the rule's speed"
        check(what, faster, lambda x: x >= TIMES_THE_RULE)
        if name == SETS[-1]:
            share = share_of_ten_words(out, name)
            what = f"{name}: >= {SHARE_OF_A_COPY:.0%} of a copy's bandwidth at 10 words"
            check(what, share, lambda x: x >= SHARE_OF_A_COPY)
    for name in SETS:
        rows = read(out / f"compiled-{name}.json").get("rows", [])
        row = next((row for row in rows if row["name"] == COMPILED), {})
        check(f"{name}: {COMPILED} measured", row.get("ratio"), lambda _: True)
    return found


def share_of_ten_words(out: Path, name: str) -> float | None:
    """Of a copy's bandwidth, where all is one window: so that 10 words are moved, not fewer."""
    record, rows = (
        read(out / f"bench-{name}.json"),
        read(out / f"sweep-{name}.json").get("rows", []),
    )
    one = [row for row in rows if row["window"] > 100 and "milliseconds" in row]
    if not record or not one:
        return None
    seconds = min(row["milliseconds"] for row in one) / 1e3
    moved: float = 10 * record["element_bytes"] * record["parameters"]
    return moved / seconds / (1e9 * record["copy, GB/s"])


def summary(out: Path, quick: bool, done: list[dict[str, Any]]) -> str:
    device = read(out / "about.json").get("device") or {}
    lines = [str(device.get("title", "the CPU")), ""]
    for outcome in done:
        lines.append(f"{outcome['part']:26}{outcome['seconds']:7.1f} s  {outcome['said']}"[:120])
    for path in sorted([*out.glob("bench-*.json"), *out.glob("compiled-*.json")]):
        record = read(path)
        lines += ["", f"{record['title']}; a copy moves {record['copy, GB/s']:.0f} GB/s"]
        lines += [f"  {'':22}{'ms':>9}{'ratio':>8}{'7 words':>9}{'10 words':>10}{'/ rule':>8}"]
        for row in record["rows"]:
            if row["unavailable"] is not None or "ratio" not in row:
                lines.append(f"  {row['name']:22} {row['unavailable']}")
                continue
            faster = row["times the rule's speed"]
            lines.append(
                f"  {row['name']:22}{row['milliseconds']:9.3f}{row['ratio']:8.2f}"
                f"{row['share of a copy, 7 words']:9.0%}{row['share of a copy, 10 words']:10.0%}"
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
        lines += ["", "The bars"]
        lines += [f"  {verdict:8}{what}: {value}"[:120] for what, value, verdict in bars(out, done)]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or, with --quick, cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sets, no sweep, no bars")
    parser.add_argument("--only", nargs="+", default=[""], help="parts by the start of their name")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device, quick, out = arguments.device, arguments.quick, arguments.out.resolve()
    if arguments.part:
        kind, _, name = arguments.part.partition(":")
        if kind == "about":
            about(device, quick, out)
        elif kind == "bench":
            bench(device, name, out, CONTENDERS, 1.0 if quick else 15.0)
        elif kind == "compiled":
            bench(device, name, out, [PEER, COMPILED], 5.0)
        else:
            sweep(device, name, out)
        return 0
    if not quick and not device.startswith("cuda"):
        parser.error(f"--device {device} needs --quick: the whole of it is for a GPU")
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    done: list[dict[str, Any]] = []
    for part in parts(device, quick, out):
        if not part.name.startswith(tuple(arguments.only)):
            continue
        left = TOTAL - (time.monotonic() - start)
        if left < 5:
            done.append({"part": part.name, "exit": None, "seconds": 0.0, "said": "no time left"})
        else:
            done.append(conduct(part, min(part.seconds, left), device, out))
        write(out / "parts.json", done)
        # whoever stops it finds what there is
        (out / "summary.txt").write_text(summary(out, quick, done))
        print(f"{part.name}: {done[-1]['said']}", file=sys.stderr, flush=True)
        if part.name == "about" and done[-1]["exit"] != 0:
            break  # there is no such device
    print((out / "summary.txt").read_text())
    return int(not done or any(outcome["exit"] != 0 for outcome in done))


if __name__ == "__main__":
    sys.exit(main())
