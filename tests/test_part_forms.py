"""--quantize auto: which form of a part is taken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from fmedge_converters import image_evidence, part_build, part_forms
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.fused_operators import PartOperators
from fmedge_converters.module_trace import TracedModule, trace_module
from fmedge_converters.part_build import BuiltGraph
from fmedge_converters.part_evidence import DIFFERENCES, Compared
from fmedge_converters.part_forms import Choice, Form, choose, ranked
from fmedge_converters.parts.part import Call
from fmedge_converters.writer import WrittenGraph
from fmedge_runtimes.bundle import ImageBundle
from fmedge_runtimes.errors import ExportError, ParityError
from fmedge_runtimes.manifest import ImageManifest
from tiny_diffusers import PIXEL, save_pipeline


@pytest.mark.parametrize(
    ("seconds", "order"),
    [
        ([1.0, 0.9, 0.5], [2, 1, 0]),
        ([1.0, 0.99, 0.96], [0, 1, 2]),  # all within 5 %: the most precise
        ([1.04, 1.06, 1.0], [0, 2, 1]),
        ([2.0, 1.0, 1.04], [1, 2, 0]),
        ([1.0], [0]),
    ],
)
def test_the_fastest_leads_and_a_tie_goes_to_the_more_precise(seconds: list[float], order: list[int]) -> None:
    assert ranked(seconds) == order


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(PIXEL, tmp_path_factory.mktemp("pixel") / "source")


@pytest.fixture(scope="module")
def traces() -> dict[str, TracedModule]:
    return {}


@pytest.fixture(autouse=True)
def trace_once(traces: dict[str, TracedModule], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts are the same in every export."""

    def trace(
        module: torch.nn.Module, call: Call, dtype: torch.dtype, where: str, operators: PartOperators
    ) -> TracedModule:
        if where not in traces:
            traces[where] = trace_module(module, call, dtype, where, operators)
        return replace(traces[where], model=traces[where].model.clone())

    monkeypatch.setattr(part_build, "trace_module", trace)


def exported(source: Path, output: Path, said: list[str] | None = None, **options: object) -> ImageManifest:
    bundle = export(
        ExportOptions(str(source), output, quantize="auto", **options),  # type: ignore[arg-type]
        lambda text, *_: None if said is None else said.append(text),
    )
    assert isinstance(bundle, ImageBundle)
    manifest = json.loads((output / "fmedge.json").read_text())
    assert not (output / ".forms").exists()
    assert not any(".forms" in name for name in manifest["files"])
    return bundle.manifest


def pretend(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> list[int]:
    """Let runs take so long."""
    calls: list[int] = []

    def measure(forms: object, side: int) -> list[float]:
        calls.append(side)
        return [seconds[name] for name in ("none", "bf16", "int8")]

    monkeypatch.setattr(part_forms, "measure", measure)
    return calls


@pytest.mark.medium
def test_each_part_is_measured_on_this_machine(source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    manifest = exported(source, tmp_path / "out", said)
    speed = next(item for item in manifest.evidence if item.name == "speed")
    assert speed.passed
    for part in ("text_encoder", "transformer"):
        times = {form: speed.figures[f"{part}_{form}_ms"] for form in ("none", "bf16", "int8")}
        assert all(isinstance(value, float) and value > 0 for value in times.values())
        taken = speed.figures[part]
        assert any(f"{part}: {taken} is taken (none " in line for line in said)
        # By its own figures: nothing more precise is as fast, nothing at all is much faster.
        assert times[taken] <= min(times.values()) * 1.05
        if taken != "none":
            assert times["none"] > min(times.values()) * 1.05
    image = next(item for item in manifest.evidence if item.name == "image")
    assert image.passed


@pytest.mark.medium
def test_forms_that_differ_are_not_taken(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 is the fastest, but its images are too far away."""
    sides = pretend(monkeypatch, none=3.0, bf16=2.0, int8=1.0)
    monkeypatch.setattr(image_evidence, "ERRORS", {**image_evidence.ERRORS, ("float32", "int8"): 1e-9})
    said: list[str] = []
    manifest = exported(source, tmp_path / "images", said)
    speed = next(item for item in manifest.evidence if item.name == "speed")
    assert {speed.figures[part] for part in ("text_encoder", "transformer")} == {"bf16"}
    assert manifest.precision == "bf16"
    assert sum("images differ too much, bf16 is taken instead of int8" in line for line in said) == 2
    assert all(item.passed for item in manifest.evidence)
    assert sides == [part_forms.LARGEST_SIDE] * 2  # one for each part, whose configuration names no size
    assert len(manifest.golden) == 1


def form(scheme: str, mean: float) -> Form:
    return Form(scheme, Path(scheme), (), {"unet": Compared(mean, mean)}, "float32")


def test_a_form_beyond_its_tolerance_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        name, quantized = "unet", 1

    monkeypatch.setattr(part_forms, "measure", lambda forms, side: [2.0, 1.0][: len(forms)])
    far = 2 * DIFFERENCES["float32", "int8"].mean
    forms = [
        Form(scheme, Path(scheme), (Graph(),), {"unet": Compared(mean, mean)}, "float32")  # type: ignore[arg-type]
        for scheme, mean in (("none", 0.0), ("bf16", 1e-3), ("int8", far))
    ]
    choice = choose("unet", forms, None, None)
    assert [item.scheme for item in choice.forms] == ["bf16", "none"]
    assert [item.seconds for item in choice.measured] == [2.0, 1.0, None]
    assert choice.chosen.scheme == "bf16"
    monkeypatch.setattr(part_forms, "measure", lambda *_: pytest.fail("one form is not measured"))
    alone = choose("unet", forms[:1], None, None)
    assert (alone.chosen.scheme, alone.measured) == ("none", ())


def test_a_form_takes_another_s_place_and_leaves_what_is_of_none(tmp_path: Path) -> None:
    """An IP-Adapter writes its facts into the folder of a part before the part is built."""
    output, config = tmp_path / "out", tmp_path / "config.json"
    config.write_text("{}")
    (output / "unet").mkdir(parents=True)
    (output / "unet" / "facts.json").write_text("facts")
    forms = []
    for scheme in ("int8", "none"):
        place = tmp_path / scheme / "unet"
        place.mkdir(parents=True)
        written = WrittenGraph(place / "model.onnx", place / "model.onnx.data", 0, "", {})
        for file in (written.graph, written.data):
            file.write_text(scheme)
        model = ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)
        graph = BuiltGraph("unet", Call((), lambda *_: {}), model, written, 1)
        forms.append(Form(scheme, tmp_path / scheme, (graph,), {}, "float32"))
    choice = Choice("unet", forms, tuple(reversed(forms)), config)
    choice.install(output)
    for scheme in ("int8", "none"):
        assert choice.chosen.scheme == scheme
        assert {file.name: file.read_text() for file in (output / "unet").iterdir()} == {
            "model.onnx": scheme,
            "model.onnx.data": scheme,
            "config.json": "{}",
            "facts.json": "facts",
        }
        assert choice.chosen.graphs[0].written.graph == output / "unet" / "model.onnx"
        assert choice.step_down(output) == (scheme == "int8")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verify": "none"}, "has to compare; leave --verify out"),
        ({"target": "cuda"}, "on this machine's CPU; target cuda has none; choose one of none, int8"),
        ({"block_size": 32}, "--block-size means nothing to --quantize auto"),
    ],
)
def test_what_auto_cannot_be_is_refused(source: Path, tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        export(ExportOptions(str(source), tmp_path / "out", quantize="auto", **changes))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_decoders_have_no_automatic_precision(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"measures pipelines that make images .* decoders have none"):
        export(ExportOptions(str(tmp_path), tmp_path / "out", quantize="auto"))


@pytest.mark.medium
def test_an_export_whose_most_precise_form_differs_stops(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, none=3.0, bf16=2.0, int8=1.0)
    for name in ("none", "bf16", "int8"):
        monkeypatch.setitem(image_evidence.ERRORS, ("float32", name), -1.0)
    with pytest.raises(ParityError, match="image"):
        exported(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
