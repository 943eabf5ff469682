"""Python 3.10, which JetPack 6 has with TensorRT's bindings for it: it reads all of fmedge's code, where it is found.

Names of newer standard libraries are vermin's to find (make lint). What this does not prove: that a device runs it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engine_bundle import engine_bundle

ROOT = Path(__file__).parent.parent
COMPILE = """
import pathlib, sys
files = [path for folder in sys.argv[1:] for path in pathlib.Path(folder).rglob("*.py")]
for path in files:
    compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
print(len(files))
"""


def python_3_10() -> str | None:
    """One that starts: pyenv has a script of that name for versions that are not chosen."""
    places = [shutil.which("python3.10"), *map(str, Path.home().glob(".pyenv/versions/3.10.*/bin/python"))]
    ask = ["-I", "-c", "import sys; sys.exit(sys.version_info[:2] != (3, 10))"]
    return next(
        (place for place in places if place and not subprocess.run([place, *ask], check=False).returncode), None
    )


def test_python_3_10_reads_every_file() -> None:
    found = python_3_10()
    if found is None:
        pytest.skip("there is no Python 3.10 here")
    folders = [str(ROOT / folder) for folder in ("fmedge", "converters", "runtimes")]
    done = subprocess.run([found, "-I", "-c", COMPILE, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 300


def test_it_is_admitted() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert re.search(r'^requires-python = ">=3\.10"$', text, re.MULTILINE)
    assert re.search(r'^target-version = "py310"$', text, re.MULTILINE)


def test_engines_need_no_onnx_runtime(tmp_path: Path) -> None:
    """There is none for Python 3.10. What stops this program is the missing engine, not a missing package."""
    bundle = engine_bundle(tmp_path / "bundle").folder
    code = "import sys; sys.modules['onnxruntime'] = None; from fmedge.cli import main; main()"
    arguments = ["generate", str(bundle), "a", "--device", "tensorrt"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "has no engine for tensorrt yet: run `fmedge build" in " ".join(done.stderr.split())
