"""Who is measured with images: each peer's forms and how they are made. Environments are those of peers.py.

A new peer is a row in `peers.ENVIRONMENTS`, its forms in `image_forms`, and a runner beside this file.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from image_workload import DECODE, IMAGES, STEP
from peers import FMEDGE, HERE, Build, Form

EVERY = (STEP, DECODE, IMAGES)
QUANTIZATIONS = ("none", "int8", "int4", "bf16")


@dataclass(frozen=True, slots=True)
class ImageForm:
    """One way to run a pipeline, and the units of work that it can do."""

    form: Form
    units: tuple[str, ...]
    needs: str | None = None
    """What this machine lacks for it; None if nothing."""
    pixels: bool = True
    """Whether it runs what `fmedge train image` makes."""


def image_forms(quantizations: Sequence[str] = QUANTIZATIONS, device: str = "cpu") -> Iterator[ImageForm]:
    """Every form of every peer; diffusers on the CPU, with which outputs are compared, first."""
    target = device.partition(":")[0]
    for mode in ("eager", "compiled"):
        form = Form("diffusers", mode, "image_diffusers.py", _nothing, FMEDGE, mode, "diffusers")
        yield ImageForm(form, EVERY, needs=None if mode == "eager" or has_compiler() else "a C++ compiler")
    for quantize in quantizations:
        units = EVERY if quantize in ("none", "bf16") else (STEP, IMAGES)  # autoencoders are never quantized
        build, output = _export_fmedge(quantize, target), "" if target == "cpu" else f"fmedge-{target}-{quantize}"
        yield ImageForm(Form(FMEDGE, quantize, "image_fmedge.py", build, FMEDGE, output=output), units)
    for precision, mode in (("f32", "f32"), ("default", "")):
        form = Form("openvino", precision, "image_openvino.py", _export_openvino, "openvino-runtime", mode, "openvino")
        yield ImageForm(form, (STEP, DECODE), pixels=False)
        whole = replace(form, peer="openvino-genai", runner="image_genai.py")
        yield ImageForm(whole, (IMAGES,), pixels=False)


def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


def _nothing(python: Path, model: Path, output: Path) -> Sequence[str]:
    """The folder itself is what runs."""
    return [str(python), "-c", ""]


def _export_fmedge(quantize: str, target: str) -> Build:
    def command(python: Path, model: Path, output: Path) -> Sequence[str]:
        arguments = ["-m", "fmedge", "export", str(model), str(output), "--verify", "none", "--quantize", quantize]
        return [str(python), *arguments, "--target", target]

    return command


def _export_openvino(python: Path, model: Path, output: Path) -> Sequence[str]:
    return [str(python), str(HERE / "openvino_file.py"), str(model), str(output)]


def python_of(form: Form, peers: Path) -> Path | None:
    """The interpreter that runs a form; None when its environment is not installed."""
    return Path(sys.executable) if form.environment == FMEDGE else form.python(peers)
