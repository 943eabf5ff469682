"""The formats of checkpoints that fmedge reads: one row and one file each. The first that matches decodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmedge_runtimes.errors import SourceError

from fmedge_converters.formats.awq import AWQ
from fmedge_converters.formats.compressed_tensors import COMPRESSED_TENSORS
from fmedge_converters.formats.gguf import GGUF
from fmedge_converters.formats.gptq import GPTQ
from fmedge_converters.formats.mxfp4 import MXFP4
from fmedge_converters.formats.plain import PLAIN
from fmedge_converters.formats.scaled import SCALED
from fmedge_converters.stored import Format

FORMATS: tuple[Format, ...] = (PLAIN, SCALED, AWQ, GPTQ, COMPRESSED_TENSORS, MXFP4, GGUF)


def find_format(quantization: Mapping[str, Any]) -> Format:
    """The format of a `quantization_config` (empty for a plain checkpoint).

    Raises SourceError when fmedge does not read it.
    """
    try:
        found = next((row for row in FORMATS if row.matches(quantization)), None)
        method = quantization.get("quant_method", "an unknown method")
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise SourceError(f"quantization_config in config.json makes no sense ({error}); copy it again.") from error
    if found is None:
        known = ", ".join(row.name for row in FORMATS)
        raise SourceError(
            f"the checkpoint is quantized by {method}, which fmedge does not read (it reads: {known}); "
            "export its original."
        )
    return found
