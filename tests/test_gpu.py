"""What waits for an NVIDIA GPU: `make test-gpu` on a machine with onnxruntime-gpu."""

from __future__ import annotations

from pathlib import Path

import pytest
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_runtimes.load import load
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.verify import verify

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("scheme", ["none", "int8", "int4"])
def test_a_cuda_bundle_reproduces_on_the_gpu_what_the_cpu_computed(scheme: str, llama: Path, tmp_path: Path) -> None:
    made = export(ExportOptions(str(llama), tmp_path / "bundle", target="cuda", quantize=scheme))
    assert verify(made.folder, "cuda").tokens == 64


def test_the_cache_grows_and_rows_move_on_the_gpu(llama: Path, tmp_path: Path) -> None:
    made = export(ExportOptions(str(llama), tmp_path / "bundle", target="cuda", verify="none"))
    prompts = [list(range(5, 5 + length)) for length in (3, 30, 11)]
    sampling = [Sampling(max_new_tokens=length, ignore_eos=True) for length in (150, 4, 70)]
    with load(made.folder, device="cuda") as model:
        together = [item.tokens for item in model.generate(prompts, sampling)]
        alone = [model.generate(prompt, one)[0].tokens for prompt, one in zip(prompts, sampling, strict=True)]
    assert together == alone
