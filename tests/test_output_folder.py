"""The output of an export is complete or as it was; what killed exports leave is swept away by the next one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fmedge_converters.output_folder import sweep, written_aside
from fmedge_runtimes.errors import ExportError

KILLED = """
import os, signal, sys
from pathlib import Path
from fmedge_converters import output_folder
output = Path(sys.argv[1])
rename = Path.rename
def killed_before(self, target):
    if self.name.endswith(".partial") and sys.argv[2] == "replacing":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = killed_before
with output_folder.written_aside(output) as folder:
    (folder / "weights").write_text("new")
    if sys.argv[2] == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_an_output_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "bundle"
    with written_aside(output) as folder:
        (folder / "weights").write_text("first")
        assert not output.exists()
    assert (output / "weights").read_text() == "first"
    with pytest.raises(ZeroDivisionError), written_aside(output) as folder:
        (folder / "weights").write_text("second")
        raise ZeroDivisionError
    assert (output / "weights").read_text() == "first"
    assert hidden(output.parent) == []


@pytest.mark.parametrize("moment", ["writing", "replacing"])
def test_what_a_killed_export_leaves_is_swept_away(moment: str, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    output.mkdir()
    (output / "weights").write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(output), moment], check=False)
    assert killed.returncode == -9
    assert hidden(tmp_path) != []
    sweep(output)
    assert hidden(tmp_path) == []
    assert (output / "weights").read_text() == "old"


def test_a_living_export_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    with written_aside(output) as folder:
        (folder / "weights").write_text("new")
        sweep(output)
        assert folder.exists()
    assert (output / "weights").read_text() == "new"


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"), written_aside(tmp_path / "file" / "bundle"):
        pass
