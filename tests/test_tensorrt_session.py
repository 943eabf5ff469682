"""The TensorRT session under the real decoder, cache and engine of requests, over doubles of TensorRT and CUDA.

What this proves: names, arguments and order of calls for every version whose inventory is here; addresses, profiles,
copies and captured graphs, since the double computes with what lies at the addresses. What it does not: that TensorRT
accepts a graph, computes right numbers on a GPU, or how fast. No GPU was there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from engine_bundle import CAPACITY, ROWS, SIZE, doubles, engine_bundle
from fake_cuda import FakeCuda
from fmedge_converters.engines.bundle_engines import EngineBuildOptions, build_engines
from fmedge_converters.engines.served import Served
from fmedge_runtimes.backends import open_session
from fmedge_runtimes.engine_file import engine_path, read_engine, record_path
from fmedge_runtimes.errors import BackendError, RequestError
from fmedge_runtimes.load import load
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.session import Session
from fmedge_runtimes.tensorrt_graphs import MOST
from strict_double import CUDA, RTX, TENSORRT, StrictModule, read_inventory

PROMPTS = [[3, 1, 4, 1, 5], list(range(2, 20)) + list(range(2, 20)), [7], [9, 9, 8, 2, 6, 5, 3]]
SAMPLING = [Sampling(max_new_tokens=count, ignore_eos=True) for count in (24, 6, 40, 11)]


@pytest.fixture(scope="module", params=[True, False], ids=["in-place", "apart"])
def bundle(request, tmp_path_factory) -> Path:
    return engine_bundle(tmp_path_factory.mktemp("engine") / "bundle", in_place=request.param).folder


@pytest.fixture(scope="module")
def expected(bundle: Path) -> list[tuple[int, ...]]:
    with load(bundle, device="cpu", max_batch=ROWS, threads=1) as model:
        return [item.tokens for item in model.generate(PROMPTS, SAMPLING)]


def build(bundle: Path, **options) -> None:
    list(build_engines(bundle, EngineBuildOptions(**options)))


@pytest.mark.parametrize("inventory", [*TENSORRT, *RTX])
def test_generations_are_the_cpu_s_whatever_the_version(bundle: Path, expected, inventory: str) -> None:
    device = "rtx" if inventory in RTX else "tensorrt"
    cuda = FakeCuda()
    with doubles(cuda, inventory) as library:
        build(bundle, device=device, force=True)
        with load(bundle, device=device) as model:
            assert model.options.max_batch == ROWS
            assert [item.tokens for item in model.generate(PROMPTS, SAMPLING)] == expected
            # Once more: steps are known, and some are captured by now.
            assert [item.tokens for item in model.generate(PROMPTS, SAMPLING)] == expected
            session = model._decoder.session
            assert session.graph_problem is None
            assert 0 < cuda.live_graphs <= MOST
            del session
        assert cuda.launches > 8
        profiles = {profile for profile, _ in library.executed}
        assert profiles == {0, 1}
    # Everything is given back.
    assert not cuda.memory and not cuda.hosts and cuda.live_graphs == 0


@pytest.mark.parametrize("driver", CUDA)
@pytest.mark.parametrize("integrated", [True, False])
def test_an_integrated_gpu_reads_host_memory_where_it_is(bundle: Path, expected, integrated: bool, driver: str) -> None:
    cuda = FakeCuda(integrated=integrated)
    with doubles(cuda, driver=driver):
        build(bundle, force=True)
        with load(bundle) as model:
            assert [item.tokens for item in model.generate(PROMPTS, SAMPLING)] == expected
    assert bool([kind for kind, _ in cuda.copies if kind in ("up", "down")]) is not integrated


def test_steps_that_cannot_be_captured_go_one_by_one(bundle: Path, expected) -> None:
    cuda = FakeCuda(no_capture=True)
    with doubles(cuda):
        build(bundle, force=True)
        with load(bundle) as model:
            assert [item.tokens for item in model.generate(PROMPTS, SAMPLING)] == expected
            assert "CAPTURE_UNSUPPORTED" in model._decoder.session.graph_problem
    assert cuda.launches == 0


def test_the_cache_is_one_address_for_input_and_output(tmp_path: Path) -> None:
    folder = engine_bundle(tmp_path / "bundle").folder
    with doubles() as library:
        build(folder)
        with load(folder) as model:
            model.generate(PROMPTS[:1], SAMPLING[0])
        given = [arguments for name, arguments in library.calls if name == "IExecutionContext.set_tensor_address"]
        addresses: dict[str, set[int]] = {}
        for name, address in given:
            addresses.setdefault(name, set()).add(address)
        for part in ("key", "value"):
            assert addresses[f"past_key_values.0.{part}"] == addresses[f"present.0.{part}"]
        strategies = [arguments for name, arguments in library.calls if name == "ICudaEngine.create_execution_context"]
        assert all(strategy.name == "USER_MANAGED" for (strategy,) in strategies)


@pytest.fixture
def session(bundle: Path):
    with doubles() as library:
        build(bundle, force=True)
        opened = open_session(bundle / "decoder.onnx", "tensorrt", None)
        opened.cuda_double = library.cuda
        yield opened
        opened.close()


def test_what_no_profile_holds_names_the_input_and_the_command(session: Session) -> None:
    caches = {
        name: session.allocate((ROWS, 2, CAPACITY, SIZE), np.dtype("float32"))
        for name in ("past_key_values.0.key", "past_key_values.0.value")
    }
    feeds = {
        "input_ids": np.zeros((ROWS, 2), np.int64),
        "position_ids": np.zeros((ROWS, 2), np.int64),
        "logits_indices": np.zeros(1, np.int64),
        "write_indices": np.zeros(ROWS, np.int64),
        **caches,
    }
    with pytest.raises(BackendError, match=r"input_ids is \[4, 2\].*\[1, 1 to 16\] or \[1 to 4, 1\].*fmedge build"):
        session.run(feeds, {})
    with pytest.raises(BackendError, match="the engine takes input_ids"):
        session.run(caches, {})
    assert next(spec for spec in session.inputs if spec.name == "input_ids").largest == (ROWS, 16)


@pytest.mark.parametrize(
    ("source", "target", "shape"),
    [
        ((4, 2, 8, 4), (4, 2, 8, 4), None),
        ((4, 2, 8, 4), (6, 2, 12, 4), None),
        ((4, 2, 8, 4), (4, 2, 8, 4), (3, 2, 5, 4)),
        ((4, 2, 8, 4), (1, 2, 16, 4), (1, 2, 3, 4)),
        ((3, 5), (3, 7), (2, 4)),
        ((3, 5), (3, 7), (0, 4)),
        ((6,), (9,), (4,)),
    ],
)
def test_blocks_are_copied_as_numpy_would(session: Session, source, target, shape) -> None:
    kind = np.dtype("float32")
    buffers = [session.allocate(size, kind) for size in (source, target)]
    views = []
    for buffer in buffers:
        _, held = session.cuda_double.memory[buffer.address]
        start = buffer.address - held.ctypes.data
        views.append(held[start : start + buffer.nbytes].view(kind).reshape(buffer.shape))
    assert not views[0].any()  # zeroed, whatever lay there
    views[0][...] = np.arange(1, views[0].size + 1).reshape(source)
    wanted = views[1].copy()
    block = tuple(map(slice, map(min, source, target) if shape is None else shape))
    wanted[block] = views[0][block]
    session.copy(*buffers, shape)
    assert np.array_equal(views[1], wanted)


def test_memory_that_is_not_there_is_a_memory_error_and_the_rest_goes_on(session: Session) -> None:
    free = session.free_memory()
    with pytest.raises(MemoryError):
        session.allocate((free + 1,), np.dtype("int8"))
    assert session.allocate((16,), np.dtype("int8")).rows(2, 4).shape == (2,)


@pytest.mark.parametrize(
    ("cuda", "words"),
    [
        (FakeCuda(library=False), "there is no CUDA device that can be used"),
        (FakeCuda(devices=0), "there is no CUDA device that can be used: CUDA's cuInit failed: CUDA_ERROR_NO_DEVICE"),
    ],
)
def test_without_a_gpu_tensorrt_is_not_touched(bundle: Path, cuda: FakeCuda, words: str) -> None:
    with doubles():
        build(bundle, force=True)
    with doubles(cuda) as library:
        with pytest.raises(BackendError, match=words):
            load(bundle)
        with pytest.raises(BackendError, match=words):
            build(bundle, force=True)
        assert library.calls == []
    assert "Runtime" not in repr(library.calls)


def test_a_bundle_without_an_engine_says_how_to_build_one(tmp_path: Path) -> None:
    folder = engine_bundle(tmp_path / "bundle").folder
    with doubles(), pytest.raises(BackendError, match=f"fmedge build {folder} --device tensorrt"):
        load(folder)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("version", "10.16.2.10", "built by tensorrt 10.16.2.10, and this is 10.3.0"),
        ("capability", "11.0", "compute capability 11.0, and this GPU has 8.7"),
        ("device", "Thor", "built on Thor, and this is Orin"),
        ("system", "linux-riscv", "built on linux-riscv"),
        ("graph", "0" * 64, "of another graph than decoder.onnx has now"),
        ("weights", "0" * 64, "of another weights than decoder.onnx has now"),
        ("sha256", "0" * 64, "is damaged"),
        ("bytes", 3, "is missing or cut off"),
        ("profiles", "nonsense", "build it again"),
    ],
)
def test_a_stale_or_foreign_engine_is_refused_with_what_differs(bundle: Path, field: str, value, words: str) -> None:
    with doubles():
        build(bundle, force=True)
        engine = read_engine(bundle / "decoder.onnx", "tensorrt")
        record = engine.facts.model_dump(mode="json") | {field: value}
        record_path(engine.path).write_text(json.dumps(record))
        with pytest.raises(BackendError, match=f"{words}.*fmedge build"):
            load(bundle)


def test_an_engine_that_tensorrt_refuses_says_why(bundle: Path) -> None:
    with doubles():
        build(bundle, force=True)
        path = engine_path(bundle / "decoder.onnx", "tensorrt")
        path.write_bytes(b"rubbish")
        record = read_engine(bundle / "decoder.onnx", "tensorrt").facts
        changed = record.model_copy(update={"bytes": 7, "sha256": hashlib.sha256(b"rubbish").hexdigest()})
        record_path(path).write_text(changed.model_dump_json())
        with pytest.raises(BackendError, match="Serialization assertion failed"):
            load(bundle)


def test_more_rows_than_the_engine_has_are_refused_and_threads_are_the_cpu_s(bundle: Path) -> None:
    with doubles():
        build(bundle, force=True)
        with pytest.raises(RequestError, match=f"built for 4 rows; build it for more: fmedge build {bundle} --rows 9"):
            load(bundle, max_batch=9)
        with pytest.raises(RequestError, match="--threads is for the CPU"):
            load(bundle, threads=2)
        build(bundle, served=Served(rows=9))
        with load(bundle, max_batch=9) as model:
            assert model.options.max_batch == 9


@pytest.mark.parametrize("name", [*TENSORRT, *RTX])
def test_a_strict_double_refuses_what_the_version_lacks(name: str) -> None:
    class Builder:
        def __init__(self, logger=None):
            pass

        def create_network(self, flags=0):
            return flags

        def invented(self):
            return 1

    module = StrictModule(read_inventory(name), {"Builder": Builder})
    builder = module.Builder()
    assert builder.create_network(flags=3) == 3
    for wrong in (lambda: builder.create_network(4, 5), lambda: builder.create_network(bits=1)):
        with pytest.raises(TypeError, match="takes"):
            wrong()
    with pytest.raises(AttributeError):
        builder.invented()
    with pytest.raises(AttributeError):
        builder.max_threadz = 2
    with pytest.raises(AttributeError):
        _ = module.Bilder
    assert hasattr(module.BuilderFlag, "FP16") is (name.startswith("tensorrt-10"))
