"""What needs an NVIDIA GPU: `make test-gpu` on a machine with onnxruntime-gpu.

What of the CUDA path can be tested without one, test_cuda_memory.py and test_cuda_session.py test.
"""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from fmedge_converters.candidates_graph import write_candidates
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_runtimes.cuda import open_cuda
from fmedge_runtimes.cuda_memory import CudaMemory
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.device import Device
from fmedge_runtimes.device_logits import DeviceLogits, Summariser
from fmedge_runtimes.errors import BackendError, CacheMemoryError
from fmedge_runtimes.load import load, load_text, open_graphs
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from fmedge_runtimes.sampler import Row, choose
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.verify import verify

pytestmark = pytest.mark.gpu

CUDA = Device("cuda")
PROMPTS = [list(range(5, 5 + length)) for length in (3, 30, 11)]
SAMPLING = [
    Sampling(max_new_tokens=150, ignore_eos=True),
    Sampling(max_new_tokens=40, temperature=0.9, seed=3, ignore_eos=True),
    Sampling(max_new_tokens=70, temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=4, ignore_eos=True),
]


@pytest.fixture(scope="module")
def cuda_bundle(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "bundle"
    return export(ExportOptions(str(llama), folder, target="cuda", verify="none")).folder


@pytest.mark.parametrize("scheme", ["none", "int8", "int4"])
def test_a_cuda_bundle_reproduces_on_the_gpu_what_the_cpu_computed(scheme: str, llama: Path, tmp_path: Path) -> None:
    made = export(ExportOptions(str(llama), tmp_path / "bundle", target="cuda", quantize=scheme))
    assert verify(made.folder, "cuda").tokens == 64


def test_logits_are_those_of_the_cpu_to_fp16(cuda_bundle: Path) -> None:
    tokens = list(range(5, 105))
    with load_text(cuda_bundle, device="cpu") as cpu, load_text(cuda_bundle, device="cuda") as gpu:
        theirs, ours = (np.asarray(model.logits(tokens), np.float32) for model in (cpu, gpu))
    assert np.abs(ours - theirs).max() < 0.02 * np.abs(theirs).max()


def test_rows_that_decode_together_while_the_cache_grows_are_those_alone(cuda_bundle: Path) -> None:
    with load(cuda_bundle, device="cuda") as model:
        together = [item.tokens for item in model.generate(PROMPTS, SAMPLING)]
        alone = [model.generate(prompt, one)[0].tokens for prompt, one in zip(PROMPTS, SAMPLING, strict=True)]
    assert together == alone


def test_recorded_steps_give_the_same_tokens(cuda_bundle: Path) -> None:
    tokens = {}
    for cuda_graphs in (True, False):
        with load(cuda_bundle, device="cuda", cuda_graphs=cuda_graphs, prompt_lookup=False) as model:
            tokens[cuda_graphs] = [item.tokens for item in model.generate(PROMPTS, SAMPLING)]
    assert tokens[True] == tokens[False]


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_steps_are_recorded_on_the_device_and_move_kilobytes(cuda_bundle: Path, cuda_graphs: bool) -> None:
    from fmedge_runtimes.bundle import open_bundle

    bundle = open_bundle(cuda_bundle)
    session, candidates = open_graphs(bundle, "cuda", None, cuda_graphs)
    assert isinstance(session, OnnxRuntimeSession)
    assert isinstance(candidates, OnnxRuntimeSession)
    assert (session.captures, candidates.captures) == (cuda_graphs, cuda_graphs), "refused by ONNX Runtime"
    decoder = Decoder(session, bundle.manifest.text, candidates)
    cache = decoder.new_cache()
    for row in range(4):
        decoder.prefill(cache, row, [5, 6, 7])
    rows = [Row(Sampling(), vocabulary=bundle.manifest.text.vocabulary, seed=0) for _ in range(4)]
    tokens = [8] * 4
    before = session.moved + candidates.moved
    for _ in range(32):
        tokens = choose(decoder.decode_in_place(cache, tokens), rows).tolist()
    assert (session.moved + candidates.moved - before) / 32 / 4 < 4096
    assert session.captures == candidates.captures == cuda_graphs, "a step could not be recorded"


@pytest.mark.parametrize("vocabulary", [1000, 49152, 151936])
def test_choices_from_summaries_are_those_from_logits(vocabulary: int, tmp_path: Path) -> None:
    _, path = write_candidates(tmp_path, vocabulary, "float16")
    session = OnnxRuntimeSession(path, "cuda", None, True)
    logits = (np.random.default_rng(0).standard_normal((6, vocabulary)) * 3).astype(np.float16)  # [R, V]
    buffer = session.allocate(logits.shape, logits.dtype)
    CudaMemory(open_cuda(CUDA)).write(logits, buffer)
    options = [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=50, top_p=0.9),
        Sampling(temperature=0.5, top_p=0.8),
        Sampling(temperature=0.7, min_p=0.1),
        Sampling(temperature=1.5, repetition_penalty=1.1),
    ]
    rows = [Row(option, vocabulary=vocabulary, seed=1, prompt=[3]) for option in options]
    summariser = Summariser(session)
    for _ in range(50):
        left = DeviceLogits(session, buffer, len(logits), summariser)
        chosen = choose(logits, rows).tolist()
        assert choose(left, rows).tolist() == chosen
        for row, token in zip(rows, chosen, strict=True):
            row.record(token)


def test_buffers_are_copied_and_given_back() -> None:
    memory = CudaMemory(open_cuda(CUDA))
    source = np.random.default_rng(0).random((3, 2, 64, 16)).astype(np.float16)
    gc.collect()
    free = memory.free()
    old, new = memory.allocate(source.shape, source.dtype), memory.allocate((4, 2, 96, 16), source.dtype)
    memory.write(source, old)
    memory.copy(old, new, source.shape)
    memory.copy(old.rows(1, 2), new.rows(3, 4), (1, 2, 10, 16))
    found = memory.read(new, 0, 4 * 2 * 96 * 16).reshape(new.shape)
    expected = np.zeros(new.shape, np.float16)
    expected[:3, :, :64], expected[3, :, :10] = source, source[1, :, :10]
    assert (found == expected).all()
    large = memory.allocate((256 << 20,), np.dtype(np.uint8))
    assert free - memory.free() >= 256 << 20
    del large
    gc.collect()
    assert free - memory.free() < 16 << 20


def test_what_does_not_fit_is_refused_and_the_model_goes_on(cuda_bundle: Path) -> None:
    memory = CudaMemory(open_cuda(CUDA))
    with load(cuda_bundle, device="cuda") as model:
        (first,) = model.generate(PROMPTS[0], Sampling(max_new_tokens=4, ignore_eos=True))
        # All but what the cache's reserve asks for.
        hoard = memory.allocate((memory.free() - (48 << 20),), np.dtype(np.uint8))
        (refused,) = model.generate([7] * 200, Sampling(max_new_tokens=40, ignore_eos=True))
        assert isinstance(refused.error, CacheMemoryError)
        assert "are free" in str(refused.error)
        del hoard
        gc.collect()
        (again,) = model.generate(PROMPTS[0], Sampling(max_new_tokens=4, ignore_eos=True))
    assert again.tokens == first.tokens


def test_a_gpu_that_is_not_there_is_refused(cuda_bundle: Path) -> None:
    with pytest.raises(BackendError, match="there is no device cuda:99"):
        load(cuda_bundle, device="cuda:99")
