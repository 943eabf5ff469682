"""The memory of a GPU, played by host memory: what is allocated, copied and given back."""

from __future__ import annotations

import gc
import sys

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fmedge_runtimes.backends import open_session
from fmedge_runtimes.cuda import Cuda, open_cuda
from fmedge_runtimes.cuda_memory import CudaMemory, block_copies
from fmedge_runtimes.device import Device, parse_device
from fmedge_runtimes.device_memory import means_no_memory, out_of_memory
from fmedge_runtimes.errors import BackendError, DeviceMemoryError
from hypothesis import given
from hypothesis import strategies as st

FLOAT = np.dtype(np.float32)


def gpus(total=1 << 20):
    return FakeCuda(devices=2, name="Host GPU", total=total)


@pytest.fixture
def library():
    return gpus()


@pytest.fixture
def memory(library):
    return CudaMemory(Cuda(library.module(), Device("cuda", 1)))


def written(memory, array):
    buffer = memory.allocate(array.shape, array.dtype)
    memory.write(array, buffer)
    return buffer


def read(memory, buffer):
    return memory.read(buffer, 0, int(np.prod(buffer.shape))).reshape(buffer.shape)


def test_a_buffer_is_zero_and_takes_its_size_until_nobody_holds_it(memory, library):
    buffer = memory.allocate((3, 100), FLOAT)
    assert library.allocated == 1200
    assert not read(memory, buffer).any()
    row = buffer.rows(1, 2)
    del buffer
    gc.collect()
    assert library.allocated == 1200
    memory.write(np.ones((1, 100), np.float32), row)
    assert memory.read(row, 99, 100).tolist() == [1]
    del row
    gc.collect()
    assert library.allocated == 0
    assert memory.free() == 1 << 20


def test_what_goes_between_host_and_gpu_is_counted(memory, library):
    buffer = written(memory, np.arange(6, dtype=np.float32).reshape(2, 3))
    assert memory.read(buffer, 4, 6).tolist() == [4, 5]
    assert memory.moved == library.moved == 24 + 8


def test_too_much_is_refused_and_nothing_is_kept(memory, library):
    kept = memory.allocate((1 << 18,), np.dtype(np.uint8))
    with pytest.raises(MemoryError):
        memory.allocate((1 << 20,), np.dtype(np.uint8))
    assert library.allocated == kept.shape[0]


@st.composite
def layouts(draw):
    axes = draw(st.integers(1, 4))
    pairs = [(draw(st.integers(1, 4)), draw(st.integers(1, 4))) for _ in range(axes)]
    return pairs, tuple(draw(st.integers(0, min(pair))) for pair in pairs)


@given(layouts())
def test_blocks_are_copied_as_numpy_copies_them(layout):
    pairs, block = layout
    memory = CudaMemory(Cuda(gpus(1 << 30).module(), Device("cuda")))
    random = np.random.default_rng(0)
    # A row on each side: what is copied lies inside larger buffers.
    source = random.random((3, *(pair[0] for pair in pairs)), np.float32)
    target = random.random((3, *(pair[1] for pair in pairs)), np.float32)
    ours, theirs = written(memory, source), written(memory, target)
    shape = (1, *block)
    memory.copy(ours.rows(1, 2), theirs.rows(2, 3), shape)
    target[(slice(2, 3), *map(slice, block))] = source[(slice(1, 2), *map(slice, block))]
    assert (read(memory, theirs) == target).all()
    assert (read(memory, ours) == source).all()


def test_a_cache_grows_by_one_copy_and_a_row_moves_by_one(memory):
    old, new = memory.allocate((2, 3, 4, 8), FLOAT), memory.allocate((2, 3, 6, 8), FLOAT)
    assert len(block_copies(old, new, (2, 3, 4, 8))) == 1
    assert len(block_copies(old.rows(0, 1), new.rows(1, 2), (1, 3, 2, 8))) == 1


def test_a_gpu_that_is_not_there_is_named(library):
    with pytest.raises(BackendError, match=r"there is no device cuda:2: the driver sees 2 GPUs, cuda to cuda:1\."):
        Cuda(library.module(), Device("cuda", 2))
    assert Cuda(library.module(), Device("cuda", 1)).device.name == "Host GPU 1"


def test_what_is_missing_is_named(monkeypatch, library):
    library.library = False
    with pytest.raises(BackendError, match=r"no CUDA device that can be used: .*driver library.*; use --device cpu"):
        Cuda(library.module(), Device("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    open_cuda.cache_clear()
    for kind, extra in (("cuda", "gpu"), ("tensorrt", "tensorrt"), ("rtx", "rtx")):
        with pytest.raises(BackendError, match=rf"cuda-bindings is not installed, .* {kind} .*fmedge\[{extra}\]"):
            open_cuda(Device(kind))


def test_an_error_of_the_driver_is_named(memory, library):
    library.no_capture = True
    with memory.cuda.turn(), pytest.raises(BackendError, match="cuStreamEndCapture failed: CUDA_ERROR_STREAM_CAPTURE"):
        memory.cuda.capture(lambda: None)


@pytest.mark.parametrize(
    ("name", "device"), [("cpu", Device("cpu")), ("cuda", Device("cuda")), ("cuda:3", Device("cuda", 3))]
)
def test_devices_have_names(name, device):
    assert parse_device(name) == device
    assert str(device) == name


@pytest.mark.parametrize("name", ["", ":", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "tpu", "cuda:1:2"])
def test_other_names_are_refused(name, tmp_path):
    with pytest.raises(BackendError, match="there is no device"):
        open_session(tmp_path / "no.onnx", name, None)


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("Failed to allocate memory for requested buffer of size 536870912", "512 MiB were asked for and "),
        ("CUDA failure 2: out of memory ; GPU=0", ""),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", ""),
    ],
)
def test_no_memory_is_told_from_other_failures(memory, words, asked):
    error = RuntimeError(words)
    assert means_no_memory(error)
    assert not means_no_memory(RuntimeError("Non-zero status code returned while running Add node"))
    found = out_of_memory("a step", Device("cuda", 1), memory.cuda, error)
    assert isinstance(found, DeviceMemoryError)
    assert str(found) == f"a step: cuda:1 (Host GPU 1) is out of memory: {asked}1 MiB of 1 MiB are free."
