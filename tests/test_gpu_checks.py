"""The script that runs every GPU check: what of it can be checked without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_checks

    return gpu_checks


def test_without_a_gpu_it_says_so_in_one_line(checks, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_checks.py"])
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent / "runtimes"))

    def run(command, **options):
        # On a machine with a GPU, too.
        return subprocess_run(command, **{**options, "env": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}})

    subprocess_run = subprocess.run
    monkeypatch.setattr(checks.subprocess, "run", run)
    assert checks.main() == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("gpu_checks: there is no CUDA device")
    assert told.err.count("\n") == 1


def test_wheels_are_put_together_from_their_parts(checks, tmp_path):
    content = bytes(range(256)) * 40
    folder, whole = tmp_path / "wheels", tmp_path / "whole"
    folder.mkdir()
    whole.mkdir()
    for number in range(11):
        (folder / f"some-1.0-py3-none-any.whl.{number:02}").write_bytes(content[number * 1000 : (number + 1) * 1000])
    (wheel,) = checks.joined(folder, whole)
    assert wheel.name == "some-1.0-py3-none-any.whl"
    assert wheel.read_bytes() == content
    (folder / "some-1.0-py3-none-any.whl.04").unlink()
    with pytest.raises(RuntimeError, match="one is missing"):
        list(checks.joined(folder, whole))


def test_rows_of_the_benchmarks_become_rows_of_the_table(checks, monkeypatch):
    from image_report import ImageSample, image_json, image_rows
    from image_workload import ImageMeasurement
    from report import Sample, json_line, rows_from_samples
    from workload import Measurement

    measured = Measurement(1.0, 100.0, [20.0], [5000.0], [750.0])
    text = json_line(rows_from_samples([Sample("smol135", 8, "fmedge/int4-32", 0, measured, 0.0)]), {"left_out": []})
    image = ImageMeasurement(1.0, 9.0, [0.25], [0.2], [], [])
    images = image_json(image_rows([ImageSample("sd15", "step", 1, "fmedge/none", image, 0.0)]), {"left_out": []})

    def run(command, **_):
        assert command[2:4] == ["--device", "cuda"]
        line = text if command[1].endswith("text.py") else images
        return subprocess.CompletedProcess(command, 0, "progress\n" + line + "\n")

    monkeypatch.setattr(checks.subprocess, "run", run)
    (row,) = checks.check_text()
    assert (row.check, row.result) == ("smol135 fmedge/int4-32 batch 8", "5000 prefill, 750 decode tokens/s")
    (row,) = checks.check_images()
    assert (row.check, row.result) == ("sd15 step fmedge/none batch 1", "250.0 ms")
    text = json.dumps({"rows": [], "left_out": ["smol135: failed (no memory)"]})
    with pytest.raises(ValueError, match="no memory"):
        list(checks.check_text())
