"""What an error of another library says, in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name if it says nothing."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    # A line that ends with a colon announces the next one.
    count = 2 if lines and lines[0].endswith(":") else 1
    message = " ".join(lines[:count])
    if not message:
        return type(error).__name__
    return f"{type(error).__name__}: {message}" if isinstance(error, KeyError) else message  # else the key alone
