"""The graph that summarises logits on a device, so that a step sends kilobytes to the host: see `summary.py`.

It has no weights: the size of the vocabulary and the type of the logits are all that it depends on.
"""

from __future__ import annotations

import math
from pathlib import Path

import onnx.parser
import onnx_ir as ir
from fmedge_runtimes.summary import RUN

MOST = 128
"""So many of the largest logits are given: more than the top_k of most requests, and one KiB a row."""
FILE = "candidates.onnx"

_TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
candidates ({dtype}[rows, {vocabulary}] logits, float[rows] temperatures)
    => (float[rows, {most}] top_logits, int32[rows, {most}] top_ids, float[rows, {runs}] weights, float[rows] totals)
    <int64[1] most = {{{most}}}, int64[1] first = {{0}}, int64[1] last_axis = {{2}}, int64[1] row_axis = {{1}},
     int64[4] missing = {{0, 0, 0, {missing}}}, int64[3] in_runs = {{0, {runs}, {run}}}>
{{
    scores = Cast <to = 1> (logits)
    top_logits, ids = TopK <axis = -1> (scores, most)
    top_ids = Cast <to = 6> (ids)
    best = Gather <axis = 1> (top_logits, first)
    gaps = Sub (scores, best)
    divisors = Unsqueeze (temperatures, row_axis)
    scaled = Div (gaps, divisors)
    each = Exp (scaled)
    filled = Pad (each, missing)
    precise = Cast <to = 11> (filled)
    cut = Reshape (precise, in_runs)
    sums = ReduceSum <keepdims = 0> (cut, last_axis)
    weights = Cast <to = 1> (sums)
    plain = Exp (gaps)
    plainly = Cast <to = 11> (plain)
    whole = ReduceSum <keepdims = 0> (plainly, row_axis)
    totals = Cast <to = 1> (whole)
}}
"""


def write_candidates(folder: Path, vocabulary: int, dtype: str) -> tuple[ir.Model, Path]:
    """Write the graph for logits of that size and type ("float16", "float32") into a folder."""
    runs = math.ceil(vocabulary / RUN)
    text = _TEXT.format(
        dtype={"float32": "float"}.get(dtype, dtype),
        vocabulary=vocabulary,
        most=min(MOST, vocabulary),
        run=RUN,
        runs=runs,
        missing=runs * RUN - vocabulary,
    )
    model = ir.from_proto(onnx.parser.parse_model(text))
    path = folder / FILE
    ir.save(model, path)
    return model, path
