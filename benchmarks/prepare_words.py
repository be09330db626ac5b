"""What `apollo-qn prepare one-billion-word` takes, in time and memory, on a generated corpus.

    python benchmarks/prepare_words.py [--tokens 50000000] [--out FILE.json]

Words are drawn from Zipf's law over a vocabulary of the benchmark's size and divided into shards of
its size (8 M tokens). Memory is the most that all processes together had in use at a time, without
what they share; on paper, the whole benchmark takes as much memory, for a shard is what counts, and
time in proportion to its tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy

WORDS, SHARD, BENCHMARK = 793_471, 8_000_000, 829_250_940


def generate(folder: Path, tokens: int) -> None:
    random = numpy.random.default_rng(0)
    words = numpy.array(["</S>", "<UNK>", *(f"w{i}" for i in range(WORDS - 2))])
    (folder / "1b_word_vocab.txt").write_text("\n".join(words) + "\n")
    training, held_out = (
        folder / f"{name}-monolingual.tokenized.shuffled" for name in ("training", "heldout")
    )
    for path in (training, held_out):
        path.mkdir()
    shards = [(training / f"news.en-{i + 1:05}-of-00100", min(SHARD, tokens - start))
              for i, start in enumerate(range(0, tokens, SHARD))]  # fmt: skip
    shards += [(held_out / f"news.en.heldout-0000{i}-of-00050", 160_000) for i in (0, 1)]
    for path, count in shards:
        drawn = words[2 + (random.zipf(1.1, count) - 1) % (WORDS - 2)]
        with path.open("w") as file:
            for start in range(0, count, 25):
                file.write(" ".join(drawn[start : start + 25]) + "\n")


def memory(pid: int) -> int:
    """Bytes that a process and its children have to themselves."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += 1024 * int(line.split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return total
    return total + sum(memory(int(child)) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        raw.mkdir()
        print("generating", file=sys.stderr)
        generate(raw, arguments.tokens)
        command = [sys.executable, "-m", "apollo_qn.experiments.cli", "prepare", "one-billion-word"]
        command += ["--raw", str(raw), "--out", f"{folder}/out", "--partial"]
        start, most = time.perf_counter(), 0
        process = subprocess.Popen([*command, "--workers", str(arguments.workers)])
        while process.poll() is None:
            most = max(most, memory(process.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        if process.returncode:
            sys.exit(process.returncode)
    speed = arguments.tokens / seconds
    found = {
        "command": ["python", *sys.argv],
        "machine": {"platform": platform.platform(), "cores": len(os.sched_getaffinity(0))},
        "python": platform.python_version(),
        "tokens": arguments.tokens,
        "workers": arguments.workers,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(speed),
        "peak_bytes_of_all_processes": most,
        "whole_benchmark_minutes_extrapolated": round(BENCHMARK / speed / 60, 1),
    }
    print(json.dumps(found, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
