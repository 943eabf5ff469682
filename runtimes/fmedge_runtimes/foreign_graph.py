"""Whether the inputs and outputs of a foreign graph are those of a decoder that fmedge can run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from fmedge_runtimes.errors import BundleError
from fmedge_runtimes.foreign_folder import ForeignFolder
from fmedge_runtimes.foreign_session import ForeignGraph
from fmedge_runtimes.manifest import CacheFacts
from fmedge_runtimes.session import Session, TensorSpec

FLOATS: tuple[Literal["float32", "float16"], ...] = ("float32", "float16")
NUMBERS = ("int64", "int32")


def read_graph(foreign: ForeignFolder, session: Session) -> ForeignGraph:
    """What the graph of a folder takes and gives. Raises BundleError with what is unknown, missing or unfit."""
    names, path = foreign.names, foreign.graph
    inputs = {spec.name: spec for spec in session.inputs}
    outputs = {spec.name: spec for spec in session.outputs}
    layers = _layers(names.past_key, inputs)
    pasts = [pattern % layer for layer in layers for pattern in (names.past_key, names.past_value)]
    presents = [pattern % layer for layer in layers for pattern in (names.present_key, names.present_value)]
    steps = (names.input_ids, names.attention_mask, names.position_ids, names.branch)
    unknown = [name for name in inputs if name not in (*steps, *pasts)]
    if unknown:
        raise BundleError(f"{path} takes {_listed(unknown)}, which fmedge does not know how to feed.")
    if not layers:
        raise BundleError(
            f"{path} takes no past keys and values ({names.past_key % 0}, ...), so it cannot continue a text; export "
            "it again with its cache (optimum: --task text-generation-with-past)."
        )
    needed = (names.input_ids, names.attention_mask) if foreign.in_place else (names.input_ids,)
    missing = [name for name in (*needed, *pasts) if name not in inputs]
    missing += [name for name in (names.logits, *presents) if name not in outputs]
    if missing:
        raise BundleError(f"{path} lacks {_listed(missing)}; export it again with its cache.")
    _check_axes(path, [inputs[name] for name in steps if name in inputs and name != names.branch])
    logits = outputs[names.logits].shape
    if len(logits) != 3 or outputs[names.logits].dtype not in FLOATS:
        raise BundleError(
            f"{path} gives {names.logits} {list(logits)} as {outputs[names.logits].dtype} instead of [batch, sequence, "
            f"vocabulary] as {' or '.join(FLOATS)}."
        )
    return ForeignGraph(
        names=names,
        caches=tuple(_cache(foreign, layer, inputs) for layer in layers),
        cache_dtype=_cache_dtype(path, [inputs[name] for name in pasts]),
        vocabulary=logits[2] if isinstance(logits[2], int) else foreign.vocabulary,
        in_place=foreign.in_place,
        last_only=logits[1] == 1,
    )


def _layers(pattern: str, names: Iterable[str]) -> list[int]:
    """The numbers that stand for %d in the names of a pattern."""
    before, _, after = pattern.partition("%d")
    numbers = [name.removeprefix(before).removesuffix(after) for name in names if name.startswith(before)]
    return sorted(int(number) for number in numbers if number.isdigit())


def _check_axes(path: Path, specs: Iterable[TensorSpec]) -> None:
    """Refuse graphs for one batch size and one length, and whatever else is not [batch, tokens]."""
    for spec in specs:
        if len(spec.shape) != 2 or any(isinstance(axis, int) for axis in spec.shape) or spec.dtype not in NUMBERS:
            raise BundleError(
                f"{path} takes {spec.name} {list(spec.shape)} as {spec.dtype} instead of [batch, tokens], both of them "
                f"free, as {' or '.join(NUMBERS)}; export it again with dynamic axes."
            )


def _cache(foreign: ForeignFolder, layer: int, inputs: Mapping[str, TensorSpec]) -> CacheFacts:
    window = foreign.windows.get(layer)
    sizes = []
    for pattern in (foreign.names.past_key, foreign.names.past_value):
        spec = inputs[pattern % layer]
        axes = spec.shape
        size = axes[-1] if isinstance(axes[-1], int) else foreign.head_size
        if len(axes) != 4 or not isinstance(axes[1], int) or isinstance(axes[2], int) or size is None:
            raise BundleError(
                f"{foreign.graph} takes {spec.name} {list(axes)} instead of [batch, a number of heads, a length that "
                "is free, a size]; fmedge does not know how to lay out this cache."
            )
        sizes.append((axes[1], size))
    (heads, key_dim), (value_heads, value_dim) = sizes
    if heads != value_heads:
        raise BundleError(f"{foreign.graph}: layer {layer} has {heads} heads of keys and {value_heads} of values.")
    return CacheFacts(
        layer=layer,
        kv_heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        window=window,
        rolling=window is not None,
    )


def _cache_dtype(path: Path, specs: Iterable[TensorSpec]) -> Literal["float32", "float16"]:
    found = {spec.dtype for spec in specs}
    dtype = next((dtype for dtype in FLOATS if found == {dtype}), None)
    if dtype is None:
        raise BundleError(
            f"{path} keeps its keys and values as {_listed(sorted(found))}; fmedge keeps them as {' or '.join(FLOATS)}."
        )
    return dtype


def _listed(names: Iterable[str], most: int = 5) -> str:
    """Names in a sentence; of many, the first ones."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
