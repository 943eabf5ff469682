"""A second graph for prompts: it shares the cache and what it can of the bytes, and serves what it is for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import share_traces
from fmedge_converters.export import export
from fmedge_converters.export_checks import check_calibration
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.prefill import find_prefill
from fmedge_converters.targets import find_scheme, find_target
from fmedge_runtimes.bundle import Bundle, open_bundle
from fmedge_runtimes.decoder import BATCH_LEAST, PREFILL_LEAST, Decoder
from fmedge_runtimes.errors import BundleDamagedError, BundleFormatError, ExportError, RequestError
from fmedge_runtimes.load import load, load_text, open_decoder
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from fmedge_runtimes.plan import plan
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.text import TextModel
from fmedge_runtimes.verify import verify
from models import add_tokenizer, make_model
from tiny import tiny_config
from typer.testing import CliRunner

from fmedge.cli import app
from fmedge.commands.stopwatch import Stopwatch

PROMPT = np.random.default_rng(1).integers(0, 320, 40).tolist()


@pytest.fixture(scope="module", autouse=True)
def _one_trace(traces: dict[Any, Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        share_traces(traces, patch)
        yield


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """int4, with prompts in W8A8, fully verified. Layers are large beside the vocabulary, as in real models."""
    folder = tmp_path_factory.mktemp("prefill")
    source = add_tokenizer(make_model(folder / "model", hidden_size=128, intermediate_size=256))
    return export(ExportOptions(str(source), folder / "bundle", quantize="int4", prefill="w8a8"))


@pytest.fixture(scope="module")
def alone(both: Bundle) -> dict[str, Bundle]:
    """The same model with one graph, in int4 and in W8A8."""
    made = {}
    for scheme in ("int4", "w8a8"):
        options = ExportOptions(str(both.folder.parent / "model"), both.folder.parent / scheme, quantize=scheme)
        made[scheme] = export(replace(options, verify="none"))
    return made


def session(bundle: Bundle, graph: str) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(bundle.file(bundle.manifest.graphs[graph].file), "cpu", 1)


def places(bundle: Bundle, graph: str) -> dict[str, str]:
    """The files in which large initializers lie."""
    return {
        tensor.name: next(entry.value for entry in tensor.external_data if entry.key == "location")
        for tensor in onnx.load(bundle.file(graph), load_external_data=False).graph.initializer
        if tensor.external_data
    }


def test_the_pair_is_proven_and_verifies(both: Bundle) -> None:
    evidence = {item.name: item for item in both.manifest.evidence}
    assert {"graph", "full", "prefill"} <= set(evidence)
    assert all(item.passed for item in evidence.values())
    assert evidence["prefill"].figures["mean_kl"] < evidence["full"].figures["mean_kl"]
    assert evidence["prefill"].figures["text_tokens"] == evidence["full"].figures["text_tokens"]
    # Golden continuations begin behind prompts that the second graph has read.
    assert all(len(golden.prompt) >= PREFILL_LEAST for golden in both.manifest.golden)
    assert verify(both.folder).tokens == sum(len(golden.steps) for golden in both.manifest.golden) > 0


def test_both_graphs_have_one_contract_and_share_bytes(both: Bundle, alone: dict[str, Bundle]) -> None:
    graphs = both.manifest.graphs
    assert (graphs["prefill"].inputs, graphs["prefill"].outputs) == (
        graphs["decoder"].inputs,
        graphs["decoder"].outputs,
    )
    for name in ("decoder.onnx", "decoder.onnx.data"):
        assert both.manifest.files[name] == alone["int4"].manifest.files[name]
    shared = [name for name, file in places(both, "prefill.onnx").items() if file == "decoder.onnx.data"]
    assert any("lm_head" in name for name in shared)
    assert any("embed" in name for name in shared)
    model = onnx.load(both.file("prefill.onnx"), load_external_data=False)
    assert any(node.op_type == "DynamicQuantizeMatMul" for node in model.graph.node)
    assert both.nbytes < alone["int4"].nbytes + alone["w8a8"].nbytes - 320 * 128
    assert both.prefill_nbytes == both.nbytes - alone["int4"].nbytes


def test_prompts_go_through_one_graph_and_what_follows_through_the_other(
    both: Bundle, alone: dict[str, Bundle]
) -> None:
    facts = both.manifest.text
    decode, prompts = session(both, "decoder"), session(both, "prefill")
    pair, four, eight = Decoder(decode, facts, None, prompts), Decoder(decode, facts), Decoder(prompts, facts)
    cache, others = pair.new_cache(), eight.new_cache()
    logits = pair.prefill(cache, 0, PROMPT)
    np.testing.assert_array_equal(logits, eight.prefill(others, 0, PROMPT))
    plain = four.new_cache()
    coarse = four.prefill(plain, 0, PROMPT)
    # What goes into the cache is not smoothed: the other graph reads it.
    mine, theirs = (
        one.bound(0, 1) and decode.read(one.view(0, 1)[0]["past_key_values.0.value"]) for one in (cache, plain)
    )
    assert np.linalg.norm(mine - theirs) < 0.2 * np.linalg.norm(theirs)
    # What the W8A8 bundle has, but for its head and embedding, which have a scale for each row there.
    whole = open_decoder(alone["w8a8"].folder, threads=1)[1]
    expected = whole.prefill(whole.new_cache(), 0, PROMPT)
    assert np.corrcoef(logits, expected)[0, 1] > 0.98 > np.corrcoef(coarse, expected)[0, 1]
    # The decode step on this cache, by the pair and by the graph of the int4 bundle.
    step = pair.decode(cache, [7])
    cache.cut(0, len(PROMPT))
    single = Decoder(session(alone["int4"], "decoder"), facts)
    np.testing.assert_array_equal(step, single.decode(cache, [7]))
    cache.cut(0, len(PROMPT))
    drafted = pair.verify(cache, 0, PROMPT[:10])
    cache.cut(0, len(PROMPT))
    np.testing.assert_array_equal(drafted, four.verify(cache, 0, PROMPT[:10]))


def test_a_prompt_reads_the_same_beside_other_rows(both: Bundle) -> None:
    _, decoder = open_decoder(both.folder, threads=1)
    lone, full = decoder.new_cache(), decoder.new_cache()
    for row in range(3):
        decoder.prefill(full, row, PROMPT[row:30])
    np.testing.assert_array_equal(decoder.prefill(lone, 0, PROMPT), decoder.prefill(full, 3, PROMPT))
    decoder.close()


def steps(
    bundle: Bundle, rows: int, length: int, *, batches: bool
) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Rows and tokens of the steps of each graph."""
    decode, prompts = (Stopwatch(session(bundle, name)) for name in ("decoder", "prefill"))
    with TextModel(bundle, decode, candidates=None, prefill=prompts, batches=batches) as model:
        sampling = Sampling(3, ignore_eos=True)
        model.generate([PROMPT[row : row + length] for row in range(rows)], sampling)
    sizes = [{(step.rows, step.tokens) for step in each.steps} for each in (decode, prompts)]
    return sizes[0], sizes[1]


def test_steps_go_where_they_are_fast(both: Bundle) -> None:
    many = BATCH_LEAST
    assert steps(both, many, PREFILL_LEAST, batches=False) == ({(many, 1)}, {(1, PREFILL_LEAST)})
    assert steps(both, many, PREFILL_LEAST, batches=True) == (set(), {(1, PREFILL_LEAST), (many, 1)})
    assert steps(both, many - 1, PREFILL_LEAST - 1, batches=True) == ({(1, PREFILL_LEAST - 1), (many - 1, 1)}, set())


def test_it_can_stay_on_the_disk(both: Bundle, alone: dict[str, Bundle]) -> None:
    less, more = (plan(both, 1, 64, prefill=prefill) for prefill in (False, True))
    assert less.prefill == 0
    assert less.weights == more.weights == both.nbytes - both.prefill_nbytes
    assert both.prefill_nbytes < more.prefill == more.total - less.total
    one = plan(alone["int4"], 1, 64)
    assert abs(one.total - less.total) < one.total // 50  # the manifest's own files differ
    least = plan(both, 1, 64).total
    with pytest.raises(RequestError, match="only without its graph for prompts"):
        load(both.folder, memory=least - 1)
    off, usual = (
        [
            completion.tokens
            for completion in load_text(folder, threads=1, **options).generate([PROMPT], Sampling(8, ignore_eos=True))
        ]
        for folder, options in (
            (both.folder, {"prefill_graph": "off", "memory": least - 1}),
            (alone["int4"].folder, {}),
        )
    )
    assert off == usual


def test_uses_that_cannot_be_are_refused(both: Bundle, alone: dict[str, Bundle]) -> None:
    with pytest.raises(RequestError, match="must be one of prompts, batches, off"):
        load_text(both.folder, prefill_graph="always")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="has no second graph"):
        load_text(alone["int4"].folder, prefill_graph="batches")
    load_text(alone["int4"].folder, prefill_graph="off").close()


@pytest.mark.parametrize(
    ("target", "quantize", "prefill", "words"),
    [
        ("cuda", "int4", "w8a8", "target cuda takes no --prefill"),
        ("cpu", "int4", "bf16", "--prefill is bf16; target cpu has w8a8"),
        ("cpu", "w8a8", "w8a8", "is for --quantize int8, int4"),
        ("cpu", "none", "w8a8", "is for --quantize int8, int4"),
    ],
)
def test_what_does_not_go_together_is_refused(target: str, quantize: str, prefill: str, words: str) -> None:
    found = find_target(target)
    with pytest.raises(ExportError, match=words):
        find_prefill(found, find_scheme(found, quantize), prefill)
    assert find_prefill(found, find_scheme(found, quantize), None) is None


def test_the_command_line(both: Bundle, tmp_path: Path) -> None:
    source = str(both.folder.parent / "model")
    refused = CliRunner().invoke(app, ["export", source, str(tmp_path / "b"), "--prefill", "w8a8"])
    assert refused.exit_code == 1
    assert not (tmp_path / "b").exists()
    shown = CliRunner().invoke(app, ["inspect", str(both.folder)]).output
    assert "prefill" in shown
    assert "evidence (prefill)" in shown
    planned = CliRunner().invoke(app, ["plan", str(both.folder)]).output
    assert "graph for prompts" in planned
    without = CliRunner().invoke(app, ["plan", str(both.folder), "--prefill-graph", "off"]).output
    assert "graph for prompts" not in without


def test_eval_reads_through_the_graph_that_is_asked_for(both: Bundle, alone: dict[str, Bundle], tmp_path: Path) -> None:
    def perplexity(bundle: Path, *more: str) -> float:
        done = CliRunner().invoke(app, ["eval", str(bundle), "--tokens", "200", "--json", "--threads", "1", *more])
        assert done.exit_code == 0, done.output
        return float(json.loads(done.stdout)["bundles"][0]["text"]["perplexity"])

    off = perplexity(both.folder, "--prefill-graph", "off")
    assert off == pytest.approx(perplexity(alone["int4"].folder), abs=1e-9)
    assert perplexity(both.folder) != pytest.approx(off, rel=1e-6)
    copy = Path(shutil.copytree(both.folder, tmp_path / "copy"))
    perplexity(copy, "--prefill-graph", "off", "--record")
    assert open_bundle(copy).manifest.evidence[-1].what.endswith(", without the graph for prompts")
    assert CliRunner().invoke(app, ["eval", str(copy), "--prefill-graph", "batches"]).exit_code == 2


def changed(bundle: Bundle, folder: Path, change: dict[str, object], graph: dict[str, object]) -> Path:
    shutil.copytree(bundle.folder, folder)
    content = json.loads((folder / "fmedge.json").read_text("utf-8"))
    content |= change
    if "prefill" in content["graphs"]:
        content["graphs"]["prefill"] |= graph
    (folder / "fmedge.json").write_text(json.dumps(content), "utf-8")
    return folder


def test_damage_is_found(both: Bundle, tmp_path: Path) -> None:
    missing = changed(both, tmp_path / "missing", {}, {})
    (missing / "prefill.onnx.data").unlink()
    with pytest.raises(BundleDamagedError, match=r"prefill\.onnx\.data is missing"):
        load(missing)
    with pytest.raises(BundleFormatError, match="other inputs or outputs"):
        open_bundle(changed(both, tmp_path / "inputs", {}, {"inputs": []}))
    with pytest.raises(BundleFormatError, match="go together"):
        open_bundle(changed(both, tmp_path / "precision", {"prefill_precision": None}, {}))


def test_bundles_without_one_say_nothing_of_it(alone: dict[str, Bundle], tmp_path: Path) -> None:
    folder = shutil.copytree(alone["int4"].folder, tmp_path / "old")
    content = json.loads((folder / "fmedge.json").read_text("utf-8"))
    del content["prefill_precision"]
    (folder / "fmedge.json").write_text(json.dumps(content), "utf-8")
    assert open_bundle(folder).manifest.prefill_precision is None
    assert plan(open_bundle(folder), 1).prefill == 0


@pytest.mark.medium
def test_an_int8_cache_has_the_same_scales_in_both(both: Bundle, tmp_path: Path) -> None:
    source = str(both.folder.parent / "model")
    made = export(ExportOptions(source, tmp_path / "b", quantize="int4", prefill="w8a8", cache="int8"))
    scales = [
        {item.name: item.raw_data for item in onnx.load(made.file(name), load_external_data=False).graph.initializer}
        for name in ("decoder.onnx", "prefill.onnx")
    ]
    names = [name for name in scales[0] if name.startswith("cache.")]
    assert names
    assert all(scales[0][name] == scales[1][name] for name in names)
    assert {item.name: item.passed for item in made.manifest.evidence}["prefill"]


@pytest.mark.medium
@pytest.mark.parametrize("model", ["lfm2", "qwen3_moe"])
def test_states_and_experts_are_shared(model: str, tmp_path: Path) -> None:
    changes = tiny_config(model).to_dict()
    del changes["model_type"]
    source = add_tokenizer(make_model(tmp_path / "model", model, **changes))
    made = export(ExportOptions(str(source), tmp_path / "b", quantize="int4", prefill="w8a8", verify="none"))
    pair, four = (open_decoder(made.folder, threads=1, prefill_graph=use)[1] for use in ("prompts", "off"))
    cache, other = pair.new_cache(), four.new_cache()
    first, expected = pair.prefill(cache, 0, PROMPT), four.prefill(other, 0, PROMPT)
    assert not np.array_equal(first, expected)
    assert np.corrcoef(first, expected)[0, 1] > 0.9
    # Token by token the pair is the graph that decodes, whatever it keeps.
    pair.prefill(cache, 0, PROMPT[:5])
    four.prefill(other, 0, PROMPT[:5])
    np.testing.assert_array_equal(pair.decode(cache, [7]), four.decode(other, [7]))
    codes = [name for name, file in places(made, "prefill.onnx").items() if "experts" in name and "codes" in name]
    assert bool(codes) == (model == "qwen3_moe")
    assert all(places(made, "prefill.onnx")[name] == "decoder.onnx.data" for name in codes)


def test_text_may_be_measured_out_for_the_graph_for_prompts_alone(tmp_path: Path) -> None:
    options = ExportOptions("model", tmp_path, quantize="int4", prefill="w8a8", calibrate_tokens=512)
    target = find_target("cpu")
    scheme = find_scheme(target, "int4")
    check_calibration(scheme, find_prefill(target, scheme, "w8a8"), options)
    with pytest.raises(ExportError, match="--calibrate-tokens says how much text is used"):
        check_calibration(scheme, None, options)
