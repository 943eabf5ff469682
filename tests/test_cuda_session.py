"""The CUDA path over host memory that plays a GPU (host_gpu.py): what is bound, recorded, moved, and said.

Graphs and numbers are real, kernels and streams are not: tests/test_gpu.py is for those.
"""

from __future__ import annotations

import onnxruntime
import pytest
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_runtimes import cuda_graphs
from fmedge_runtimes.cuda import open_cuda
from fmedge_runtimes.cuda_graphs import WARM_UP
from fmedge_runtimes.errors import BackendError, CacheMemoryError, DeviceMemoryError
from fmedge_runtimes.load import load
from fmedge_runtimes.sampling import Sampling
from host_gpu import install

pytestmark = pytest.mark.medium

PROMPTS = [list(range(5, 5 + length)) for length in (3, 30, 11)]
SAMPLING = [
    Sampling(max_new_tokens=90, ignore_eos=True),
    Sampling(max_new_tokens=20, temperature=0.9, seed=3),
    Sampling(max_new_tokens=40, temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=4, logprobs=2),
]
OPTIONS = {"max_batch": 4, "prompt_lookup": False}


@pytest.fixture(scope="module")
def bundle(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda") / "bundle"
    return export(ExportOptions(str(llama), folder, target="cuda", verify="none")).folder


@pytest.fixture
def gpu(monkeypatch):
    yield install(monkeypatch)
    open_cuda.cache_clear()


@pytest.fixture(scope="module")
def expected(bundle):
    with load(bundle, device="cpu", **OPTIONS) as model:
        return [done.tokens for done in model.generate(PROMPTS, SAMPLING)]


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_the_tokens_are_those_of_the_cpu(cuda_graphs, device, bundle, expected, gpu):
    with load(bundle, device=device, cuda_graphs=cuda_graphs, **OPTIONS) as model:
        for _ in range(2):
            assert [done.tokens for done in model.generate(PROMPTS, SAMPLING)] == expected
        decoder, candidates = gpu.sessions
        assert decoder.settings["device_id"] == device.partition(":")[2] or "0"
        assert (decoder.replays > 100) == (candidates.replays > 100) == cuda_graphs
    model = None
    assert gpu.driver.allocated == 0


def test_a_step_is_recorded_when_it_has_come_often(bundle, gpu):
    with load(bundle, device="cuda", prefix_reuse=False, **OPTIONS) as model:
        model.generate([PROMPTS[0]], Sampling(max_new_tokens=WARM_UP + 1, ignore_eos=True))
        decoder, _ = gpu.sessions
        # The prompt, and the steps that came before the shape was known to come often.
        assert (decoder.eager, len(decoder.recorded)) == (1 + WARM_UP, 0)
        model.generate([PROMPTS[0]], Sampling(max_new_tokens=WARM_UP + 1, ignore_eos=True))
        assert (len(decoder.recorded), decoder.replays) == (1, WARM_UP - 1)


def test_a_cache_that_grows_is_recorded_anew(bundle, gpu):
    with load(bundle, device="cuda", **OPTIONS) as model:
        model.generate([PROMPTS[0]], Sampling(max_new_tokens=150, ignore_eos=True))
        decoder, _ = gpu.sessions
        totals = {signature["total_sequence_length"][2] for signature in decoder.recorded.values()}
        assert len(decoder.recorded) == len(totals) > 1


def test_there_is_an_end_to_recording(bundle, expected, gpu, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 1)
    with load(bundle, device="cuda", **OPTIONS) as model:
        assert [done.tokens for done in model.generate(PROMPTS, SAMPLING)] == expected
        assert [len(session.recorded) for session in gpu.sessions] == [1, 1]


def test_a_graph_that_cannot_be_recorded_runs_as_it_is(bundle, expected, gpu):
    gpu.refuses_graphs = True
    with load(bundle, device="cuda", **OPTIONS) as model:
        assert [done.tokens for done in model.generate(PROMPTS, SAMPLING)] == expected
        assert not any(session.records for session in gpu.sessions)


def test_a_step_moves_kilobytes(bundle, gpu):
    with load(bundle, device="cuda", **OPTIONS) as model:
        model.generate(PROMPTS, Sampling(max_new_tokens=8, ignore_eos=True))
        vocabulary = model.bundle.manifest.text.vocabulary
        before, steps = gpu.driver.moved, 32
        model.generate(PROMPTS, Sampling(steps, temperature=0.8, top_k=20, logprobs=5, seed=1, ignore_eos=True))
        moved = (gpu.driver.moved - before) / steps / len(PROMPTS)
    # Known tokens with their logits, a sum for each run of 256, ids, positions, lengths; all padded to 256 bytes.
    known, runs = min(128, vocabulary), -(-vocabulary // 256)
    assert moved < known * 8 + runs * 4 + 6 * 256


def test_an_old_bundle_without_the_graph_runs_the_same(bundle, expected, gpu, tmp_path):
    import json
    import shutil

    old = shutil.copytree(bundle, tmp_path / "old")
    manifest = json.loads((old / "fmedge.json").read_text("utf-8"))
    file = manifest["graphs"].pop("candidates")["file"]
    del manifest["files"][file]
    (old / "fmedge.json").write_text(json.dumps(manifest), "utf-8")
    (old / file).unlink()
    with load(old, device="cuda", **OPTIONS) as model:
        assert [done.tokens for done in model.generate(PROMPTS, SAMPLING)] == expected
        assert len(gpu.sessions) == 1
        assert gpu.sessions[0].replays > 50


def test_a_gpu_without_room_for_the_weights_says_what_they_take(bundle, gpu, monkeypatch):
    def no_room(*_, **__):
        raise RuntimeError("Failed to allocate memory for requested buffer of size 1073741824")

    monkeypatch.setattr(gpu, "InferenceSession", no_room)
    with pytest.raises(DeviceMemoryError, match=r"cannot open .* 1024 MiB were asked for .*\. Weights take .* cache"):
        load(bundle, device="cuda")


def test_a_step_without_room_says_what_fits(bundle, gpu):
    with load(bundle, device="cuda", **OPTIONS) as model:
        model.generate(PROMPTS, Sampling(max_new_tokens=2))
        gpu.fails = "CUDA failure 2: out of memory"
        with pytest.raises(DeviceMemoryError, match=r"MiB are free\. Weights take .* fit \d+ rows of \d+ tokens"):
            model.generate(PROMPTS, Sampling(max_new_tokens=2))
        gpu.fails = None
        assert model.generate(PROMPTS[0], Sampling(max_new_tokens=2))[0].error is None


def test_a_replay_that_fails_ends_recording_and_nothing_else(bundle, expected, gpu, capsys):
    with load(bundle, device="cuda", **OPTIONS) as model:
        model.generate([PROMPTS[0]], Sampling(max_new_tokens=20, ignore_eos=True))
        gpu.spoils = "CUDA failure 900"
        assert [done.tokens for done in model.generate(PROMPTS, SAMPLING)] == expected
    # The decoder's and that of the candidates, once each.
    assert capsys.readouterr().err.count("run one by one now: CUDA failure 900") == 2


def test_a_cache_that_does_not_fit_on_the_gpu_is_refused(bundle, monkeypatch):
    gpu = install(monkeypatch, total=(64 << 20) + (1 << 12))
    with load(bundle, device="cuda", **OPTIONS) as model:
        (done,) = model.generate([list(range(5, 200))], Sampling(max_new_tokens=2))
        assert isinstance(done.error, CacheMemoryError)
        assert "MiB more and 64 MiB are free" in str(done.error)
    open_cuda.cache_clear()
    assert gpu.driver.allocated == 0


def test_a_device_that_is_not_there_is_refused(bundle, gpu):
    with pytest.raises(BackendError, match=r"there is no device cuda:2: the driver sees 2 GPUs"):
        load(bundle, device="cuda:2")


def test_the_stand_in_has_what_the_real_module_has(gpu):
    with pytest.raises(AttributeError):
        gpu.no_such_function  # noqa: B018
    for name in ("io_binding", "run_with_iobinding", "get_providers", "get_inputs", "get_outputs"):
        assert hasattr(onnxruntime.InferenceSession, name)
    options = gpu.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "3")
    assert options.get_run_config_entry("gpu_graph_id") == "3"
