"""All rules of the preflight. A new rule is a row in one of these tables."""

from __future__ import annotations

import onnx

from fmedge_converters.preflight.attention_rules import ATTENTION_RULES
from fmedge_converters.preflight.graph import Graph
from fmedge_converters.preflight.operator_rules import OPERATOR_RULES
from fmedge_converters.preflight.quantization_rules import QUANTIZATION_RULES
from fmedge_converters.preflight.rule import Finding, Rule
from fmedge_converters.preflight.structure_rules import misuse, structure
from fmedge_converters.preflight.type_rules import TYPE_RULES
from fmedge_converters.preflight.versions import Asked

NEWEST = onnx.defs.onnx_opset_version()
RULES: tuple[Rule, ...] = (*OPERATOR_RULES, *TYPE_RULES, *ATTENTION_RULES, *QUANTIZATION_RULES)


def apply_rules(graph: Graph, asked: Asked) -> list[Finding]:
    """What the rules of a version find in a graph, node by node."""
    rules = [rule for rule in RULES if rule.concerns(asked)]
    opset = graph.model.opset_imports.get("") or graph.model.opset_imports.get("ai.onnx") or NEWEST
    found: list[Finding] = []
    for node in graph.nodes():
        misused = list(misuse(node, opset))
        found += misused
        if misused:
            continue  # the other rules take operators to be what ONNX says
        for rule in rules:
            if not rule.operators or (node.op_type in rule.operators and node.domain in ("", "ai.onnx")):
                for words in rule.look(node, graph, asked):
                    found.append(
                        Finding(
                            rule.name, rule.effect, node.name or "", node.op_type, words, rule.advice, rule.evidence
                        )
                    )
    found += structure(graph)
    return found
