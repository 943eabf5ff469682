"""What only a broken model writes stops an export; what a small model writes does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmedge_converters import decoder_proof
from fmedge_converters import export as export_module
from fmedge_converters.degenerate import CYCLES, LARGEST_LEAD, SHORTEST, Loop, degeneration, find_loop
from fmedge_converters.export import export
from fmedge_converters.export_checks import judge
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.schemes import weight_only
from fmedge_converters.tolerances import TOLERANCES
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.errors import ParityError
from fmedge_runtimes.manifest import Evidence
from hypothesis import given, settings
from hypothesis import strategies as st
from models import add_tokenizer, make_model
from safetensors.torch import load_file, save_file


@settings(deadline=None)
@given(
    before=st.lists(st.integers(0, 3), max_size=30),
    cycle=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    length=st.integers(0, 40),
)
def test_a_loop_is_found_where_a_text_ends_with_one(before: list[int], cycle: list[int], length: int) -> None:
    tokens = before + (cycle * length)[:length]
    loop = find_loop(tokens)
    if length >= max(CYCLES * len(cycle), SHORTEST):
        assert loop is not None
        assert loop.period <= len(cycle)
    if loop is not None:
        looped = tokens[loop.start :]
        assert len(looped) >= max(CYCLES * loop.period, SHORTEST)
        assert looped[loop.period :] == looped[: -loop.period]
        assert loop.start == 0 or tokens[loop.start - 1] != tokens[loop.start - 1 + loop.period]


def test_what_the_source_would_have_written_is_its_own() -> None:
    looping, plain = [9, 8, *[1, 2] * 20], list(range(42))
    assert find_loop(looping) == Loop(2, 2)
    assert find_loop(plain) is None
    willing, unwilling = np.zeros(42), np.zeros(42)
    unwilling[2:6] = LARGEST_LEAD + 1  # on the way into the loop; then it follows, as every model does
    assert degeneration([looping, plain], [willing, willing]).passed
    found = degeneration([looping, plain], [unwilling, willing])
    assert (found.loops, found.loops_alone, found.constant, found.passed) == (1, 1, False, False)
    # A lead elsewhere is the difference between two texts, and no loop's.
    assert degeneration([plain, looping], [unwilling, willing]).passed
    assert degeneration([plain, plain], [willing, willing]).passed
    same = degeneration([plain, plain], [willing + LARGEST_LEAD + 1] * 2)
    assert (same.constant, same.passed) == (True, False)


@pytest.mark.parametrize(
    ("options", "instead"),
    [
        ({"quantize": "int4", "block_size": 128}, "--block-size 32, --quantize int4-gptq, --quantize int8"),
        ({"quantize": "int4-gptq", "head_bits": 4}, "--head-bits 8, --quantize int8"),
        ({"quantize": "int4-awq", "bits": 4.25}, "more --bits, --quantize int4-gptq, --quantize int8"),
        ({"quantize": "int4", "target": "rtx"}, "--block-size 32, --quantize int4-gptq, --quantize int8"),
        ({"quantize": "w8a8"}, "--quantize int8"),
        ({"cache": "int8"}, "--cache float"),
    ],
)
def test_a_refusal_says_what_is_beyond_its_bound_and_what_keeps_more(options: dict[str, Any], instead: str) -> None:
    failures = [*TOLERANCES["float32", "int4"].excesses(0.65, 20.86, 11.74)]
    assert failures == [
        "the KL divergence is 0.65 nats per token, where 0.35 is the most",
        "the perplexity is 20.86, where 15.85 is the most",
    ]
    assert not [*TOLERANCES["float32", "int4"].excesses(0.35, 11.0, 11.74)]
    failed = Evidence(name="full", what="a comparison", passed=False, figures={"failure": "; ".join(failures)})
    with pytest.raises(ParityError) as refusal:
        judge(failed, ExportOptions("model", Path("bundle"), **options))
    assert "; ".join(failures) in str(refusal.value)
    assert f"What keeps more of the model: {instead}. --force" in str(refusal.value)


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof of the architecture is not what is tested here, and takes as long as all the rest."""
    passed = Evidence(name="graph", what="", passed=True, figures={})
    monkeypatch.setattr(export_module, "graph_evidence", lambda *_: passed)


def refused(source: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """The figures of an export that is refused, and recorded with --force."""
    options = {"quantize": "int4", "block_size": 32, **changes}
    with pytest.raises(ParityError):
        export(ExportOptions(str(source), tmp_path / "bundle", **options))
    assert not (tmp_path / "bundle").exists()
    manifest = export(ExportOptions(str(source), tmp_path / "bundle", force=True, **options)).manifest
    assert manifest.forced
    assert not manifest.evidence[-1].passed
    return manifest.evidence[-1].figures


@pytest.mark.medium
@pytest.mark.usefixtures("trusted", "traced_once")
def test_a_loop_that_only_decoding_has_stops_the_export(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole texts are scored rightly; single tokens behind them are not, and no divergence shows it."""
    decode = Decoder.decode

    def stuck(self: Decoder, cache: Any, tokens: Any) -> Any:
        logits = decode(self, cache, tokens)
        logits[np.arange(len(tokens)), tokens] = logits.max() + 1
        return logits

    monkeypatch.setattr(Decoder, "decode", stuck)
    figures = refused(llama, tmp_path)
    assert figures["loops"] == 8
    assert figures["loops_alone"] >= 4
    assert figures["mean_kl"] < 0.35
    assert figures["not_finite"] == 0


@pytest.mark.medium
@pytest.mark.usefixtures("trusted", "traced_once")
def test_rounding_that_loses_the_weights_stops_the_export(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = weight_only.round_blocks

    def spoilt(value: float) -> Any:
        def spoil(*arguments: Any) -> Any:
            blocks = rounded(*arguments)
            return replace(blocks, scales=torch.full_like(blocks.scales, value))

        return spoil

    monkeypatch.setattr(weight_only, "round_blocks", spoilt(np.nan))
    assert refused(llama, tmp_path / "nan")["not_finite"] == 1024
    figures = refused(llama, tmp_path / "output", verify="graph")
    assert figures == {"not_finite": 8, "constant": False}
    # All products are zero: every prompt has the same logits, and the same text behind it.
    monkeypatch.setattr(weight_only, "round_blocks", spoilt(0.0))
    figures = refused(llama, tmp_path / "zero")
    assert figures["constant"]
    assert figures["loops_alone"] == 8
    assert refused(llama, tmp_path / "same", verify="graph") == {"not_finite": 0, "constant": True}


@pytest.mark.medium
@pytest.mark.usefixtures("trusted", "traced_once")
@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_a_model_that_repeats_itself_is_not_refused_for_it(quantize: str, tmp_path: Path) -> None:
    """A head that prefers one token whatever comes before it: all texts are the same, and the source's are, too."""
    folder = add_tokenizer(make_model(tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 0.01
    weights["model.norm.weight"][0] = 1000.0
    weights["model.embed_tokens.weight"][:, 0] = 10.0
    weights["lm_head.weight"][7, 0] = 1.0
    assert not any(torch.isnan(value).any() for value in weights.values())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    changes: dict[str, Any] = {} if quantize == "none" else {"block_size": 32}
    made = export(ExportOptions(str(folder), tmp_path / "bundle", quantize=quantize, **changes))
    figures = made.manifest.evidence[-1].figures
    assert figures["loops"] == 8
    assert figures["loops_alone"] == 0
    assert figures["constant"] is False


@pytest.mark.medium
@pytest.mark.usefixtures("trusted", "traced_once")
def test_the_output_of_a_graph_is_looked_at_where_nothing_is_compared(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, output = export(ExportOptions(str(llama), tmp_path / "bundle", verify="graph")).manifest.evidence
    assert (output.name, output.passed, output.figures) == ("output", True, {"not_finite": 0, "constant": False})
    monkeypatch.setattr(decoder_proof, "available_bytes", lambda: 1000)  # a machine smaller than the bundle
    options = ExportOptions(str(llama), tmp_path / "small", verify="graph")
    assert [item.name for item in export(options).manifest.evidence] == ["graph"]
