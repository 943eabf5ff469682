"""The image benchmark on a tiny model: forms run the same work, give the same output, and end in one JSON line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "image.py"


@pytest.mark.slow
def test_a_tiny_case(tmp_path: Path) -> None:
    arguments = ["--cases", "shapes", "--batches", "2", "--only", "diffusers/eager,fmedge/none,openvino"]
    arguments += ["--rounds", "1", "--repeats", "2", "--threads", "1"]
    arguments += ["--work", str(tmp_path), "--peers", str(tmp_path / "peers")]
    done = subprocess.run([sys.executable, SCRIPT, *arguments], check=True, capture_output=True, text=True, timeout=300)
    document = json.loads(done.stdout.splitlines()[-1])
    rows = {row["form"]: row for row in document["rows"]}
    assert set(rows) == {"diffusers/eager", "fmedge/none"}
    # Pixels are whole numbers: rounding may move one by one.
    assert rows["fmedge/none"]["difference"] < 0.05
    assert 0 < rows["fmedge/none"]["outside_graphs"] < 1
    assert all(0 < row["cpu_seconds"][1] <= row["cpu_seconds"][2] for row in rows.values())
    (ratio,) = document["ratios"]
    assert ratio["cpu_seconds"] == pytest.approx(
        rows["diffusers/eager"]["cpu_seconds"][0] / rows["fmedge/none"]["cpu_seconds"][0], rel=1e-2
    )
    assert document["left_out"] == ["openvino-runtime: not installed; python benchmarks/image.py --install-peers"]
