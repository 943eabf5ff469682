"""All rules of the preflight. A new rule is a row in one of these tables."""

from __future__ import annotations

from collections.abc import Iterator

from fmedge_converters.preflight.attention_rules import ATTENTION_RULES
from fmedge_converters.preflight.graph import Graph
from fmedge_converters.preflight.operator_rules import OPERATOR_RULES
from fmedge_converters.preflight.quantization_rules import QUANTIZATION_RULES
from fmedge_converters.preflight.rule import Finding, Rule
from fmedge_converters.preflight.type_rules import TYPE_RULES
from fmedge_converters.preflight.versions import Asked

RULES: tuple[Rule, ...] = (*OPERATOR_RULES, *TYPE_RULES, *ATTENTION_RULES, *QUANTIZATION_RULES)


def apply_rules(graph: Graph, asked: Asked) -> list[Finding]:
    """What the rules of a version find in a graph, node by node."""
    rules = [rule for rule in RULES if rule.concerns(asked)]
    found: list[Finding] = []
    for node in graph.nodes():
        for rule in rules:
            if not rule.operators or (node.op_type in rule.operators and node.domain in ("", "ai.onnx")):
                for words in rule.look(node, graph, asked):
                    found.append(
                        Finding(
                            rule.name, rule.effect, node.name or "", node.op_type, words, rule.advice, rule.evidence
                        )
                    )
    found += _of_graph(graph)
    return found


def _of_graph(graph: Graph) -> Iterator[Finding]:
    """What concerns the graph as a whole: names of axes, and the files of its weights."""
    for value in graph.model.graph.inputs:
        if value.shape is None:
            yield Finding(
                "inputs", "fails", str(value.name), "input", "its rank is unknown", "Give it a shape", "documentation"
            )
            continue
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int) and size.value is None:
                words = f"axis {axis} is dynamic and has no name, so no profile can say its sizes"
                yield Finding("axes", "fails", str(value.name), "input", words, "Name the axis", "documentation")
    missing = set()
    for value in graph.model.graph.initializers.values():
        tensor = value.const_value
        location = getattr(tensor, "location", None)
        if location is None or location in missing:
            continue
        data = graph.path.parent / str(location)
        needed = int(getattr(tensor, "offset", None) or 0) + int(getattr(tensor, "length", None) or 0)
        if not data.is_file() or data.stat().st_size < needed:
            missing.add(location)
            words = f"its weights are in {location}, which is missing or cut off"
            yield Finding(
                "weights", "fails", str(value.name), "initializer", words, "Copy the folder again", "documentation"
            )
