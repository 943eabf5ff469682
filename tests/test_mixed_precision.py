"""A budget of bits: it is kept, and spent on what is most sensitive."""

from __future__ import annotations

import itertools
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from calibrated_graphs import CONTEXT, build, calibration, error, logits, random_model
from fmedge_converters import budget, mixed_precision, streamed_model
from fmedge_converters import weight as weight_module
from fmedge_converters.build import BuildOptions, build_decoder
from fmedge_converters.calibration.calibration import Calibration
from fmedge_converters.checkpoint import Files
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.mixed_precision import Matrix, Option, allocate, candidates
from fmedge_converters.passes.divided_head import can_be_divided, divide_head
from fmedge_converters.passes.linear import heads
from fmedge_converters.passes.lookup import lookups
from fmedge_converters.reference import open_streamed
from fmedge_converters.rounding import Rounding, round_blocks
from fmedge_converters.schemes.floating import FLOATING
from fmedge_converters.sensitivity import Sensitivities, measure_sensitivities
from fmedge_converters.source import open_source
from fmedge_converters.streamed_model import StreamedModel
from fmedge_converters.targets import TARGETS
from fmedge_runtimes.errors import ExportError
from fmedge_runtimes.manifest import Evidence
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

TEXT = np.random.default_rng(1).integers(0, 320, 96).tolist()

options = st.lists(
    st.builds(Option, st.none(), st.integers(1, 60), st.floats(0, 1)),
    min_size=1,
    max_size=4,
    unique_by=lambda o: o.bits,
)
matrices = st.lists(st.builds(Matrix, st.just("m"), st.integers(1, 9), options.map(tuple)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=100)
@given(having=matrices, share=st.floats(0, 1))
def test_the_allocation_is_the_cheapest_within_the_budget(having: list[Matrix], share: float) -> None:
    sizes = [[option.bits for option in matrix.options] for matrix in having]
    numbers = sum(matrix.numbers for matrix in having)
    least, most = (sum(map(of, sizes)) for of in (min, max))
    budget = least + int((most - least) * share)
    if least == most:
        return
    found = allocate(having, budget / numbers + 1e-9)
    assert sum(option.bits for option in found.chosen) <= budget
    within = (
        sum(option.cost for option in chosen)
        for chosen in itertools.product(*(matrix.options for matrix in having))
        if sum(option.bits for option in chosen) <= budget
    )
    assert found.cost == pytest.approx(min(within))


def test_large_budgets_are_kept_and_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_precision, "UNITS", 1 << 10)
    random = np.random.default_rng(0)
    having = []
    for number in range(60):
        size = int(random.integers(10**5, 10**7))
        harm = float(random.exponential())
        rounds = [Option(None, int(size * (bits + 0.125)), harm * 4.0**-bits) for bits in (3, 4, 8)]
        having.append(Matrix(str(number), size, tuple(rounds)))
    total = sum(matrix.numbers for matrix in having)
    uniform = sum(matrix.options[1].cost for matrix in having)
    found = allocate(having, 4.2)
    assert found.bits_per_weight <= 4.2
    assert found.bits_per_weight > 4.2 - 60 * 2 * (4.2 - 3.125) / 1024
    assert found.cost < uniform
    assert found == allocate(having, 4.2)
    assert total * 4.2 >= sum(option.bits for option in found.chosen)


def test_budgets_that_no_mixture_has() -> None:
    both = (Option(None, 45, 0.1), Option(None, 81, 0.0))
    having = [Matrix("a", 10, both), Matrix("b", 10, both)]
    with pytest.raises(ExportError, match=r"--bits 4 is too little.*take 4\.500 bits"):
        allocate(having, 4)
    with pytest.raises(ExportError, match=r"--bits 9 is too much.*take 8\.100 bits"):
        allocate(having, 9)
    assert allocate(having, 4.5).bits_per_weight == 4.5
    with pytest.raises(ExportError, match="nothing to choose"):
        allocate([Matrix("a", 10, both[:1])], 4.5)


def measured(folder: Path, roundings: tuple[Rounding, ...]) -> Sensitivities:
    with open_streamed(open_source(str(folder)), 128) as streamed, quiet_libraries():
        found = measure_sensitivities(streamed, TEXT, roundings, lambda *_: None)
        in_memory = [name for name, value in streamed.model.named_parameters() if not value.is_meta]
        assert all("layers" not in name and ".h." not in name for name in in_memory)
    return found


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("pieces", [0, 1 << 30], ids=["head in pieces", "head whole"])
def test_costs_are_those_of_gradients_in_memory(
    model_type: str, pieces: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_model, "PIECES_BYTES", pieces)
    monkeypatch.setattr(weight_module, "CHUNK_BYTES", 1 << 12)
    folder = make_model(tmp_path / "model", model_type, **MODELS[model_type])
    rounding = Rounding(4, 32)
    found = measured(folder, (rounding,))
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    seen: dict[str, torch.Tensor] = {}
    gone: dict[str, torch.Tensor] = {}
    products = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}

    def record(name: str, x: torch.Tensor, output: torch.Tensor) -> None:
        seen[name] = x.detach().flatten(0, -2)
        output.register_hook(lambda gradient: gone.__setitem__(name, gradient.flatten(0, -2)))

    for name, module in products.items():
        module.register_forward_hook(lambda _m, args, output, name=name: record(name, args[0], output))
    looked_up: dict[str, torch.Tensor] = {}

    def record_lookup(_module: torch.nn.Module, _args: object, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: looked_up.__setitem__("gradient", gradient.flatten(0, -2)))

    model.get_input_embeddings().register_forward_hook(record_lookup)
    logits = model(input_ids=torch.tensor([TEXT]), use_cache=False).logits[0]
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied
    assert set(found.matrices) == {f"{name}.weight" for name in products}
    assert found.tokens == len(TEXT)
    back = looked_up["gradient"]  # [T, E]
    reach = gone["lm_head"].square().sum() / len(TEXT)
    np.testing.assert_allclose(found.lookups, back.T @ back / len(TEXT) / reach, rtol=1e-3, atol=1e-6)
    for name, module in products.items():
        matrix = module.weight.detach()
        matrix = matrix.T.contiguous() if isinstance(module, Conv1D) else matrix
        importance = seen[name].square().mean(0)
        np.testing.assert_allclose(found.matrices[f"{name}.weight"].importance, importance, rtol=1e-4)
        change = round_blocks(matrix, rounding, importance, torch.bfloat16).dequantized(matrix.shape[1]) - matrix
        fisher = gone[name].square().T @ seen[name].square()
        rows = (fisher * change.square()).sum(1)  # [N]
        if name == "lm_head":
            importance = importance + torch.from_numpy(found.lookups).diagonal()
            change = round_blocks(matrix, rounding, importance, torch.bfloat16).dequantized(matrix.shape[1]) - matrix
            rows.index_add_(0, torch.tensor(TEXT), (back.square() * change[TEXT].square()).sum(1))
            by_row = found.matrices["lm_head.weight"].costs[0].rows
            assert by_row is not None
            assert by_row.sum() == pytest.approx(found.matrices["lm_head.weight"].costs[0].divergence)
            assert torch.corrcoef(torch.stack((by_row, rows)))[0, 1] > 0.99
        wanted = float(rows.sum() / (2 * len(TEXT)))
        # Codes at the edge may fall either way.
        assert found.matrices[f"{name}.weight"].costs[0].divergence == pytest.approx(wanted, rel=0.02)


def test_costs_foretell_the_divergence(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", num_hidden_layers=2)
    roundings = (Rounding(4, 16), Rounding(8, 32))
    found = measured(folder, roundings)
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor([TEXT])
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj", "lm_head"):
            module = model.get_submodule(name)
            matrix = module.weight.data
            for cost in found.matrices[f"{name}.weight"].costs:
                module.weight.data = round_blocks(matrix, cost.rounding).dequantized(matrix.shape[1]).contiguous()
                after = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
                divergence = float((before.exp() * (before - after)).sum(-1).mean())
                assert 0.5 < cost.divergence / divergence < 2.0, (name, cost, divergence)
            module.weight.data = matrix


def stored(file: Path) -> tuple[int, int]:
    """Bits of codes, scales and zero points in a graph, and the numbers that they stand for."""
    graph = onnx.load(file, load_external_data=False).graph
    sizes = {
        item.name: math.prod(item.dims) * {1: 4, 2: 1, 7: 8, 10: 2, 16: 2}[item.data_type] * 8
        for item in graph.initializer
    }
    casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    bits: dict[str, int] = {}
    numbers = 0
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            attributes = {item.name: item.i for item in node.attribute}
            numbers += attributes["K"] * attributes["N"]
            for name in node.input[1:4]:
                if name:
                    bits[casts.get(name, name)] = sizes[casts.get(name, name)]
    return sum(bits.values()), numbers


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = make_model(tmp_path_factory.mktemp("tied") / "model", tie_word_embeddings=True)
    return folder


def test_gradients_hold_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "model", num_hidden_layers=4)
    loaded: dict[str, list[weakref.ref[torch.Tensor]]] = {}
    most = 0
    fill = StreamedModel._fill

    def counting(self: StreamedModel, module: torch.nn.Module, without: Any) -> Any:
        nonlocal most
        before = fill(self, module, without)
        layer = self._names[id(module)].split(".layers.")[-1][:1]
        if before and layer.isdigit():
            parameters = [value for value in module.parameters(recurse=False) if not value.is_meta]
            loaded.setdefault(layer, []).extend(weakref.ref(value) for value in parameters)
            most = max(most, sum(any(ref() is not None for ref in refs) for refs in loaded.values()))
        return before

    monkeypatch.setattr(StreamedModel, "_fill", counting)
    measured(folder, (Rounding(4, 32),))
    assert set(loaded) == {"0", "1", "2", "3"}
    # The gradient of a layer may still be on its way when the next one is read.
    assert most <= 2


@pytest.mark.medium
@pytest.mark.usefixtures("traced_once")
def test_a_bundle_has_the_bits_that_were_asked_for(tied: Path, tmp_path: Path) -> None:
    made = {}
    for name, asymmetric in (("first", False), ("again", False), ("zeros", True)):
        wanted = ExportOptions(
            str(tied), tmp_path / name, quantize="int4", bits=5.5, asymmetric=asymmetric, verify="none"
        )
        made[name] = export(wanted)
    for bundle in made.values():
        bits, numbers = stored(bundle.file("decoder.onnx"))
        assert bits <= 5.5 * numbers
        assert bundle.manifest.bits_per_weight == pytest.approx(bits / numbers)
        assert bundle.manifest.matrices is not None
        # q, k and v, gate and up are one matrix each; the embedding is the head's.
        assert len({name.partition("[")[0] for name in bundle.manifest.matrices}) == 2 * 4 + 1
        assert len({(facts.bits, facts.block_size) for facts in bundle.manifest.matrices.values()}) > 1
    assert all(not facts.symmetric for facts in (made["zeros"].manifest.matrices or {}).values())
    for file in ("decoder.onnx", "decoder.onnx.data"):
        assert made["first"].file(file).read_bytes() == made["again"].file(file).read_bytes()
    (evidence,) = (item for item in made["first"].manifest.evidence if item.name == "allocation")
    assert evidence.figures["bits_per_weight"] == made["first"].manifest.bits_per_weight


@pytest.mark.usefixtures("traced_once")
def test_a_divided_head_computes_the_same(tied: Path, tmp_path: Path) -> None:
    starts = (32, 96, 224)

    def divide(graph: DecoderGraph, given: Calibration, *_: object) -> Evidence:
        (head,) = heads(graph)
        assert can_be_divided(graph, head)
        divide_head(graph, head, starts)
        assert [graph.weights[part.name].rows for part in heads(graph)] == list(np.diff((0, *starts, 320)))
        assert len(lookups(graph)) == len(starts) + 1
        return given.evidence("divided", {})

    whole = logits(build(tied, tmp_path / "whole", FLOATING))
    divided = replace(FLOATING, calibrate=divide, needs_calibration=True)
    np.testing.assert_allclose(logits(build(tied, tmp_path / "divided", divided)), whole, atol=1e-5)


@pytest.mark.usefixtures("traced_once")
def test_a_budget_of_fitted_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is fitted, divided where that is best, and its codes serve the lookups of tokens, too."""
    monkeypatch.setattr(budget, "STEP", 16)
    folder = random_model(tmp_path / "model", tie_word_embeddings=True)
    found = measured(folder, candidates(symmetric=True))
    wanted = logits(build(folder, tmp_path / "fp32", FLOATING))
    errors = {}
    for name in ("int4", "int4-gptq"):
        spent = BuildOptions(
            TARGETS["cpu"],
            TARGETS["cpu"].schemes[name],
            None,
            CONTEXT,
            prepare=found.attach,
            bits=5.2,
            calibration=None if name == "int4" else calibration(folder, tmp_path / "scratch", lookups=found.lookups),
        )
        (tmp_path / name).mkdir()
        built = build_decoder(
            AutoConfig.from_pretrained(folder), Files(folder), tmp_path / name, spent, lambda *_: None
        )
        assert built.allocation is not None
        bits, numbers = stored(built.written.graph)
        assert bits <= 5.2 * numbers
        assert built.quantization.bits_per_weight == pytest.approx(bits / numbers)
        assert built.allocation.bits_per_weight == pytest.approx(bits / numbers)
        parts = [matrix.name for matrix in built.allocation.matrices if "[" in matrix.name]
        assert len(parts) > 1
        graph = onnx.load(built.written.graph, load_external_data=False).graph
        lookups_of = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
        assert len(lookups_of) == len(parts)
        errors[name] = error(built, wanted)
    assert errors["int4-gptq"] < 0.75 * errors["int4"]


@pytest.mark.usefixtures("traced_once")
def test_too_few_bits_are_refused_with_the_least_there_can_be(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"--bits 2 is too little.* 4\.\d+ bits"):
        export(ExportOptions(str(tied), tmp_path / "out", quantize="int4", bits=2, verify="none"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"quantize": "int8", "bits": 4.5}, "--bits means nothing to --quantize int8"),
        ({"quantize": "int8", "asymmetric": True}, "--asymmetric means nothing to --quantize int8"),
        ({"quantize": "none", "head_bits": 4}, "--head-bits 4 means nothing to --quantize none"),
        ({"quantize": "int4", "bits": 4.5, "block_size": 32}, "what --block-size says"),
        ({"quantize": "int4", "bits": 4.5, "head_bits": 4}, "what --head-bits says"),
        ({"quantize": "int4", "head_bits": 3}, "--head-bits is 3"),
        ({"quantize": "int4", "bits": math.nan}, "--bits is nan"),
        ({"quantize": "fp8"}, "target cpu has no quantization fp8: ONNX Runtime"),
    ],
)
def test_what_means_nothing_is_refused(asked: dict[str, Any], said: str, tied: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=said):
        export(ExportOptions(str(tied), tmp_path / "out", verify="none", **asked))


def test_candidates_are_rounded_as_asked() -> None:
    assert not any(rounding.symmetric for rounding in candidates(symmetric=False))
