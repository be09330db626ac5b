"""Make the embedded text from Debian's package wordnet-base.

    apt-get install wordnet-base
    python scripts/make_wordnet.py

The text is that of the definitions and examples of WordNet 3.0, in lower case and tokenized. Each
sentence occurs once; they are shuffled and split. The output has the same bytes on every machine.
The script needs only Python.

    python scripts/make_wordnet.py --whole --target FOLDER

writes every sentence, also those that the repository has no room for.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from pathlib import Path

from reproducible_gzip import compress_lines

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "bench/src/apollo_bench/workloads/language_modeling/embedded/wordnet"
SOURCE = Path("/usr/share/wordnet")
PARTS = ("noun", "verb", "adj", "adv")
SEED = "apollo-qn wordnet"
LENGTHS = range(3, 81)  # tokens; shorter texts are fragments, longer ones are lists
EVALUATED = {"valid": 4_000, "test": 4_000}  # sentences
EMBEDDED = 86_000  # training sentences; the folder then has 1.91 MB, at most 2 MB are allowed
README = """\
# Definitions and examples of WordNet

{train:,} training, {valid:,} validation and {test:,} test sentences: the definitions of
[WordNet 3.0](https://wordnet.princeton.edu) (Princeton University, 2006; see LICENSE) and the
sentences that show its words in use, lower-cased, tokenised, a sentence a line, each once,
shuffled. Of {all:,} such sentences the repository has room for this part. WordNet's text was
changed in these ways and no others.

Made from version 3.0-37 of Debian's package `wordnet-base` by `scripts/make_wordnet.py`, which
writes the same bytes each time. SHA256SUMS is checked whenever the text is read.
"""


def licence(source: Path) -> str:
    """Return the licence: the numbered lines at the beginning of every database file."""
    lines = []
    for line in (source / "data.noun").read_text("ascii").splitlines():
        if not line.startswith("  "):
            break
        lines.append(re.sub(r"^ *\d+ ?", "", line).rstrip())
    return "\n".join(lines).strip() + "\n"


def glosses(source: Path) -> list[str]:
    found = []
    for part in PARTS:
        for line in (source / f"data.{part}").read_text("ascii").splitlines():
            head, bar, gloss = line.partition(" | ")
            if bar and not head.startswith("  "):
                found.append(gloss.strip())
    return found


def sentences(gloss: str) -> list[str]:
    """Return the definitions (separated by semicolons) and examples (quoted) of a gloss."""
    found = re.findall(r'"([^"]*)"', gloss)
    # the source of a quotation, which follows it, is removed too
    definition = re.sub(r'"[^"]*("|$)(\s*-+\s*[^;"]*)?', ";", gloss)
    depth, part = 0, ""
    for character in definition + ";":
        depth = max(0, depth + {"(": 1, ")": -1}.get(character, 0))
        if character == ";" and not depth:
            found.append(part)
            part = ""
        else:
            part += character
    return found


def tokens(sentence: str) -> list[str]:
    return re.findall(r"[a-z]+|\d+(?:[.,]\d+)*|[^\sa-z\d]", sentence.lower().replace("`", "'"))


def order(sentence: str) -> bytes:
    """Return a key whose order is a shuffle, the same in every version of Python."""
    return hashlib.sha256(f"{SEED}\n{sentence}".encode()).digest()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--whole", action="store_true")
    arguments = parser.parse_args()
    arguments.target.mkdir(parents=True, exist_ok=True)
    split = {
        " ".join(words)
        for gloss in glosses(arguments.source)
        for sentence in sentences(gloss)
        if len(words := tokens(sentence)) in LENGTHS
    }
    shuffled = sorted(split, key=order)
    texts, first = {}, 0
    for name, count in EVALUATED.items():
        texts[name] = shuffled[first : first + count]
        first += count
    texts["train"] = shuffled[first : None if arguments.whole else first + EMBEDDED]
    sums = []
    for name in sorted(texts):
        content = compress_lines(texts[name])
        (arguments.target / f"wordnet_{name}.txt.gz").write_bytes(content)
        sums.append(f"{hashlib.sha256(content).hexdigest()}  wordnet_{name}.txt.gz\n")
    (arguments.target / "SHA256SUMS").write_text("".join(sums))
    (arguments.target / "LICENSE").write_text(licence(arguments.source))
    counts = {name: len(lines) for name, lines in texts.items()}
    (arguments.target / "README.md").write_text(README.format(all=len(shuffled), **counts))
    total = sum(path.stat().st_size for path in arguments.target.iterdir())
    size = sum(line.count(" ") + 1 for line in texts["train"])
    print(f"{arguments.target}: {total / 1e6:.3f} MB, {size:,} training words of {counts}")


if __name__ == "__main__":
    main()
