"""Freed memory is kept, so that asking for it again costs no page faults."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from nextlat.allocator import give_back_freed_memory, keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.ones(2**20) for _ in range(8)]  # 32 MB, freed together
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

faults()
given_back = faults()
told = keep_freed_memory()
faults()
kept = faults()
large = resident()
give_back_freed_memory()
print(int(told), given_back, kept, large - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is a library of Linux")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    # by itself glibc gives back or keeps, as it happens; made to give back, it must be told otherwise
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    ran = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=environment)
    told, given_back, kept, returned = map(int, ran.stdout.split())
    if not told:
        pytest.skip("another C library than glibc")
    assert given_back > 10 * 4096  # at least 16 MB in pages, every time
    assert kept < 500
    assert returned > 4096  # pages
