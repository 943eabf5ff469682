"""Rewrites of a decoder's graph, one file each, in the order of PASSES."""

from __future__ import annotations

from collections.abc import Callable

from fmedge_converters.graph import DecoderGraph
from fmedge_converters.passes.bfloat16 import compute_bfloat16_in_float32
from fmedge_converters.passes.constant_folding import fold_constants
from fmedge_converters.passes.linear import recognise_linears
from fmedge_converters.passes.merged_projections import merge_projections
from fmedge_converters.passes.pair_rotation import rotate_pairs
from fmedge_converters.passes.permutation import transpose_permutations
from fmedge_converters.passes.plain_recurrence import decompose_recurrence
from fmedge_converters.passes.reshapes import simplify_reshapes
from fmedge_converters.passes.rms_norm import fuse_rms_norms
from fmedge_converters.passes.rotary import fold_rotary_embeddings
from fmedge_converters.passes.skip_norm import fuse_skip_norms
from fmedge_converters.passes.unused_inputs import drop_position_ids

Pass = Callable[[DecoderGraph, int], int]
"""Rewrites the graph in place for a context length; returns how many places it changed."""

ORT_PASSES: tuple[Pass, ...] = (
    fold_constants,
    compute_bfloat16_in_float32,
    simplify_reshapes,
    fuse_rms_norms,
    fold_rotary_embeddings,
    simplify_reshapes,
    recognise_linears,
    simplify_reshapes,
    merge_projections,
    fuse_skip_norms,
)

TENSORRT_PASSES: tuple[Pass, ...] = (
    fold_constants,
    compute_bfloat16_in_float32,
    decompose_recurrence,
    simplify_reshapes,
    recognise_linears,
    simplify_reshapes,
    merge_projections,
    drop_position_ids,
)
"""Norms and rotary embeddings stay as they were traced, in fp32 where the model computes them so."""

PART_PASSES: tuple[Pass, ...] = (
    fold_constants,
    simplify_reshapes,
    fuse_rms_norms,
    rotate_pairs,
    transpose_permutations,
    simplify_reshapes,
    recognise_linears,
    simplify_reshapes,
)
"""For the parts of image pipelines."""

TENSORRT_PART_PASSES: tuple[Pass, ...] = (fold_constants, simplify_reshapes, recognise_linears, simplify_reshapes)
