"""The text that models are compared on unless another one is given: a page of Python's own documentation."""

from __future__ import annotations

from fmedge_runtimes.errors import DataError


def builtin_text() -> str:
    """Some 23 kB of English with Python in it, the same for one Python version. Raises DataError."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions leave it out
        raise DataError(
            "this Python lacks pydoc_data, whose text is used unless another one is given; give a text file."
        ) from error
    return str(topics["typesseq"])
