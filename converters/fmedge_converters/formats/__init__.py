"""The formats of checkpoints that fmedge reads: one row and one file each. The first that matches decodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmedge_runtimes.errors import SourceError

from fmedge_converters.formats.plain import PLAIN
from fmedge_converters.stored import Format

FORMATS: tuple[Format, ...] = (PLAIN,)


def find_format(quantization: Mapping[str, Any]) -> Format:
    """The format of a `quantization_config` (empty for a plain checkpoint).

    Raises SourceError when fmedge does not read it.
    """
    for row in FORMATS:
        if row.matches(quantization):
            return row
    method = quantization.get("quant_method", "an unknown method")
    known = ", ".join(row.name for row in FORMATS)
    raise SourceError(
        f"the checkpoint is quantized by {method}, which fmedge does not read (it reads: {known}); export its original."
    )
