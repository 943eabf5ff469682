"""Weights in prompts: which words count more or less, in the syntax that Stable Diffusion's users know.

    pieces("a (red:1.3) [old] ((car))")  # ("a ", 1), ("red", 1.3), (" ", 1), ("old", 1/1.1), (" ", 1), ("car", 1.21)

(x) is 1.1 times as strong, [x] 1/1.1 times, (x:1.3) 1.3 times; they nest and multiply. A backslash before a bracket
takes it literally, and so is a bracket without its partner: no prompt is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

STRONGER = 1.1
MOST = 100.0
"""No weight is larger; beyond a handful a model gives noise anyway."""
_TOKEN = re.compile(r"\\[()\[\]\\:]|[()\[\]]|[^\\()\[\]]+|\\")
_WEIGHT = re.compile(r"(.*):\s*(\d+(?:\.\d*)?|\.\d+)\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of a prompt, and its weight."""

    text: str
    weight: float


def pieces(prompt: str) -> list[Piece]:
    """The pieces of a prompt, neighbours of equal weight joined; without weights one piece, which is the prompt."""
    tokens = _TOKEN.findall(prompt)
    partner = _partners(tokens)
    # What encloses a place: the weights of the brackets that are open there.
    open_weights: list[float] = [1.0]
    found: list[Piece] = []
    cut: dict[int, str] = {}
    for number, token in enumerate(tokens):
        if number in partner and token in "([":
            weight, cut_text = _weight(tokens, number, partner[number])
            cut.update(cut_text)
            open_weights.append(min(open_weights[-1] * weight, MOST))
        elif number in partner:
            open_weights.pop()
        else:
            text = cut.get(number, token)
            _add(found, text[1:] if len(text) == 2 and text[0] == "\\" else text, open_weights[-1])
    return found or [Piece("", 1.0)]


def _partners(tokens: list[str]) -> dict[int, int]:
    """By the number of a bracket that has a partner, the partner's number."""
    partner: dict[int, int] = {}
    opened: list[int] = []
    for number, token in enumerate(tokens):
        if token in ("(", "["):
            opened.append(number)
        elif token in (")", "]"):
            wanted = "(" if token == ")" else "["
            # The nearest bracket of its kind; what was opened inside it and not closed is literal.
            at = next((index for index in range(len(opened) - 1, -1, -1) if tokens[opened[index]] == wanted), None)
            if at is not None:
                partner[opened[at]], partner[number] = number, opened[at]
                del opened[at:]
    return partner


def _weight(tokens: list[str], start: int, end: int) -> tuple[float, dict[int, str]]:
    """The weight that a pair of brackets gives, and the text before the closing one without its `:1.3`."""
    if tokens[start] == "[":
        return 1 / STRONGER, {}
    last = end - 1
    found = _WEIGHT.fullmatch(tokens[last]) if last > start and tokens[last][0] not in "\\()[]" else None
    if found is None:
        return STRONGER, {}
    return float(found[2]), {last: found[1]}


def _add(found: list[Piece], text: str, weight: float) -> None:
    if not text:
        return
    if found and found[-1].weight == weight:
        text = found.pop().text + text
    found.append(Piece(text, weight))
