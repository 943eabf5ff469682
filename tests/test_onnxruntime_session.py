"""What the ONNX Runtime backend decides by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from fmedge_runtimes import onnxruntime_session


@pytest.mark.parametrize(
    ("machine", "flags", "saturates"),
    [
        ("x86_64", "flags : avx2 avx512f", True),
        ("x86_64", "flags : avx512f avx512_vnni", False),
        ("AMD64", "flags : avx2 avx_vnni", False),
        ("x86_64", None, True),
        ("aarch64", None, False),
    ],
)
def test_exact_int8_sums_are_asked_for_where_they_would_saturate(
    machine: str, flags: str | None, saturates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    if flags is not None:
        info.write_text(flags)
    monkeypatch.setattr(onnxruntime_session, "CPUINFO", info)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert onnxruntime_session._int8_saturates() is saturates
