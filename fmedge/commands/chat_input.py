"""What a person types in a chat: messages of one line or several."""

from __future__ import annotations

import sys
from contextlib import suppress

BLOCK = '"""'


def read_message() -> str | None:
    """The next message; None at the end of input.

    A line that ends in a backslash goes on in the next one; between two lines of three double quotes all lines are one
    message. What is there when the input ends is a message, too.
    """
    lines: list[str] = []
    block = False
    while True:
        line = _read_line("... " if lines or block else ">>> ")
        if line is None:
            return "\n".join(lines) if lines else None
        if line.strip() == BLOCK:
            if block:
                return "\n".join(lines)
            if not lines:
                block = True
                continue
        if block:
            lines.append(line)
        elif line.endswith("\\"):
            lines.append(line[:-1])
        else:
            return "\n".join([*lines, line])


def _read_line(prompt: str) -> str | None:
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() its editing and history
        try:
            return input(prompt)
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None
