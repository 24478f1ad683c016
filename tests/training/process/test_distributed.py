"""What a worker's environment is given before it begins."""

from __future__ import annotations

import os

from training.process.distributed import RankInfo, set_environment

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def caches(monkeypatch, device, **given):
    environment = {"PATH": "/bin", **given}
    monkeypatch.setattr(os, "environ", environment)
    set_environment(RankInfo(rank=0, size=1, device=device))
    return [environment.get(name) for name in CACHES]


def test_caches_by_shape_are_small_on_a_processor(monkeypatch):
    assert caches(monkeypatch, "cpu") == ["64", "64"]
    assert caches(monkeypatch, "cuda") == [None, None]


def test_what_a_person_has_set_stays(monkeypatch):
    assert caches(monkeypatch, "cpu", LRU_CACHE_CAPACITY="9") == ["64", "9"]
