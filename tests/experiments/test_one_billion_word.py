"""From shards of text to one corpus: mapping, resumption after a kill, damage."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest

from apollo_qn.experiments.data import one_billion_word
from apollo_qn.experiments.errors import ExperimentError

WORDS = ["</S>", "<UNK>", "the", "of", "house", "<S>"]
TRAINING = "training-monolingual.tokenized.shuffled"
HELD_OUT = "heldout-monolingual.tokenized.shuffled"
CLI = [sys.executable, "-m", "apollo_qn.experiments.cli"]


def quiet(title: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """The benchmark's layout with three shards of training text, one of them gzipped."""
    root = tmp_path / "raw"
    for folder in (TRAINING, HELD_OUT):
        (root / folder).mkdir(parents=True)
    (root / "1b_word_vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    (root / TRAINING / "news.en-00001-of-00100").write_text("the house\nof the unseen\n")
    (root / TRAINING / "news.en-00002-of-00100.gz").write_bytes(gzip.compress(b"house\n\nof of\n"))
    (root / TRAINING / "news.en-00003-of-00100").write_text("the the\n")
    (root / HELD_OUT / "news.en.heldout-00000-of-00050").write_text("of the house\n")
    (root / HELD_OUT / "news.en.heldout-00001-of-00050").write_text("the house of\n")
    return root


def prepare(raw: Path, out: Path) -> None:
    one_billion_word.prepare(raw, out, None, 2, True, quiet)


def test_shards_become_one_corpus(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(raw, out)
    corpus = one_billion_word.load(out)
    words = corpus.vocabulary.words
    text = " ".join(words[number] for number in corpus.train.read(0, 99))
    assert text == ("the house </S> of the <UNK> </S> house </S> of of </S> the the </S>")
    assert [words[n] for n in corpus.test.read(0, 9)] == ["of", "the", "house", "</S>"]
    assert [words[n] for n in corpus.valid.read(0, 9)] == ["the", "house", "of", "</S>"]
    about = json.loads((out / "news.en-00002-of-00100.json").read_text())
    assert (about["sentences"], about["empty_lines"], about["tokens"]) == (2, 1, 5)
    about = json.loads((out / "news.en-00001-of-00100.json").read_text())
    assert about["unknown"] == 1
    # again: nothing is written anew, and nothing changes
    before = {path: path.stat().st_mtime_ns for path in out.glob("news*")}
    prepare(raw, out)
    assert {path: path.stat().st_mtime_ns for path in out.glob("news*")} == before
    assert one_billion_word.load(out).fingerprint == corpus.fingerprint
    # a shard that has changed is
    (raw / TRAINING / "news.en-00003-of-00100").write_text("the the the\n")
    prepare(raw, out)
    assert one_billion_word.load(out).fingerprint != corpus.fingerprint


def test_a_preparation_that_was_killed_goes_on(raw: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    for number in range(4, 16):
        lines = [" ".join(draw.choices(WORDS[2:], k=20)) for _ in range(20000)]
        (raw / TRAINING / f"news.en-{number:05}-of-00100").write_text("\n".join(lines) + "\n")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    prepare(raw, whole)
    command = [*CLI, "prepare", "one-billion-word", "--raw", str(raw), "--out", str(killed)]
    command += ["--partial", "--workers", "1"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(killed.glob("*.tokens"))) < 4:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "corpus.json").exists()
    done = {path: path.stat().st_mtime_ns for path in killed.glob("*.json")}
    assert 0 < len(done) < 17
    finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert f"Prepared: --data {killed}" in finished.stdout
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    one, other = one_billion_word.load(whole), one_billion_word.load(killed)
    assert one.fingerprint == other.fingerprint
    count = len(one.train)
    assert numpy.array_equal(one.train.read(0, count), other.train.read(0, count))


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda raw: (raw / "1b_word_vocab.txt").unlink(), "1b_word_vocab.txt: cannot be read"),
        (
            lambda raw: (raw / "1b_word_vocab.txt").write_text("</S>\nthe\n"),
            "1b_word_vocab.txt: <UNK> is missing",
        ),
        (
            lambda raw: (raw / HELD_OUT / "news.en.heldout-00001-of-00050").unlink(),
            "news.en.heldout-00001*: no such shards; --raw needs the benchmark's folder",
        ),
        (
            lambda raw: (raw / TRAINING / "news.en-00003-of-00100").write_bytes(b"ok\n\xff\n"),
            "news.en-00003-of-00100, line 2: not UTF-8",
        ),
        (
            lambda raw: (raw / TRAINING / "news.en-00002-of-00100.gz").write_bytes(
                gzip.compress(b"the house\n" * 5000)[:60]
            ),
            "news.en-00002-of-00100.gz: damaged or cut short",
        ),
        (
            lambda raw: (raw / TRAINING / "news.en-00003-of-00100").write_text("\n\n"),
            "news.en-00003-of-00100: no sentences in it",
        ),
    ],
)
def test_bad_input_is_named(raw: Path, tmp_path: Path, break_it, expected: str) -> None:  # type: ignore[no-untyped-def]
    break_it(raw)
    with pytest.raises(ExperimentError) as caught:
        prepare(raw, tmp_path / "out")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_shards_are_wanted(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="3 shards, the benchmark has 99; --partial takes"):
        one_billion_word.prepare(raw, tmp_path / "out", None, 1, False, quiet)


def test_damage_to_what_was_prepared(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ExperimentError, match=r"corpus.json: no such file; `apollo-qn prepare"):
        one_billion_word.load(out)
    with pytest.raises(ExperimentError, match="needs --data with the prepared text"):
        one_billion_word.load(None)
    prepare(raw, out)
    path = out / "news.en-00001-of-00100.tokens"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ExperimentError, match="has 24 bytes, 28 are expected: cut short"):
        one_billion_word.load(out)
    prepare(raw, out)  # mends it
    one_billion_word.load(out)
    (out / "1b_word_vocab.txt").write_text("</S>\n<UNK>\n")
    with pytest.raises(ExperimentError, match="of another format or vocabulary than this one's"):
        one_billion_word.load(out)
