"""Which allocator a program restarts itself with, and that it does so once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe import platform

ROOT = Path(__file__).parents[1]
KEPT = "dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always"
HUGE = "glibc.malloc.hugetlb=1"
JEMALLOC = {"LD_PRELOAD": "libjemalloc.so.2", "MALLOC_CONF": KEPT}


@pytest.mark.parametrize(
    ("here", "jemalloc", "mode", "restarts_with"),
    [
        ({}, True, "never", JEMALLOC),
        ({}, False, "madvise", {"GLIBC_TUNABLES": HUGE}),
        ({}, False, "always", None),
        ({}, False, "never", None),
        (JEMALLOC, True, "madvise", None),  # the second start
        ({"GLIBC_TUNABLES": HUGE}, True, "madvise", None),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, True, "madvise", None),
        ({"LD_PRELOAD": ""}, True, "madvise", {"LD_PRELOAD": "", "GLIBC_TUNABLES": HUGE}),
        ({"LD_PRELOAD": "libtcmalloc.so.4"}, True, "never", None),
        ({"MALLOC_CONF": "narenas:1"}, True, "never", JEMALLOC | {"MALLOC_CONF": f"{KEPT},narenas:1"}),
        ({"GLIBC_TUNABLES": "a=1"}, False, "madvise", {"GLIBC_TUNABLES": f"a=1:{HUGE}"}),
    ],
)
def test_a_program_restarts_with_memory_that_stays_unless_told_otherwise(
    monkeypatch, here, jemalloc, mode, restarts_with
):
    restarts = []
    monkeypatch.setattr(os, "environ", dict(here))
    monkeypatch.setattr(os, "execv", lambda path, arguments: restarts.append((path, arguments)))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "_starts", lambda _: jemalloc)
    monkeypatch.setattr(platform, "_huge_page_mode", lambda: mode)
    platform.use_allocator()
    assert restarts == ([] if restarts_with is None else [(sys.executable, sys.orig_argv)])
    assert os.environ == (here if restarts_with is None else restarts_with)


def test_a_library_that_is_not_there_is_not_asked_for():
    assert platform._starts({})
    assert not platform._starts({"LD_PRELOAD": "libjemalloc.so.no_such_version"})


def test_what_benchmarks_print(monkeypatch):
    def said(mode: str, **variables: str) -> str:
        monkeypatch.setattr(os, "environ", variables)
        monkeypatch.setattr(platform, "_huge_page_mode", lambda: mode)
        return platform.allocator()

    assert said("madvise", **JEMALLOC) == "jemalloc, huge pages on"
    assert said("never", **JEMALLOC) == "jemalloc, huge pages off"
    assert said("madvise", GLIBC_TUNABLES=HUGE) == "the system allocator, huge pages on"
    assert said("madvise") == "the system allocator, huge pages off"
    assert said("always") == "the system allocator, huge pages on"


def test_an_entry_point_runs_with_what_this_machine_has():
    """mappings of a program after its restart: jemalloc's library exactly where it can be loaded."""
    program = (
        "from moe import platform; platform.use_allocator(); print(platform.allocator()); "
        "print('jemalloc' in open('/proc/self/maps').read())"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    clean = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "GLIBC_TUNABLES")}
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=clean, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    has = platform._starts({"LD_PRELOAD": "libjemalloc.so.2"})
    assert output[0].startswith("jemalloc" if has else "the system allocator")
    assert output[1] == str(has)
