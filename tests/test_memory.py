"""Freed memory that a process keeps is not asked of the system again: counted as page faults of a process of its own."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from metalearn.memory import keep_freed_memory
torch.set_num_threads(1)
kept = KEEP and keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    tensors = [torch.ones(2**20) for _ in range(4)]  # 4 MiB each
for _ in range(10):
    work()
before = faults()
for _ in range(20):
    work()
print(int(kept), faults() - before)
"""


def counted(keep):
    # Else glibc raises this threshold by itself, sooner or later.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    command = [sys.executable, "-c", FAULTS.replace("KEEP", str(keep))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_memory_is_kept_where_the_c_library_can():
    (kept, faults), (_, usual) = counted(True), counted(False)
    assert kept == 1
    assert usual >= 80  # at least one for each block, however large the system's pages are
    assert faults <= usual / 4  # a block may move, now and then
