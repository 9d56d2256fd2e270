"""Out of memory: recognised in all its words, and memory given back."""

import ctypes
import gc
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from finetuned.trainer.memory import give_back, out_of_memory, peak_bytes, total_bytes

SAID = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.05 GiB. GPU 0 has a total capacity of 23.57 GiB"),
    RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call."
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: not enough memory: you tried 8 bytes."
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 1073741824 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("could not create a primitive"),
    RuntimeError("unable to mmap 1073741824 bytes from file </models/a.safetensors>: Cannot allocate memory (12)"),
    MemoryError("Unable to allocate 3.05 GiB for an array with shape (1024, 800000) and data type float32"),
    MemoryError("std::bad_alloc"),
    MemoryError(),
]
SOMETHING_ELSE = [
    RuntimeError("shape mismatch: value tensor of shape [3] cannot be broadcast to indexing result of shape [2]"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x64 and 32x8)"),
    RuntimeError("expected scalar type Float but found BFloat16"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
    RuntimeError("Unsupported memory format option Preserve"),
    ValueError("Trying to backward through the graph a second time"),
    RuntimeError(""),
    KeyError("memory"),
]


@pytest.mark.parametrize("error", SAID, ids=str)
def test_the_ways_to_say_it_are_recognised(error):
    detail = out_of_memory(error)
    assert isinstance(detail, str), "the error itself would keep the failed step's tensors alive"
    assert detail
    assert "\n" not in detail


@pytest.mark.parametrize("error", SOMETHING_ELSE, ids=str)
def test_other_errors_are_left_alone(error):
    assert out_of_memory(error) is None


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_a_real_failure_is_recognised(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate(2**46, dtype=allocate(1).dtype)  # more than the address space
    assert "allocate" in out_of_memory(caught.value)


def test_a_real_shape_mismatch_is_not():
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert out_of_memory(caught.value) is None


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_freed_memory_goes_back_to_the_system():
    """Small blocks below one that lives on stay with the allocator until it is told to give them back."""
    gc.collect()
    blocks = [torch.ones(16 * 1024) for _ in range(3000)]  # 64 KiB each
    full = resident()
    last = blocks.pop()
    del blocks
    give_back()
    assert full - resident() > 120 * 2**20
    assert last.any()


def test_the_peak_is_at_least_what_is_resident():
    block = torch.ones(10 * 2**20)
    assert block.any()
    assert peak_bytes() >= 40 * 2**20


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has its own memory")
def test_a_limit_is_what_there_is():
    """A user who is told of 64 GiB where a unit file allows 8 looks in the wrong place."""
    whole = total_bytes()
    limit = whole // 2 // 4096 * 4096
    code = "from finetuned.trainer.memory import total_bytes; print(total_bytes())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        check=True,
    )
    assert int(done.stdout) == limit
