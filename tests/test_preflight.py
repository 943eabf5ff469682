"""The rules of `fmedge check` against small graphs, and against what TensorRT-RTX does with the same graphs.

That TensorRT-RTX agrees with a rule is evidence for TensorRT-RTX. It says nothing certain of TensorRT 10 on a Jetson,
nothing of numbers, nothing of speed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx
import pytest
from fmedge_converters import rtx
from fmedge_converters.preflight.check import CheckOptions, check
from fmedge_converters.preflight.graph import read_graph
from fmedge_converters.preflight.rtx_child import ask_rtx
from fmedge_converters.preflight.rules import RULES, apply_rules
from fmedge_converters.preflight.versions import find_version
from fmedge_runtimes.errors import BundleError, RequestError
from fmedge_runtimes.manifest import ProfileFacts
from onnx import TensorProto, helper
from preflight_graphs import BOOL, CASES, F32, Case, model, tensor, weights
from typer.testing import CliRunner

from fmedge.cli import app

with_rtx = pytest.mark.skipif(not rtx.is_available(), reason="TensorRT-RTX is not installed: pip install 'fmedge[rtx]'")


def serious(case: Case, folder: Path, target: str = "rtx") -> list:
    found = apply_rules(read_graph(case.save(folder)), find_version(target))
    return [item for item in found if item.effect != "note"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_rule_finds_what_it_is_about_and_nothing_else(case: Case, tmp_path: Path) -> None:
    found = serious(case, tmp_path)
    assert {item.rule for item in found} == ({case.rule} if case.rule else set())
    assert {item.effect for item in found} <= {case.effect}
    for item in found:
        assert item.node and item.operator and item.advice and item.evidence


@with_rtx
@pytest.mark.medium
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tensorrt_rtx_does_what_the_rules_say(case: Case, tmp_path: Path) -> None:
    graph = case.save(tmp_path)
    profiles = [ProfileFacts(name="default", axes={"tokens": (1, 4, 8)})]
    if case.rule == "attention-before-scan":  # of which the library dies
        problems = ask_rtx(graph, profiles, rtx.CAPABILITY).problems
    else:
        problems = rtx.parse(graph)
        if not problems and case.name != "unnamed_axis":
            problems = rtx.build(graph, profiles).problems
    expected = case.rule is None if case.rtx_takes is None else case.rtx_takes
    assert (not problems) == expected, [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("attention", {"10.3": "operator", "10.13": "operator", "10.16": None, "11.4": None, "jetpack-7.2": None}),
        ("swish", {"tensorrt": "operator", "11": None, "thor": "operator"}),
        ("scatter", {"tensorrt-compat": "operator", "orin-nano-8gb": "operator", "orin-nano-8gb-jp7.2": None}),
        ("cum_sum_int64", {"10.3": "cumsum-type", "10.13": None}),
        ("skip_norm", {"11": "domain", "rtx": None}),
    ],
)
def test_what_came_later_is_found_for_versions_before(name: str, targets: dict[str, str], tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    for target, rule in targets.items():
        assert {item.rule for item in serious(case, tmp_path, target)} == ({rule} if rule else set()), target


def test_types_need_their_hardware(tmp_path: Path) -> None:
    case = Case("fp8", None, weights(TensorProto.FLOAT8E4M3FN))
    assert [item.rule for item in serious(case, tmp_path, "orin-nx-16gb")] == ["hardware-types"]
    assert not serious(case, tmp_path, "thor")
    assert not serious(case, tmp_path, "10.3")  # no device was named


def test_weights_that_are_missing_are_found(tmp_path: Path) -> None:
    made = weights(block=128, size=1024)()
    onnx.save(made, tmp_path / "big.onnx", save_as_external_data=True, location="big.data")
    asked = find_version("11")
    assert not apply_rules(read_graph(tmp_path / "big.onnx"), asked)
    data = (tmp_path / "big.data").read_bytes()
    (tmp_path / "big.data").write_bytes(data[:-1])
    assert [item.rule for item in apply_rules(read_graph(tmp_path / "big.onnx"), asked)] == ["weights"]


def test_nodes_of_branches_are_looked_at_and_local_functions_are_not(tmp_path: Path) -> None:
    branch = helper.make_graph([helper.make_node("Det", ["x"], ["y"], name="inner")], "b", [], [tensor("y", F32)])
    node = helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch, name="outer")
    made = model([node], [tensor("c", BOOL), tensor("x", F32, 4, 4)], [tensor("z", F32)])
    onnx.save(made, tmp_path / "branch.onnx")
    assert {item.node for item in apply_rules(read_graph(tmp_path / "branch.onnx"), find_version("11"))} == {"inner"}
    function = helper.make_function(
        "own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 20)]
    )
    graph = helper.make_graph(
        [helper.make_node("Twice", ["x"], ["y"], domain="own", name="call")],
        "g",
        [tensor("x", F32, 4)],
        [tensor("y", F32, 4)],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    onnx.save(
        helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10), tmp_path / "own.onnx"
    )
    assert not apply_rules(read_graph(tmp_path / "own.onnx"), find_version("11"))


@pytest.mark.parametrize("name", ["8.6", "9.1", "10.1", "jetpack-5", "jetpack-9.1", "toaster", ""])
def test_what_is_no_version_is_refused(name: str) -> None:
    with pytest.raises(RequestError):
        find_version(name)


def test_every_rule_is_complete_and_somebody_s_case() -> None:
    assert all(rule.name and rule.advice and rule.evidence for rule in RULES)
    assert len({rule.name for rule in RULES} & {case.rule for case in CASES}) >= 15


def test_check_says_node_cure_and_level(tmp_path: Path) -> None:
    bad = next(case for case in CASES if case.name == "attention_lengths").save(tmp_path)
    done = CliRunner().invoke(app, ["check", str(bad), "--target", "11", "--up-to", "rules", "--json"])
    record = json.loads(done.output)
    assert done.exit_code == 1
    assert not record["passed"] and record["level"] is None
    (finding,) = record["graphs"][0]["findings"]
    assert (finding["node"], finding["operator"], finding["effect"]) == ("node0", "Attention", "wrong")
    done = CliRunner().invoke(app, ["check", str(bad), "--target", "11", "--up-to", "rules"])
    assert "nonpad_kv_seqlen is ignored" in done.output and "Give a mask" in done.output
    good = next(case for case in CASES if case.name == "attention").save(tmp_path)
    done = CliRunner().invoke(app, ["check", str(good), "--up-to", "rules"])
    assert done.exit_code == 0 and "level reached: rules passed" in done.output
    (tmp_path / "no.onnx").write_bytes(b"nothing")
    with pytest.raises(BundleError, match="is no ONNX graph"):
        read_graph(tmp_path / "no.onnx")


@with_rtx
@pytest.mark.medium
def test_check_builds_here_with_tensorrt_rtx(tmp_path: Path) -> None:
    good = next(case for case in CASES if case.name == "attention").save(tmp_path)
    found = check(good, CheckOptions("rtx"))
    assert found.passed and found.level == "built"
    # A dynamic graph needs sizes.
    node = helper.make_node("Relu", ["x"], ["y"])
    onnx.save(model([node], [tensor("x", F32, "n", 8)], [tensor("y", F32, "n", 8)]), tmp_path / "dynamic.onnx")
    assert check(tmp_path / "dynamic.onnx", CheckOptions("rtx")).level == "parsed"
    assert check(tmp_path / "dynamic.onnx", CheckOptions("rtx", axes={"n": (1, 2, 4)})).level == "built"
    # fp8 is built for a GPU that has it.
    fp8 = Case("fp8", None, weights(TensorProto.FLOAT8E4M3FN)).save(tmp_path)
    assert check(fp8, CheckOptions("rtx")).level == "built"
    bad = next(case for case in CASES if case.name == "mixed_add").save(tmp_path)
    refused = check(bad, CheckOptions("rtx")).graphs[0].levels[1]
    assert refused.reached is False and "same" in refused.how


@pytest.mark.parametrize(("said", "found"), [("", (False, None)), ("parsed", (True, False))])
def test_a_library_that_dies_is_one_line(
    said: str, found: tuple[bool, bool | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of Python, a program that ends as TensorRT-RTX's builder does of a tiny falcon_h1."""
    dying = tmp_path / "python"
    dying.write_text(f"#!/bin/sh\ncat > /dev/null\necho {said}\nkill -SEGV $$\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    verdict = ask_rtx(tmp_path / "graph.onnx", [], rtx.CAPABILITY)
    assert (verdict.parsed, verdict.built) == found
    (problem,) = verdict.problems
    assert "died of signal 11 while it " + ("built" if verdict.parsed else "read") in str(problem)
