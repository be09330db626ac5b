"""Preparation of the shards as token files: exact, parallel, resumed after a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.language_modeling import one_billion_word
from apollo_bench.workloads.language_modeling.one_billion_word import HELD_OUT, TRAIN, load, prepare
from apollo_bench.workloads.language_modeling.token_corpus import Corpus, TokenStream
from bench.tests.helpers import PATIENCE

VOCABULARY = ("</S>", "<S>", "<UNK>", "the", "café", "dog", "barks", ".")
LINES = {
    "train/1": "the dog barks .\nthe cat barks .\n",
    "train/2": "the  café .\n\n   \nthe dog\t.\r\n",
    "heldout/0": "dog barks\n",
    "heldout/1": "<S> the dog </S>\nthe <UNK>\n",
    "heldout/2": "barks .\n",
}
Said = list[tuple[str, int, int]]


def write_raw(folder: Path, lines: dict[str, str] = LINES) -> Path:
    total = {"train": 3, "heldout": 3}
    for name, text in lines.items():
        split, _, number = name.partition("/")
        path = shard(folder, split, int(number), total[split])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return folder


def shard(folder: Path, split: str, number: int, total: int = 3) -> Path:
    if split == "train":
        return folder / TRAIN / f"news.en-{number:05}-of-{total:05}"
    return folder / HELD_OUT / f"news.en.heldout-{number:05}-of-{total:05}"


def write_vocabulary(path: Path, words: tuple[str, ...] = VOCABULARY) -> Path:
    path.write_text("".join(f"{word}\n" for word in words), "utf-8")
    return path


def prepared(folder: Path, workers: int = 1, **lines: str) -> tuple[Corpus, Said]:
    folder.mkdir(exist_ok=True)
    said: Said = []
    raw = write_raw(folder / "raw", {**LINES, **lines})
    words = write_vocabulary(folder / "words.txt")
    prepare(raw, folder / "out", words, workers, lambda *news: said.append(news))
    return load(folder / "out"), said


def text(corpus: Corpus, tokens: TokenStream) -> str:
    return " ".join(corpus.vocabulary.decode(tokens[:]))


def contents(out: Path) -> dict[str, bytes]:
    """Return the files that depend on the text only; the cache also has paths and times."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "checked.json")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_sentences(tmp_path: Path) -> None:
    corpus, said = prepared(tmp_path)
    assert text(corpus, corpus.train) == (
        "the dog barks . </S> the <UNK> barks . </S> the café . </S> the dog . </S>"
    )
    assert text(corpus, corpus.test) == "dog barks </S>"
    # markers in the text do not end sentences
    assert text(corpus, corpus.valid) == "<UNK> the dog <UNK> </S> the <UNK> </S> barks . </S>"
    assert corpus.vocabulary.words == VOCABULARY
    assert corpus.empty_lines == 2
    assert [done for title, done, _ in said if title == "Tokenizing shards"] == [0, 1, 2, 3, 4, 5]
    assert said[-1][0] == (
        "Prepared 5 shards: 32 tokens, 8 sentences, 4 unknown words, 2 empty lines skipped"
    )


def test_the_archive_around_it(tmp_path: Path) -> None:
    corpus, _ = prepared(tmp_path)
    (tmp_path / "top").mkdir()
    (tmp_path / "raw").rename(tmp_path / "top" / one_billion_word.ARCHIVE)
    prepare(tmp_path / "top", tmp_path / "two", tmp_path / "words.txt", 1, lambda *news: None)
    assert load(tmp_path / "two").fingerprint == corpus.fingerprint


def test_blocks_end_with_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = prepared(tmp_path / "a")
    monkeypatch.setattr("apollo_bench.workloads.language_modeling.text_files._BLOCK", 1)
    pieces, _ = prepared(tmp_path / "b")
    assert pieces.fingerprint == whole.fingerprint
    path = shard(tmp_path / "b" / "raw", "train", 2)
    path.write_bytes(b"the dog\n\nthe caf\xe9\n")
    with pytest.raises(ExperimentError, match=r"line 3: not UTF-8"):
        prepared_again(tmp_path / "b")


def prepared_again(folder: Path, workers: int = 1) -> None:
    prepare(folder / "raw", folder / "out", folder / "words.txt", workers, lambda *news: None)


def test_fingerprint(tmp_path: Path) -> None:
    first, _ = prepared(tmp_path / "a")
    assert prepared(tmp_path / "b")[0].fingerprint == first.fingerprint
    changed, _ = prepared(tmp_path / "c", **{"heldout/2": "barks the\n"})
    assert changed.fingerprint != first.fingerprint


@pytest.mark.slow
def test_processes_make_the_same_files(tmp_path: Path) -> None:
    prepared(tmp_path / "a")
    prepared(tmp_path / "b", workers=2)
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")


def test_vocabulary_from_the_text(tmp_path: Path) -> None:
    """Words are counted over all shards."""
    raw = write_raw(tmp_path / "raw", {**LINES, "train/1": "b b a\nd a d\n", "train/2": "a b c\n"})
    for out, workers in ((tmp_path / "one", 1), (tmp_path / "two", 2)):
        prepare(raw, out, None, workers, lambda *news: None)
        corpus = load(out)
        assert corpus.vocabulary.words == ("</S>", "<UNK>", "a", "b")
        assert text(corpus, corpus.train) == "b b a </S> <UNK> a <UNK> </S> a b <UNK> </S>"
        assert not (out / "counts").exists()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*/*.tokens")}


def test_only_changed_shards_are_prepared_again(tmp_path: Path) -> None:
    first, _ = prepared(tmp_path)
    before = times(tmp_path / "out")
    prepared_again(tmp_path)
    assert times(tmp_path / "out") == before
    for change in ("text", "tokens", "description"):
        path = tmp_path / "out" / "train" / "00002.tokens"
        if change == "text":
            shard(tmp_path / "raw", "train", 2).write_text("the dog\n", "utf-8")
        elif change == "tokens":
            path.write_bytes(bytes(path.stat().st_size))
        else:
            path.with_name("00002.tokens.json").unlink()
        before = times(tmp_path / "out")
        prepared_again(tmp_path)
        after = times(tmp_path / "out")
        assert [name for name in before if after[name] != before[name]] == ["00002.tokens"], change
    corpus = load(tmp_path / "out")
    assert text(corpus, corpus.train).endswith("barks . </S> the dog </S>")
    assert corpus.fingerprint != first.fingerprint
    write_vocabulary(tmp_path / "words.txt", (*VOCABULARY, "cat"))
    prepared_again(tmp_path)
    assert "the cat barks" in text(load(tmp_path / "out"), load(tmp_path / "out").train)


@pytest.mark.parametrize(
    ("content", "message", "workers"),
    [
        (b"the dog\nthe d\xf6g\n", r"line 2: not UTF-8 \(byte 0xf6\)", 1),
        (b"the dog\nthe do", r"line 2: the file ends within it, truncated", 1),
        (b"the dog\nthe do", r"line 2: the file ends within it, truncated", 2),
        (b"the dog\nthe \0g\n", r"line 2: a zero byte, damaged", 1),
        (b"", r"no words in it", 1),
        (b"\n\n", r"no words in it", 1),
    ],
)
def test_bad_shards(tmp_path: Path, content: bytes, message: str, workers: int) -> None:
    raw = write_raw(tmp_path / "raw")
    words = write_vocabulary(tmp_path / "words.txt")
    path = shard(raw, "heldout", 1)
    path.write_bytes(content)
    with pytest.raises(ExperimentError, match=rf"{path.name}[:,] {message}") as caught:
        prepare(raw, tmp_path / "out", words, workers, lambda *news: None)
    assert "\n" not in str(caught.value)
    with pytest.raises(ExperimentError, match=r"corpus.json: no such file, not prepared to the"):
        load(tmp_path / "out")


def test_missing_shards(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw")
    words = write_vocabulary(tmp_path / "words.txt")

    def expect(message: str) -> None:
        with pytest.raises(ExperimentError, match=message):
            prepare(raw, tmp_path / "out", words, 1, lambda *news: None)

    path = shard(raw, "heldout", 0)
    path.rename(tmp_path / "aside")
    expect(r"news.en.heldout-00000-of-00003: no such file; 2 shards of 00003 are there")
    (tmp_path / "aside").rename(path)
    shard(raw, "train", 2).rename(tmp_path / "aside")
    expect(r"news.en-00002-of-00003: no such file; 1 shards of 00003")
    (tmp_path / "aside").rename(shard(raw, "train", 2, 100))
    expect(r"shards of 00003 and of 00100 mixed")
    for one in (raw / TRAIN).iterdir():
        one.unlink()
    expect(rf"{TRAIN}: no shards news.en-")
    (raw / TRAIN).rmdir()
    expect(rf"{TRAIN}: no such folder; the unpacked benchmark has")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("marker", ["<UNK>", "</S>"])
def test_vocabulary_without_a_marker(tmp_path: Path, marker: str) -> None:
    raw = write_raw(tmp_path / "raw")
    words = tuple(word for word in VOCABULARY if word != marker)
    path = write_vocabulary(tmp_path / "words.txt", words)
    with pytest.raises(ExperimentError, match=rf"words.txt: no {marker}, which"):
        prepare(raw, tmp_path / "out", path, 1, lambda *news: None)


def test_no_workers(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="--workers is 0, allowed are 1 and more"):
        prepare(tmp_path, tmp_path, None, 0, lambda *news: None)


def test_one_at_a_time(tmp_path: Path) -> None:
    prepared(tmp_path)
    with (
        one_billion_word._locked_folder(tmp_path / "out"),
        pytest.raises(ExperimentError, match="out: another process is preparing it"),
    ):
        prepared_again(tmp_path)


def test_damage_that_loading_sees(tmp_path: Path) -> None:
    prepared(tmp_path)
    out = tmp_path / "out"
    tokens, manifest = out / "train" / "00001.tokens", out / "corpus.json"

    def expect(message: str) -> None:
        with pytest.raises(ExperimentError, match=message) as caught:
            load(out)
        assert "\n" not in str(caught.value)

    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-4])
    expect(r"00001.tokens: truncated, 36 bytes where 10 tokens take 40")
    tokens.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    expect(r"00001.tokens: not the file that was prepared")
    tokens.write_bytes(whole)
    load(out)
    words = (out / "vocabulary.txt").read_bytes()
    (out / "vocabulary.txt").write_bytes(words.replace(b"dog", b"god"))
    expect(r"vocabulary.txt: changed since")
    (out / "vocabulary.txt").write_bytes(words)
    described = json.loads((out / "train" / "00001.tokens.json").read_bytes())
    described["sha256"] = "ab" * 32
    (out / "train" / "00001.tokens.json").write_text(json.dumps(described))
    expect(r"00001.tokens: not the file that was prepared")
    good = manifest.read_text()
    for content in ("", "[]", good[: len(good) // 2], good.replace('"files"', '"fires"')):
        manifest.write_text(content)
        expect(r"corpus.json: damaged")
    manifest.write_text(good.replace('"format": 1', '"format": 7'))
    expect(r"corpus.json: format 7, not 1")
    manifest.unlink()
    expect(r"corpus.json: no such file, not prepared to the end")


PREPARE = """
import sys
from pathlib import Path
from apollo_bench.workloads.language_modeling.one_billion_word import prepare

if __name__ == "__main__":
    raw, out, words = map(Path, sys.argv[1:])
    prepare(raw, out, words, 2, lambda *news: print(*news, flush=True))
"""


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path) -> None:
    """After SIGKILL the workers end, finished shards stay, and the rest is prepared again."""
    generator = random.Random(0)
    lines = {
        f"{split}/{number}": "".join(
            " ".join(generator.choices(VOCABULARY[3:], k=20)) + "\n" for _ in range(20_000)
        )
        for split, numbers in (("train", (1, 2)), ("heldout", (0, 1, 2)))
        for number in numbers
    }
    lines["train/2"] *= 10  # still being prepared when the first of the others is done
    raw = write_raw(tmp_path / "raw", lines)
    words = write_vocabulary(tmp_path / "words.txt")
    script = tmp_path / "prepare.py"
    script.write_text(PREPARE)
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, str(script), str(raw), str(out), str(words)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    while "shards 1 5" not in child.stdout.readline():
        assert child.poll() is None
    workers = descendants(child.pid)
    assert len(workers) >= 3  # two workers, and the server that they are forked from
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    deadline = time.monotonic() + PATIENCE
    while any(running(worker) for worker in workers):
        assert time.monotonic() < deadline, "workers outlive the killed process"
        time.sleep(0.02)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.tokens.json")}
    assert 1 <= len(before) < 5
    with pytest.raises(ExperimentError, match="not prepared to the end"):
        load(out)
    prepare(raw, out, words, 1, lambda *news: None)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert not list(out.rglob("*.tmp"))
    prepare(raw, tmp_path / "whole", words, 1, lambda *news: None)
    assert contents(out) == contents(tmp_path / "whole")


def descendants(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True)
    found = [int(word) for word in listed.stdout.split()]
    return [*found, *(one for child in found for one in descendants(child))]


def running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
