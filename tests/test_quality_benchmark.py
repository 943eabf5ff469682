"""benchmarks/quality.py: the sizes that it compares."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from models import make_model

pytestmark = pytest.mark.usefixtures("traced_once")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.medium
@pytest.mark.parametrize("tied", [False, True])
def test_all_matrices_are_counted_once(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from matrices import onnx_matrix_bytes, parameters_of_matrices

    folder = make_model(tmp_path / "model", tie_word_embeddings=tied)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3
    numbers = layer * 2 + 320 * 64 * (1 if tied else 2)
    assert parameters_of_matrices(folder) == numbers
    none = export(ExportOptions(str(folder), tmp_path / "none", verify="none")).folder
    assert onnx_matrix_bytes(none) == numbers * 4
    int4 = export(ExportOptions(str(folder), tmp_path / "int4", quantize="int4", block_size=32, verify="none")).folder
    # Layers: 4 bits and a scale of 16 for 32 weights; head and embedding: 8 bits and a scale.
    assert onnx_matrix_bytes(int4) == layer * 2 * 9 // 16 + (numbers - layer * 2) * 17 // 16


def test_matrices_of_a_gguf_file_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from matrices import gguf_matrix_bytes

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("norm", np.ones(64, np.float32))
    kind = gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor("matrix", gguf.quants.quantize(np.ones((8, 64), np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert gguf_matrix_bytes(tmp_path / "model.gguf") == 8 * 64 * 18 // 32
