"""The built-in text: the documentation that every CPython carries.

The language reference's topics (pydoc_data) and the docstrings of the standard library are about
2 MB of English with Python in it. They are read at run time from the interpreter that runs, its
sources parsed and never imported, so that a first training run needs no download. Another Python
version gives another text; one version gives the same text everywhere.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from fmedge_runtimes.errors import DataError

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
"""Other people's packages, and tests: distributions leave those out, and their docstrings say little."""

ENOUGH_BYTES = 500_000
"""Less than this is not a whole standard library, but what an embedded Python keeps of it."""


def python_documents() -> list[str]:
    """Every topic and docstring once, in an order that depends on the Python version only."""
    documents = list(dict.fromkeys([*_topics(), *_docstrings(Path(sysconfig.get_path("stdlib")))]))
    if sum(map(len, documents)) < ENOUGH_BYTES:
        raise DataError(
            f"the built-in text is not there: {sysconfig.get_path('stdlib')} holds no complete standard "
            "library; give your own text with --data"
        )
    return documents


def _topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # Minimal installations leave it out.
        return
    for name in sorted(topics):
        yield topics[name].strip()


def _docstrings(stdlib: Path) -> Iterator[str]:
    for path in sorted(stdlib.rglob("*.py"), key=lambda path: path.relative_to(stdlib).parts):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(stdlib).parts):
            yield from _docstrings_of(path)


def _docstrings_of(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        # Parsing reports the old escapes ("\d") of sources that are not ours to change.
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # lib2to3 and others carry broken sources on purpose.
            return
    yield from _docstrings_below(tree)


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring and docstring.strip():
            yield docstring.strip()
    for child in ast.iter_child_nodes(node):
        # Expressions hold no definitions, and are most of a tree.
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _docstrings_below(child)
