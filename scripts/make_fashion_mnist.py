"""Make the embedded subset of Fashion-MNIST from Debian's package dataset-fashion-mnist.

    apt-get install dataset-fashion-mnist
    python scripts/make_fashion_mnist.py

The subset has the first images of every class of the official training and test split, in their
order. The output has the same bytes on every machine. The script needs numpy.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from reproducible_gzip import compress

Bytes = NDArray[np.uint8]
ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "bench/src/apollo_bench/workloads/image_classification/embedded/fashion_mnist"
SOURCE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = 10
# 8000 + 2000 images take about 4.4 MB; at most 5 MB are allowed
PER_CLASS = {"train": 800, "t10k": 200}
LICENCE = """\
The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""
README = """\
# A subset of Fashion-MNIST

{train} training and {test} test images, 28 x 28 grey values, ten classes of equal size: the first
{train_each} (train) and {test_each} (t10k) images of every class of the official splits of
[Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) (Xiao, Rasul and Vollgraf, 2017;
MIT licence, see LICENSE), in their official order, in the official IDX format.

Made from Debian's package `dataset-fashion-mnist` by `scripts/make_fashion_mnist.py`, which writes
the same bytes each time. SHA256SUMS is checked whenever the data are read.
"""


def read(path: Path, header: int) -> tuple[bytes, Bytes]:
    content = gzip.decompress(path.read_bytes())
    return content[:header], np.frombuffer(content, np.uint8, offset=header)


def write(path: Path, header: bytes, count: int, values: Bytes) -> None:
    path.write_bytes(
        compress(header[:4] + count.to_bytes(4, "big") + header[8:] + values.tobytes())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--target", type=Path, default=TARGET)
    arguments = parser.parse_args()
    arguments.target.mkdir(parents=True, exist_ok=True)
    names = []
    for split, each in PER_CLASS.items():
        images_name, labels_name = f"{split}-images-idx3-ubyte.gz", f"{split}-labels-idx1-ubyte.gz"
        image_header, images = read(arguments.source / images_name, 16)
        label_header, labels = read(arguments.source / labels_name, 8)
        images = images.reshape(len(labels), -1)
        chosen = np.sort(
            np.concatenate([np.flatnonzero(labels == c)[:each] for c in range(CLASSES)])
        )
        if len(chosen) != each * CLASSES:
            raise SystemExit(f"{labels_name}: fewer than {each} images of some class")
        write(arguments.target / images_name, image_header, len(chosen), images[chosen])
        write(arguments.target / labels_name, label_header, len(chosen), labels[chosen])
        names += [images_name, labels_name]
    sums = [
        f"{hashlib.sha256((arguments.target / name).read_bytes()).hexdigest()}  {name}\n"
        for name in sorted(names)
    ]
    (arguments.target / "SHA256SUMS").write_text("".join(sums))
    (arguments.target / "LICENSE").write_text(LICENCE)
    (arguments.target / "README.md").write_text(
        README.format(
            train=PER_CLASS["train"] * CLASSES,
            test=PER_CLASS["t10k"] * CLASSES,
            train_each=PER_CLASS["train"],
            test_each=PER_CLASS["t10k"],
        )
    )
    total = sum(path.stat().st_size for path in arguments.target.iterdir())
    print(f"{arguments.target}: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
