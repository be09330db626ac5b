"""Make the embedded text of WordNet from Debian's package wordnet-base.

    apt-get install wordnet-base
    python scripts/make_wordnet.py

Definitions and examples, lower-cased, tokenised, one a line, each once, in an order that hangs on
their text alone: the same bytes on every machine. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "src/apollo_qn/experiments/data/embedded/wordnet"
SOURCE = Path("/usr/share/wordnet")
COPYRIGHT = Path("/usr/share/doc/wordnet-base/copyright")
# all 164,640 come to 3.5 MB; so many stay below the 2 MB that the text may take
COUNTS = {"train": 66000, "valid": 3000, "test": 3000}
TOKEN = re.compile(r"[a-z0-9]+(?:['.,-][a-z0-9]+)*|[^\sa-z0-9]")
README = """\
# Text of WordNet

{train} training, {valid} validation and {test} test sentences: definitions and examples of
[WordNet 3.0](https://wordnet.princeton.edu) (Princeton University, 2006; see LICENSE), lower-cased,
tokenised, one a line, no sentence twice.

Made from Debian's package `wordnet-base` by `scripts/make_wordnet.py`, which writes the same bytes
each time. SHA256SUMS is checked whenever the data are read.
"""


def sentences(source: Path) -> list[str]:
    """All definitions and examples, as tokens between spaces, in the order of their digests."""
    found = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (source / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):  # the licence
                continue
            gloss = line.partition("|")[2].lower()
            # an example stands between quotation marks, a definition before or between them
            for text in re.split(r'[;:]?\s*"', gloss):
                tokens = TOKEN.findall(text.strip(" ;:"))
                if len(tokens) > 1:
                    found.add(" ".join(tokens))
    return sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--copyright", type=Path, default=COPYRIGHT)
    parser.add_argument("--target", type=Path, default=TARGET)
    arguments = parser.parse_args()
    text = sentences(arguments.source)
    arguments.target.mkdir(parents=True, exist_ok=True)
    sums, start = [], 0
    for split, count in COUNTS.items():
        name = f"{split}.txt.gz"
        buffer = io.BytesIO()
        with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as file:
            file.write("".join(f"{line}\n" for line in text[start : start + count]).encode())
        start += count
        (arguments.target / name).write_bytes(buffer.getvalue())
        sums.append(f"{hashlib.sha256(buffer.getvalue()).hexdigest()}  {name}\n")
    (arguments.target / "SHA256SUMS").write_text("".join(sums))
    licence = arguments.copyright.read_text().partition("License: WordNet3.0\n")[2]
    licence = licence.partition("\n\n")[0]
    lines = [line.strip() for line in licence.splitlines()]
    text_of = "\n".join("" if line == "." else line for line in lines)
    (arguments.target / "LICENSE").write_text(f"{text_of}\n")
    (arguments.target / "README.md").write_text(README.format(**COUNTS))


if __name__ == "__main__":
    main()
