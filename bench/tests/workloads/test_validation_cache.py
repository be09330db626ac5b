"""Validated files are read again only if they have changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from apollo_bench.workloads import validation_cache
from apollo_bench.workloads.validation_cache import ValidationCache


def test_a_changed_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"right")
    right = hashlib.sha256(b"right").hexdigest()
    cache = ValidationCache("cache.json", tmp_path)
    assert cache.holds(path, right)
    cache.save()
    with monkeypatch.context() as patched:
        patched.setattr(validation_cache, "_sha256", lambda file: pytest.fail("read again"))
        assert ValidationCache("cache.json", tmp_path).holds(path, right)
    path.write_bytes(b"wrong and longer")
    assert not ValidationCache("cache.json", tmp_path).holds(path, right)
    assert not cache.holds(path, right)


def test_another_digest_is_not_known(tmp_path: Path) -> None:
    cache = ValidationCache("cache.json", tmp_path)
    cache.add("name", "digest")
    assert cache.contains("name", "digest")
    assert not cache.contains("name", "other")
    cache.add_found("files", "digest", "what was found")
    assert cache.found("files", "digest") == "what was found"
    assert cache.found("files", "other") is None
    assert cache.found("unknown", "digest") is None


def test_a_damaged_cache_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "cache.json").write_text("[1, 2")
    assert not ValidationCache("cache.json", tmp_path).contains("name", "digest")
