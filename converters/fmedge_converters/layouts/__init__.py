"""Layouts: other runtimes that can load a bundle. A new one is a file and a row in LAYOUTS."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fmedge_runtimes.errors import ExportError

from fmedge_converters.layouts.genai import GENAI
from fmedge_converters.layouts.layout import Layout
from fmedge_converters.targets import Target

LAYOUTS: Mapping[str, Layout] = MappingProxyType({GENAI.name: GENAI})
"""By name."""


def find_layout(target: Target, name: str | None) -> Layout | None:
    """The layout of a name; None for a bundle's own files alone. Raises ExportError when the target has none such."""
    if name is None:
        return None
    if name not in LAYOUTS:
        raise ExportError(f"there is no layout {name}; choose one of {', '.join(LAYOUTS)}, or leave --layout out.")
    layout = LAYOUTS[name]
    if target.dialect.name != layout.dialect:
        raise ExportError(f"layout {name} needs the {layout.dialect} dialect; target {target.name} has another one.")
    return layout
