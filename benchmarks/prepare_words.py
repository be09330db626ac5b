"""Memory and time of preparing a corpus of any size in the format of One Billion Words.

    python benchmarks/prepare_words.py [--millions 5] [--workers 2] [--json FILE]

The corpus has a vocabulary of the standard size, 793,471 words, drawn by Zipf's law; 3 words in
1000 are unknown. With enough tokens its shards are as large as the benchmark's. The preparation
runs in processes of its own. Their memory is read from Linux every 50 ms: the resident set size,
and the proportional set size, which divides a shared page between its processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy

from apollo_bench.runs.run_directory import describe_machine
from apollo_bench.workloads.language_modeling.one_billion_word import HELD_OUT, TRAIN

VOCABULARY = 793_471  # words
BENCHMARK = 0.8e9  # tokens of the benchmark
SHARD = 8_000_000  # tokens of one of its shards
HELD_OUT_SHARD = 160_000
SENTENCE = 25  # words
CHILD = """
import sys
from pathlib import Path
from apollo_bench.workloads.language_modeling.one_billion_word import prepare

if __name__ == "__main__":
    raw, out, vocabulary = map(Path, sys.argv[1:4])
    prepare(raw, out, vocabulary if vocabulary.name else None, int(sys.argv[4]), lambda *_: None)
"""


def generate(folder: Path, tokens: int) -> int:
    """Write shards and vocabulary, and return the number of tokens, ends of sentences included."""
    generator = numpy.random.default_rng(0)
    letters = numpy.array(list("etaoinshrdlcumwfgypbvkjxqz"))
    lengths = generator.integers(3, 13, VOCABULARY)
    words = [
        f"{''.join(letters[generator.integers(0, 26, length)])}{number}"
        for number, length in enumerate(lengths)
    ]
    words[:3] = ["</S>", "<S>", "<UNK>"]
    (folder / "words.txt").write_text("".join(f"{word}\n" for word in words))
    words += [f"unknown{number}" for number in range(VOCABULARY)]
    probabilities = 1 / numpy.arange(1, VOCABULARY - 2)
    sums = (probabilities / probabilities.sum()).cumsum()
    shards = max(2, round(tokens / SHARD))
    (folder / TRAIN).mkdir()
    (folder / HELD_OUT).mkdir()
    sizes = {
        folder / TRAIN / f"news.en-{number:05}-of-{shards + 1:05}": tokens // shards
        for number in range(1, shards + 1)
    }
    for number in range(2):
        name = f"news.en.heldout-{number:05}-of-00002"
        sizes[folder / HELD_OUT / name] = min(HELD_OUT_SHARD, tokens // 20)
    total = 0
    for path, size in sizes.items():
        with path.open("w") as file:
            sentences = size // (SENTENCE + 1)
            while sentences > 0:
                count = min(sentences, 10_000)
                drawn = 3 + sums.searchsorted(generator.random((count, SENTENCE)))
                drawn[generator.random(drawn.shape) < 0.003] += VOCABULARY - 3
                file.writelines(f"{' '.join(words[word] for word in row)}\n" for row in drawn)
                sentences -= count
                total += count * (SENTENCE + 1)
    return total


class PeakMemory:
    """Peak memory of a process and all its descendants together; a context manager."""

    def __init__(self, process: int) -> None:
        self.resident = self.proportional = self.processes = 0
        self._process = process
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            processes = [self._process]
            for process in processes:
                processes += children(process)
            used = [sizes(process) for process in processes]
            self.resident = max(self.resident, sum(one for one, _ in used))
            self.proportional = max(self.proportional, sum(one for _, one in used))
            self.processes = max(self.processes, len(processes))


def children(process: int) -> list[int]:
    found = []
    try:
        for task in os.listdir(f"/proc/{process}/task"):
            text = Path(f"/proc/{process}/task/{task}/children").read_text()
            found += [int(word) for word in text.split()]
    except OSError:
        pass  # the process has ended
    return found


def sizes(process: int) -> tuple[int, int]:
    """Return the resident and the proportional set size of a process in bytes."""
    found = {"Rss": 0, "Pss": 0}
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = 1024 * int(rest.split()[0])
    except OSError:
        pass  # the process has ended
    return found["Rss"], found["Pss"]


def measure(folder: Path, vocabulary: str, workers: int, tokens: int) -> dict[str, Any]:
    script = folder / "prepare.py"
    script.write_text(CHILD)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, str(script), str(folder), out, vocabulary, str(workers)]
        start = time.perf_counter()
        with subprocess.Popen(command) as child, PeakMemory(child.pid) as memory:
            if child.wait():
                raise SystemExit(child.returncode)
            seconds = time.perf_counter() - start
        counts = json.loads((Path(out) / "corpus.json").read_text())
    assert counts["tokens"] == tokens
    return {
        "tokens": tokens,
        "unknown_words": counts["counts"]["unknown_words"],
        "workers": workers,
        "processes": memory.processes,
        "peak_proportional_mb": round(memory.proportional / 1e6, 1),
        "peak_resident_mb": round(memory.resident / 1e6, 1),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds),
        "minutes_for_the_benchmark": round(BENCHMARK / tokens * seconds / 60, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--millions", type=float, default=5, help="tokens to generate")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="folder for the corpus; default: a temporary one"
    )
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        tokens = generate(folder, round(1e6 * arguments.millions))
        found = {
            "command": " ".join(["python", *sys.argv]),
            "python": platform.python_version(),
            "machine": describe_machine(),
            "standard vocabulary": measure(
                folder, str(folder / "words.txt"), arguments.workers, tokens
            ),
            "vocabulary from the text": measure(folder, "", arguments.workers, tokens),
        }
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
