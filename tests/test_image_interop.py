"""Bundles of Stable Diffusion in optimum-onnx, which needs an older transformers: a Python of its own.

python -m venv E && E/bin/pip install optimum-onnx[onnxruntime]==0.1.0 diffusers==0.35.2
FMEDGE_OPTIMUM_PYTHON=E/bin/python python -m pytest tests/test_image_interop.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from tiny_diffusers import save_pipeline, tiny_pipeline

PYTHON = os.environ.get("FMEDGE_OPTIMUM_PYTHON")
SCRIPT = """
import sys, numpy, torch
from optimum.onnxruntime import ORTDiffusionPipeline
pipeline = ORTDiffusionPipeline.from_pretrained(sys.argv[1], use_io_binding=False)
assert type(pipeline).__name__.startswith("ORTStableDiffusion"), type(pipeline)
images = pipeline(sys.argv[3], num_inference_steps=3, height=48, width=32, output_type="np",
                  generator=torch.Generator().manual_seed(3)).images
numpy.save(sys.argv[2], images)
"""


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="FMEDGE_OPTIMUM_PYTHON names no Python with optimum-onnx")
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_optimum_opens_a_bundle(tmp_path: Path, name: str) -> None:
    prompt = "a small red circle"
    bundle = export(ExportOptions(str(save_pipeline(name, tmp_path / name)), tmp_path / "out", verify="none"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(PYTHON), "-c", SCRIPT, str(bundle.folder), str(tmp_path / "images.npy"), prompt]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    wanted = tiny_pipeline(name)(
        prompt, num_inference_steps=3, height=48, width=32, output_type="np", generator=torch.Generator().manual_seed(3)
    ).images
    assert np.abs(np.load(tmp_path / "images.npy") - wanted).max() < 1e-5
