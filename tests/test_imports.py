"""What a device must not need, and what the command line must not wait for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fmedge

HEAVY = ("torch", "transformers", "diffusers", "onnx", "onnx_ir", "onnxscript", "safetensors", "accelerate")


def loaded(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after some code."""
    probe = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_the_runtime_needs_no_torch() -> None:
    modules = Path(fmedge.__file__).parent.parent / "runtimes" / "fmedge_runtimes"
    files = [
        path.relative_to(modules.parent).with_suffix("") for path in modules.rglob("*.py") if path.stem != "__init__"
    ]
    names = [".".join(path.parts) for path in files]
    found = loaded("import " + ", ".join(names))
    assert not found & {*HEAVY, "llguidance", "typer", "rich", "fmedge", "fmedge_converters"}
    assert "fmedge_runtimes" in found


def test_generating_needs_no_torch(bundle: Path) -> None:
    code = f"from fmedge.cli import main; import sys; sys.argv = ['fmedge', 'generate', {str(bundle)!r}, 'The']; main()"
    code = f"try:\n    {code}\nexcept SystemExit as end:\n    assert end.code == 0, end.code"
    found = loaded(code)
    assert "onnxruntime" in found
    # Only a request with a constraint loads its parser.
    assert not found & {*HEAVY, "llguidance"}


def test_evaluating_needs_no_torch(bundle: Path) -> None:
    arguments = ["eval", str(bundle), "--against", str(bundle), "--tokens", "20"]
    code = (
        f"from fmedge.cli import app\ntry:\n    app({arguments!r})\nexcept SystemExit as end:\n    assert end.code == 0"
    )
    found = loaded(code)
    assert "onnxruntime" in found
    assert not found & {*HEAVY, "matplotlib"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["export", "--help"],
        ["train", "text", "--help"],
        ["train", "image", "--help"],
        ["eval", "--help"],
        ["check", "--help"],
        ["build", "--help"],
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"from fmedge.cli import app\ntry:\n    app({arguments!r})\nexcept SystemExit as end:\n    assert end.code == 0"
    )
    assert not loaded(code) & {*HEAVY, "numpy", "onnxruntime", "tokenizers", "jinja2"}


def test_public_names_exist_and_are_sorted() -> None:
    assert all(getattr(fmedge, name) is not None for name in fmedge.__all__)
    assert fmedge.__all__ == sorted(fmedge.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = fmedge.nothing
