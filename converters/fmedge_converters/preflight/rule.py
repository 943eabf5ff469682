"""What a rule of the preflight is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from fmedge_converters.preflight.graph import Graph
from fmedge_converters.preflight.versions import Asked, Number

Effect = Literal["fails", "wrong", "note"]
"""fails: TensorRT refuses the graph. wrong: it takes it, and computes something else. note: worth knowing."""
Evidence = Literal["ran in TensorRT-RTX 1.7.1", "parser source", "changelog", "documentation"]
"""How a rule is known. None was seen on a device yet."""

Look = Callable[[ir.Node, Graph, Asked], Iterator[str]]
"""What is wrong with a node, in words that follow "TensorRT 10.3: "."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that TensorRT wants."""

    name: str
    operators: tuple[str, ...]
    """The operators that it looks at; none: all of them."""
    look: Look
    advice: str
    evidence: Evidence
    effect: Effect = "fails"
    since: Number = (0, 0)
    until: Number = (999, 0)
    """Versions that it is for: since <= version < until."""
    rtx: bool | None = None
    """For TensorRT-RTX only, or for all but it; None: for both."""

    def concerns(self, asked: Asked) -> bool:
        """Whether it is for a version."""
        version = asked.version
        return self.since <= version.number < self.until and self.rtx in (None, version.rtx)


@dataclass(frozen=True, slots=True)
class Finding:
    """A node that a rule is about."""

    rule: str
    effect: Effect
    node: str
    operator: str
    message: str
    advice: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.operator} {self.node}: {self.message}. {self.advice}. [{self.rule}; {self.evidence}]"
