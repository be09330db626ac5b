"""Memory and time of preparing a corpus as large as wanted in the form of One Billion Words.

    python benchmarks/prepare_words.py [--millions 5] [--workers 2] [--json FILE]

Words of the standard number, 793,471, drawn by Zipf's law, 3 in 1000 of them unknown; shards as
large as the benchmark's where there are enough tokens. The preparation runs in processes of its
own. Their memory is taken from Linux every 50 ms: resident, and proportional, which counts a page
that several share once in all.
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

WORDS = 793_471  # of the standard vocabulary
WHOLE = 0.8e9  # tokens of the benchmark
SHARD = 8_000_000  # tokens of one of its shards
HELD_OUT_SHARD = 160_000
SENTENCE = 25  # words
CHILD = """
import sys
from pathlib import Path
from apollo_bench.workloads.language_modeling.one_billion_word import prepare

if __name__ == "__main__":
    raw, out, words = map(Path, sys.argv[1:4])
    prepare(raw, out, words if words.name else None, int(sys.argv[4]), lambda *news: None)
"""


def generate(folder: Path, tokens: int) -> int:
    """Write shards and vocabulary; gives the number of tokens, ends of sentences among them."""
    generator = numpy.random.default_rng(0)
    letters = numpy.array(list("etaoinshrdlcumwfgypbvkjxqz"))
    lengths = generator.integers(3, 13, WORDS)
    words = [
        f"{''.join(letters[generator.integers(0, 26, length)])}{number}"
        for number, length in enumerate(lengths)
    ]
    words[:3] = ["</S>", "<S>", "<UNK>"]
    (folder / "words.txt").write_text("".join(f"{word}\n" for word in words))
    words += [f"unknown{number}" for number in range(WORDS)]
    chances = 1 / numpy.arange(1, WORDS - 2)
    sums = (chances / chances.sum()).cumsum()
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
                drawn[generator.random(drawn.shape) < 0.003] += WORDS - 3
                file.writelines(f"{' '.join(words[word] for word in row)}\n" for row in drawn)
                sentences -= count
                total += count * (SENTENCE + 1)
    return total


class Memory:
    """The most memory that a process and all that it starts have had at one time."""

    def __init__(self, process: int) -> None:
        self.resident = self.proportional = self.processes = 0
        self._process = process
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            family = [self._process]
            for process in family:
                family += children(process)
            used = [sizes(process) for process in family]
            self.resident = max(self.resident, sum(one for one, _ in used))
            self.proportional = max(self.proportional, sum(one for _, one in used))
            self.processes = max(self.processes, len(family))


def children(process: int) -> list[int]:
    found = []
    try:
        for task in os.listdir(f"/proc/{process}/task"):
            text = Path(f"/proc/{process}/task/{task}/children").read_text()
            found += [int(word) for word in text.split()]
    except OSError:
        pass  # it has ended
    return found


def sizes(process: int) -> tuple[int, int]:
    """Resident and proportional bytes."""
    found = {"Rss": 0, "Pss": 0}
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = 1024 * int(rest.split()[0])
    except OSError:
        pass  # it has ended
    return found["Rss"], found["Pss"]


def measure(folder: Path, vocabulary: str, workers: int, tokens: int) -> dict[str, Any]:
    script = folder / "prepare.py"
    script.write_text(CHILD)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, str(script), str(folder), out, vocabulary, str(workers)]
        start = time.perf_counter()
        with subprocess.Popen(command) as child, Memory(child.pid) as memory:
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
        "minutes_for_the_benchmark": round(WHOLE / tokens * seconds / 60, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--millions", type=float, default=5, help="tokens to generate")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for the corpus; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write the result there too")
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
