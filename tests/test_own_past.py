"""Models that keep their past in ways of their own, against PyTorch's logits: tokens alone could agree by chance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.reduced import write_random_model
from fmedge_runtimes.bundle import open_bundle
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from tiny import tiny_config

LENGTHS = (40, 23, 6)
DECODED = 4


@pytest.mark.medium
@pytest.mark.parametrize(
    "model_type",
    [
        "recurrent_gemma",  # on its layers, beside a cache of a window
        "xlstm",  # in an object that it returns
        "minimax",  # in a cache of its own class, beside keys and values
    ],
)
def test_logits_of_a_ragged_batch_equal_pytorch(model_type: str, tmp_path: Path) -> None:
    reference = write_random_model(tiny_config(model_type), tmp_path / "model", seed=0)
    bundle = export(ExportOptions(str(tmp_path / "model"), tmp_path / "bundle", verify="none")).folder
    facts = open_bundle(bundle).manifest.text
    assert facts.states and all(state.in_place for state in facts.states)
    decoder = Decoder(OnnxRuntimeSession(bundle / "decoder.onnx", "cpu", 1), facts)
    random = np.random.default_rng(0)
    rows = [random.integers(3, facts.vocabulary, length).tolist() for length in LENGTHS]
    with torch.no_grad(), quiet_libraries():
        wanted = [reference(input_ids=torch.tensor([row]), use_cache=False).logits[0].numpy() for row in rows]
    cache = decoder.new_cache()
    for number, row in enumerate(rows):
        last = decoder.prefill(cache, number, row[:-DECODED])
        np.testing.assert_allclose(last, wanted[number][-DECODED - 1], atol=1e-4)
    for step in range(-DECODED, 0):
        logits = decoder.decode(cache, [row[step] for row in rows])
        np.testing.assert_allclose(logits, [row[step] for row in wanted], atol=1e-4)
    decoder.session.close()
