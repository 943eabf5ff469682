"""Who is measured: each peer's environment, the forms of its models and how they are made.

A peer that is not fmedge lives in a virtual environment of its own, which borrows torch and transformers from
fmedge's. A new peer is a row in ENVIRONMENTS, its forms in `all_forms`, and a runner beside this file.

    for form in all_forms([32, 128]):
        form.make(python, model_folder, form.path(work), fresh=False)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

HERE = Path(__file__).parent
FMEDGE = "fmedge"
ENVIRONMENTS = MappingProxyType(
    {
        "genai": ("onnxruntime-genai==0.18.*",),
        "llamacpp": ("llama-cpp-python==0.3.*", "gguf>=0.19"),
        "llamaserver": ("xllamacpp==2026.10.*", "gguf>=0.19"),
        "openvino-runtime": ("openvino-genai==2026.4.*",),
        "openvino": ("openvino-genai==2026.4.*", "optimum-intel[openvino]==2.2.*", "torch==2.13.*"),
    }
)
"""What pip installs for each peer; llama-cpp-python is compiled, which takes long."""

BUILD_LIMIT_S = 1800

Build = Callable[[Path, Path, Path], Sequence[str]]
"""From (the peer's Python, model folder, output) to the command that makes the output."""


@dataclass(frozen=True, slots=True)
class Form:
    """One way to run a model: a peer, a precision, the command that makes it and the scripts that measure it.

    `runner` measures batches; empty for a peer that only serves.
    """

    peer: str
    precision: str
    runner: str
    build: Build
    environment: str
    mode: str = ""
    output: str = ""
    """Name of the file or folder that `build` makes, where forms share one."""
    server: str = ""
    """The script that serves requests as they come; empty if there is none."""

    @property
    def name(self) -> str:
        """Unique among all forms."""
        return f"{self.peer}/{self.precision}"

    def python(self, peers: Path) -> Path | None:
        """The interpreter of its environment, or None when that is not installed."""
        if self.environment == FMEDGE:
            return Path(sys.executable)
        python = peers / self.environment / "bin" / "python"
        return python if (peers / self.environment / "installed").is_file() else None

    def path(self, folder: Path) -> Path:
        """Where this form of a model lies, below the model's folder."""
        return folder / (self.output or self.name.replace("/", "-"))

    def make(self, python: Path, model: Path, output: Path, *, fresh: bool) -> None:
        """Make this form of a model, unless it is there and need not be fresh. Raises subprocess.SubprocessError."""
        if output.exists() and not fresh:
            return
        aside = output.with_name(f"partial-{output.name}")
        remove(aside)
        command = self.build(python, model, aside)
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_LIMIT_S)
        remove(output)
        aside.rename(output)


def all_forms(block_sizes: Sequence[int], device: str = "cpu") -> Iterator[Form]:
    """Every form of every peer that runs on the device, fmedge first; the peers' packages are those for the CPU."""
    target = device.partition(":")[0]
    aside = "" if target == "cpu" else f"-{target}"
    for quantize, block_size in (("none", None), ("int8", None), *(("int4", size) for size in block_sizes)):
        precision = quantize if block_size is None else f"{quantize}-{block_size}"
        options = ["--quantize", quantize, *([] if block_size is None else ["--block-size", str(block_size)])]
        build = export_fmedge([*options, "--target", target])
        for peer, mode in ((FMEDGE, "generate"), ("fmedge-decoder", "decoder")):
            server = "serve_fmedge.py" if peer == FMEDGE else ""
            yield Form(peer, precision, "run_fmedge.py", build, FMEDGE, mode, f"fmedge{aside}-{precision}", server)
    if target != "cpu":
        return
    for precision, options in GENAI_OPTIONS.items():
        yield Form("genai", precision, "run_genai.py", build_genai(options), "genai", server="serve_genai.py")
    for precision in ("Q4_0", "Q8_0"):
        yield Form("llamacpp", precision, "run_llamacpp.py", write_gguf(precision), "llamacpp")
    yield Form("llamaserver", "Q4_0", "", write_gguf("served"), "llamaserver", server="serve_llamacpp.py")
    for precision in ("int4", "int8"):
        yield Form("openvino", precision, "run_openvino.py", _export_openvino(precision), "openvino")


GENAI_OPTIONS = MappingProxyType(
    {
        "int4": (),
        "int4-best": ("block_size=128", "accuracy_level=4", "prune_lm_head=true", "fuse_mlp_gate_up=true"),
    }
)
"""Extra options of onnxruntime-genai's model builder; the first are its defaults."""


def export_fmedge(options: Sequence[str]) -> Build:
    """A bundle, by the command line; the comparison with PyTorch is left out."""

    def command(python: Path, model: Path, output: Path) -> Sequence[str]:
        arguments = ["-m", "fmedge", "export", str(model), str(output), "--verify", "none"]
        return [str(python), *arguments, *options]

    return command


def build_genai(options: Sequence[str]) -> Build:
    """A folder of onnxruntime-genai's model builder."""

    def command(python: Path, model: Path, output: Path) -> Sequence[str]:
        arguments = ["-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(output)]
        arguments += ["-c", str(output.with_name("genai-cache")), "-p", "int4", "-e", "cpu"]
        return [str(python), *arguments, *(["--extra_options", *options] if options else [])]

    return command


def write_gguf(precision: str, statistics: Path | None = None) -> Build:
    """A GGUF file that llama.cpp has quantized, with an importance matrix if there are statistics of fmedge."""
    more = [] if statistics is None else [str(statistics)]
    return lambda python, model, output: [
        str(python), str(HERE / "gguf_file.py"), str(model), str(output), precision, *more
    ]  # fmt: skip


def _export_openvino(precision: str) -> Build:
    # The default group of 128 does not divide the hidden sizes of small models.
    grouping = ("--group-size", "64") if precision == "int4" else ()

    def command(python: Path, model: Path, output: Path) -> Sequence[str]:
        arguments = ["export", "openvino", "--model", str(model), "--task", "text-generation-with-past"]
        return [str(python.with_name("optimum-cli")), *arguments, "--weight-format", precision, *grouping, str(output)]

    return command


def install(peers: Path, wanted: Sequence[str]) -> None:
    """Make the environments of peers; one that cannot be installed is reported and left out."""
    for name in wanted:
        folder = peers / name
        done = folder / "installed"
        if done.is_file():
            continue
        print(f"{name}: installing {', '.join(ENVIRONMENTS[name])}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        # Behind the environment's own packages, so that what pip installs there comes first.
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "zz_fmedge.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *ENVIRONMENTS[name]]
        try:
            subprocess.run(pip, check=True, timeout=3600)
        except subprocess.SubprocessError as error:
            print(f"{name}: not installed ({error})", flush=True)
            continue
        done.write_text("\n".join(ENVIRONMENTS[name]) + "\n", "utf-8")


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
