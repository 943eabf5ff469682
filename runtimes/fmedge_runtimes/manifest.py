"""What `fmedge.json` says of a bundle; docs/bundle.md describes it.

docs/bundle.schema.json is its JSON Schema, made from the classes below. Unknown keys are errors: a bundle is read by a
version that understands all of it, or not at all.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fmedge_runtimes.errors import BundleError, BundleFormatError

FORMAT: Literal[1] = 1
MANIFEST = "fmedge.json"
MODEL_INDEX = "model_index.json"
"""Of an image bundle: the pipeline's class and its parts, as diffusers writes it."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]


class _Record(BaseModel):
    # A figure that is not finite is written as NaN or Infinity, as Python's json does; null could not be read back.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")


class SourceFacts(_Record):
    """The model that was exported."""

    id: str
    revision: str | None
    architecture: str
    licence: str | None
    adapter: str | None = None
    """The LoRA that was merged into it: a hub id, or the name of a folder."""
    quantization: str | None = None
    """The format that the source was quantized in; None if it was not."""
    parameters: Positive | None = None
    """Numbers in its weights, those of tied matrices once; None where they were not counted."""


class TensorFacts(_Record):
    """An input or output of a graph; a string names a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class ProfileFacts(_Record):
    """Sizes that an engine of a graph is to be built for."""

    name: str
    """`prefill` and `decode` of a decoder, in this order; `default` of any other graph."""
    axes: dict[str, tuple[Positive, Positive, Positive]]
    """The least, usual and largest size of each dynamic axis of the inputs."""


class GraphFacts(_Record):
    """An ONNX graph of the bundle."""

    file: str
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    profiles: tuple[ProfileFacts, ...] = ()
    """For targets of which engines are built; docs/tensorrt.md."""


class CacheFacts(_Record):
    """What a layer keeps of each token: a key [kv_heads, key_dim] and a value [kv_heads, value_dim].

    Graph inputs past_key_values.LAYER.key and .value [batch, kv_heads, capacity, ...], outputs present.LAYER.*, bound
    to the same memory.
    """

    layer: Count
    """The layer's number in the model, which its inputs and outputs carry."""
    kv_heads: Positive
    key_dim: Positive
    value_dim: Positive
    window: Positive | None
    """Positions that a query sees, itself included; None sees all."""
    rolling: bool
    """The buffer holds the window only: any capacity >= window, however long the text grows."""
    quantization: Literal["int8"] | None = None
    """int8: codes, whose scales (one for each head and channel) are in the graph; None: numbers of the cache's type."""
    capacity: Positive | None = None
    """Positions that the buffer always has; None: as many as the runtime likes."""
    in_place: bool = True
    """Whether past and present are the same memory; otherwise the present is copied back after each step."""


class StateFacts(_Record):
    """What a recurrent layer keeps of a row, however long: a state [*shape], zeros before the first token.

    Graph input past_states.NAME [batch, *shape], output present_states.NAME.
    """

    name: str
    shape: tuple[Positive, ...]
    dtype: Literal["float32", "float16"]
    in_place: bool
    """Whether input and output may be the same memory."""


class SamplingFacts(_Record):
    """The sampling that the model's authors recommend (generation_config.json)."""

    temperature: float = 0.0
    top_k: Count = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class TextFacts(_Record):
    """What the text runtime needs to know of a decoder."""

    context: Positive
    """Tokens that a row can hold: prompt and completion."""
    vocabulary: Positive
    """Size of the logits."""
    cache_dtype: Literal["float32", "float16"]
    """Of keys and values that are not quantized, and of what the graph computes with."""
    caches: tuple[CacheFacts, ...]
    states: tuple[StateFacts, ...]
    eos_token_ids: tuple[Count, ...]
    special_tokens: dict[str, str]
    """bos_token, eos_token, ... as the chat template spells them."""
    tokenizer: str | None
    """tokenizer.json, or None: prompts are token ids then."""
    chat_template: str | None
    sampling: SamplingFacts


class ImageFacts(_Record):
    """What the image runtime needs to know of a pipeline, beside the files that diffusers' own layout has.

    Sizes of latents, scaling factors and the like are read from each part's config.json, the trajectory from
    scheduler/scheduler_config.json, as diffusers does.
    """

    pipeline: str
    """The class in model_index.json, which says how the parts work together."""
    height: Positive
    """In pixels, when a request names no size."""
    width: Positive
    steps: Positive
    """When a request names none: what the authors recommend, else the pipeline's own default."""
    guidance: float
    adapter_scale: float | None = None
    """Of a LoRA that is not merged, when a request names none; None: there is no such LoRA."""


class ImageGolden(_Record):
    """An image that every runtime of this bundle must reproduce, within a tolerance."""

    prompt: str
    seed: Count
    steps: Positive
    guidance: float
    height: Positive
    width: Positive
    file: str
    """PNG of what came out where the bundle was made."""
    controls: tuple[str, ...] = ()
    """PNGs that the ControlNets are shown, one for each."""
    ip_adapter_image: str | None = None
    """PNG that the IP-Adapter is shown."""
    tolerance: float
    """Largest mean absolute difference of a pixel's channel, in levels of 0 to 255."""


class MatrixFacts(_Record):
    """How a matrix was rounded."""

    bits: Positive
    block_size: Positive | None
    """Weights that share a scale; None: those of an output channel do."""
    symmetric: bool
    """False if each block has a zero point of its own."""


class Evidence(_Record):
    """One comparison of the bundle with its source.

    Text: `weights` (which of a quantized source's codes it has), `allocation` (what the roundings that were chosen for
    its matrices are expected to cost), `calibration` (what was fitted to text), `graph`, `cache` (what a quantized
    cache does to the output), `full`, `prefill` (both graphs together, where prompts have one of their own), `layout`,
    `output` (what the bundle's own graph writes, where nothing was compared with the source), `eval` (what
    `fmedge eval --record` measured afterwards). Images: `parts` (each graph against its module), `image` (the
    pipeline's images against the source's), `speed` (by which measurement the parts' quantizations were chosen).
    """

    name: Literal[
        "weights",
        "allocation",
        "calibration",
        "graph",
        "cache",
        "full",
        "prefill",
        "output",
        "layout",
        "parts",
        "image",
        "speed",
        "eval",
    ]
    what: str
    passed: bool
    figures: dict[str, float | int | str | bool]


class GoldenStep(_Record):
    """One greedy token, and by how much its logit led over the next best one."""

    token: Count
    margin: float


class Golden(_Record):
    """A greedy continuation that every runtime of this bundle must reproduce."""

    prompt: tuple[Count, ...]
    steps: tuple[GoldenStep, ...]
    near_tie: float
    """A margin below this may fall either way on another processor."""


class FileFacts(_Record):
    """Size and checksum of a file."""

    bytes: Count
    sha256: Sha256


class Manifest(_Record):
    """What fmedge.json says of any bundle."""

    format: Literal[1]
    source: SourceFacts
    target: str
    device: str | None = None
    """The device that was named as the target; None if the target was named itself."""
    precision: str
    block_size: Positive | None
    graphs: dict[str, GraphFacts]
    evidence: tuple[Evidence, ...]
    forced: bool
    """True if the bundle was written although the evidence spoke against it."""
    files: dict[str, FileFacts]
    made_by: dict[str, str]


class TextManifest(Manifest):
    """The content of fmedge.json for a decoder."""

    kind: Literal["text"]
    text: TextFacts
    golden: tuple[Golden, ...]
    bits_per_weight: float | None = None
    """Of all matrices together, scales and zero points included; None where weights are not rounded in blocks, and in
    bundles of versions that did not say."""
    prefill_precision: str | None = None
    """The quantization of the graph `prefill`; None where there is none, and prompts go through the decoder's."""
    matrices: dict[str, MatrixFacts] | None = None
    """How each matrix was rounded, where that was chosen for each (--bits)."""


class ImageManifest(Manifest):
    """The content of fmedge.json for a text-to-image pipeline."""

    kind: Literal["image"]
    image: ImageFacts
    golden: tuple[ImageGolden, ...]


AnyManifest = Annotated[TextManifest | ImageManifest, Field(discriminator="kind")]
MANIFESTS: TypeAdapter[TextManifest | ImageManifest] = TypeAdapter(AnyManifest)
"""Reads either kind, and gives the JSON Schema of both."""


def read_manifest(folder: Path) -> TextManifest | ImageManifest:
    """Read and validate fmedge.json."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder; give the folder that `fmedge export` wrote.")
    if not path.is_file():
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST}; give the folder that `fmedge export` wrote."
        )
    try:
        raw: Any = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deep
        raise BundleFormatError(f"{path} is not JSON ({error}); copy or export the bundle again.") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise BundleFormatError(f"{path} has format {found}, this fmedge reads up to {FORMAT}; update fmedge.")
    try:
        manifest = MANIFESTS.validate_json(json.dumps(raw))
    except ValidationError as error:
        first = error.errors()[0]
        # Behind the kind, by which the class was chosen, comes the place inside the manifest.
        where = ".".join(str(part) for part in first["loc"][1:]) or "kind"
        words = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        raise BundleFormatError(
            f"{path}: {where}: {words} ({error.error_count()} in all); copy or export the bundle again."
        ) from error
    _check_names(path, manifest)
    return manifest


def _check_names(path: Path, manifest: TextManifest | ImageManifest) -> None:
    named = [graph.file for graph in manifest.graphs.values()]
    if isinstance(manifest, TextManifest):
        named += [name for name in (manifest.text.tokenizer, manifest.text.chat_template) if name is not None]
    else:
        named += [MODEL_INDEX, *(golden.file for golden in manifest.golden)]
    for name in (*manifest.files, *named):
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or "\\" in name or ".." in parts or ":" in name:
            raise BundleFormatError(
                f"{path}: the file name {name!r} leaves the bundle's folder; do not trust this bundle."
            )
    for name in named:
        if name not in manifest.files:
            raise BundleFormatError(f"{path}: {name} is used but not listed under files; export the bundle again.")
    if isinstance(manifest, TextManifest) and "decoder" not in manifest.graphs:
        raise BundleFormatError(f"{path}: a text bundle needs a graph named decoder; export the bundle again.")
    if isinstance(manifest, TextManifest):
        _check_prefill(path, manifest)


def _check_prefill(path: Path, manifest: TextManifest) -> None:
    """Both graphs must agree on what they read and write."""
    decoder, prefill = manifest.graphs["decoder"], manifest.graphs.get("prefill")
    if (prefill is None) != (manifest.prefill_precision is None):
        raise BundleFormatError(f"{path}: a graph named prefill and prefill_precision go together; export it again.")
    if prefill is not None and (prefill.inputs, prefill.outputs) != (decoder.inputs, decoder.outputs):
        raise BundleFormatError(
            f"{path}: the graphs decoder and prefill have other inputs or outputs, so they cannot share a cache; "
            "export the bundle again."
        )


def write_manifest(folder: Path, manifest: TextManifest | ImageManifest) -> None:
    """Write fmedge.json, aside first: whoever reads it meanwhile, or afterwards, finds a whole one. Raises OSError."""
    aside = folder / f".{MANIFEST}.partial"
    try:
        aside.write_text(manifest.model_dump_json(indent=1) + "\n", "utf-8")
        aside.replace(folder / MANIFEST)
    finally:
        aside.unlink(missing_ok=True)
