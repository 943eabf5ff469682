"""How much memory an image bundle takes, and what fits: said from its manifest and configs, before anything is loaded.

    found = plan_image(bundle, height=512, width=512, batch=4, memory=8 << 30)
    found.total("keep"), found.total("sequential"), found.fits("keep")

Weights are the bytes of the files, and what ONNX Runtime adds when it rearranges them. What a graph needs while it runs
is an estimate from the sizes in its config: the widest activations, and the scores of attention, which graphs without
fused kernels hold. Python and ONNX Runtime themselves take about 60 MiB beside all that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fmedge_runtimes.bundle import ImageBundle
from fmedge_runtimes.engine_file import EngineFacts, read_engine
from fmedge_runtimes.errors import BackendError, RequestError
from fmedge_runtimes.manifest import ImageFacts
from fmedge_runtimes.parts import Config, MemoryMode
from fmedge_runtimes.pipelines.autoencoder import TILED_FROM, TOGETHER
from fmedge_runtimes.pipelines.clip_text import ROWS
from fmedge_runtimes.pipelines.control import EMBEDDING, control_nets
from fmedge_runtimes.tensorrt_library import LIBRARIES

FLOAT, HALF = 4, 2
"""Bytes; graphs of narrower types need less."""
FUSED = frozenset({"tensorrt", "rtx"})
"""Targets in whose graphs attention is one operator."""
REARRANGED = 1.2
"""Bytes in memory of a byte of weights: measured with ONNX Runtime 1.32 on the CPU, weights as external data."""
SCORES = 2
"""Copies of attention's scores that are alive at once: before and behind the softmax. Measured."""
UNET_ACTIVATIONS = 12
"""Widest activations of a UNet that are alive at once, skip connections apart."""
DECODER_ACTIVATIONS = 4.5
"""The same of an autoencoder's decoder or encoder: measured."""
TOKEN_ACTIVATIONS = 14
"""Values that a transformer holds of each token at once, as a multiple of its width."""
TEXT_TOKENS = 512
"""Of a text encoder's batch at most, where nothing says how many."""
DENOISER = "unet"
"""The part beside which ControlNets run."""
MOST_BATCH = 64
"""Larger batches are not planned."""


@dataclass(frozen=True, slots=True)
class PartPlan:
    """What one part takes; both in bytes."""

    name: str
    weights: int
    working: int
    """While it runs: an estimate."""
    beside: bool = False
    """Whether it runs beside the denoiser, in every step: a ControlNet."""
    held: bool = False
    """Whether it has that memory as long as it is loaded: an engine."""


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """What a bundle takes for images of a size, `batch` at a time."""

    height: int
    width: int
    batch: int
    guided: bool
    """Whether the denoiser has twice the rows."""
    parts: tuple[PartPlan, ...]
    memory: int | None
    """What it may take, in bytes; None: nobody said."""

    @property
    def working(self) -> int:
        """Of the part that needs most while it runs, ControlNets beside it."""
        return max(part.working + self._beside(part)[1] for part in self.parts)

    def total(self, mode: MemoryMode) -> int:
        """Bytes at the moment that takes most: all weights are there, or those of one part at a time."""
        if mode == "keep":
            held = sum(part.working for part in self.parts if part.held)
            others = (part.working + self._beside(part)[1] for part in self.parts if not part.held)
            return sum(part.weights for part in self.parts) + held + max(others, default=0)
        return max(part.weights + part.working + sum(self._beside(part)) for part in self.parts)

    def _beside(self, part: PartPlan) -> tuple[int, int]:
        """Weights and working memory of what runs beside a part."""
        if part.name != DENOISER:
            return 0, 0
        beside = [other for other in self.parts if other.beside]
        return sum(other.weights for other in beside), sum(other.working for other in beside)

    def fits(self, mode: MemoryMode) -> bool:
        """Whether it fits in the memory."""
        return self.memory is None or self.total(mode) <= self.memory


def plan_image(
    bundle: ImageBundle,
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    guided: bool | None = None,
    memory: int | None = None,
    engines: bool | None = None,
) -> ImagePlan:
    """Say what images take; None is what the bundle recommends. `engines` says whether its engines run or its graphs;
    None: what it was exported for. Raises RequestError for what cannot be, BundleError."""
    facts = bundle.manifest.image
    height, width = height or facts.height, width or facts.width
    guided = facts.guidance > 1 if guided is None else guided
    if not 1 <= batch <= MOST_BATCH:
        raise RequestError(f"a batch of {batch} images cannot be planned; give 1 to {MOST_BATCH}.")
    if height < 1 or width < 1:
        raise RequestError(f"{width}x{height} is no size; both sides must be at least 1.")
    rows = batch * (2 if guided else 1)
    factor = _factor(bundle)
    nets = control_nets(bundle.manifest.graphs)
    parts = []
    for name in bundle.manifest.graphs:
        weights = sum(
            facts.bytes for file, facts in bundle.manifest.files.items() if file.startswith(f"{name}/model.onnx")
        )
        config, profiles = Config(bundle.folder / name / "config.json"), bundle.manifest.graphs[name].profiles
        engine = None if engines is False else _engine(bundle, name)
        if engine is not None:  # which knows what it takes
            parts.append(PartPlan(name, engine.bytes, engine.device_memory, name in nets, held=True))
        elif profiles and engines is not False:
            working = engine_working(config, name, profiles[0].axes, facts, factor, bundle.manifest.target)
            parts.append(PartPlan(name, weights, working, name in nets, held=True))
        else:
            working = round(_working(config, name, height, width, factor, rows, batch))
            parts.append(PartPlan(name, round(weights * REARRANGED), working, name in nets))
    return ImagePlan(height, width, batch, guided, tuple(parts), memory)


def engine_working(
    config: Config, name: str, axes: Mapping[str, tuple[int, int, int]], image: ImageFacts, factor: int, target: str
) -> int:
    """Bytes that the engine of a part takes, for the largest sizes of its profile: an estimate.

    `factor` is pixels of a latent's side. 16-bit numbers, and no scores where attention is one operator.
    """
    rows = axes.get("batch", (1, 1, 1))[2]
    sides = [image.height, image.width]
    for number, axis in enumerate(("height", "width")):
        if axis in axes:
            sides[number] = sides[number] * axes[axis][2] // axes[axis][1]
    if "image_sequence" in axes:
        _, usual, most = axes["image_sequence"]
        sides[0] = sides[0] * most // usual
    itemsize = FLOAT if config.flag("force_upcast") else HALF
    if "latent_channels" in config.values:
        unit = 1 if name.endswith("_encoder") else factor  # pixels of a place of its input
        pixels = axes["height"][2] * axes["width"][2] * unit**2
        values = _decoded(config, pixels * rows, pixels, factor) / FLOAT
    else:
        values = _working(config, name, sides[0], sides[1], factor, rows, rows, fused=target in FUSED) / FLOAT
    return round(itemsize * values)


def _engine(bundle: ImageBundle, name: str) -> EngineFacts | None:
    """What is known of the engine of a part; None if it has none."""
    library = LIBRARIES.get(bundle.manifest.target)
    if library is None:
        return None
    try:
        return read_engine(bundle.file(bundle.manifest.graphs[name].file), library.name).facts
    except BackendError:
        return None


def _factor(bundle: ImageBundle) -> int:
    """Pixels of a latent's side; 1 for pipelines in pixel space."""
    decoder = next((name for name in bundle.manifest.graphs if name in ("vae_decoder", "movq_decoder")), None)
    if decoder is None:
        return 1
    return 1 << (len(_channels(Config(bundle.folder / decoder / "config.json"))) - 1)


def _channels(config: Config) -> Sequence[float]:
    names = ("block_out_channels", "decoder_block_out_channels", "encoder_block_out_channels")
    found = next((name for name in names if name in config.values), None)
    return (1.0,) if found is None else config.numbers(found)


def _working(
    config: Config, name: str, height: int, width: int, factor: int, rows: int, batch: int, *, fused: bool = False
) -> float:
    """Bytes that a part takes while it runs, told by what kind of config it has. `fused`: attention keeps no scores."""
    values = config.values
    area = height * width / factor**2
    if "conditioning_embedding_out_channels" in values and name.endswith(EMBEDDING):
        # An image for itself, whose widest activations are the first two.
        return FLOAT * 2 * config.numbers("conditioning_embedding_out_channels")[0] * height * width
    if "latent_channels" in values:
        return _autoencoder(config, height, width, factor, batch)
    if "down_block_types" in values and "block_out_channels" in values:
        return rows * _unet(config, area, fused=fused)
    if "num_attention_heads" in values and "attention_head_dim" in values:
        return rows * _transformer(config, area, fused=fused)
    if "hidden_size" in values or "d_model" in values:
        return _text(config)
    return 0.0


def _unet(config: Config, area: float, *, fused: bool) -> float:
    channels = config.numbers("block_out_channels")
    kinds = config.values["down_block_types"]
    heads = config.numbers("num_attention_heads", config.numbers("attention_head_dim", (8,)))
    layers = max(config.numbers("layers_per_block", (2,)))
    skips = widest = scores = 0.0
    for level, width in enumerate(channels):
        tokens = area / 4**level
        skips += (layers + 1) * width * tokens
        widest = max(widest, width * tokens)
        kind = str(kinds[level]) if level < len(kinds) else ""
        if "Attn" in kind:
            number = heads[min(level, len(heads) - 1)]
            # diffusers calls the number of heads attention_head_dim, but for these blocks, where it is what it says.
            number = width / number if kind.startswith("Simple") else number
            scores = max(scores, SCORES * number * tokens**2)
    return FLOAT * (skips + UNET_ACTIVATIONS * widest + (0 if fused else scores))


def _transformer(config: Config, area: float, *, fused: bool) -> float:
    patch = config.number("patch_size", 1)
    heads = config.number("num_attention_heads")
    # Flux packs 2 x 2 latents into a token before the transformer.
    tokens = area / max(patch, 2 if "guidance_embeds" in config.values else 1) ** 2 + TEXT_TOKENS
    width = heads * config.number("attention_head_dim")
    scores = 0 if fused else SCORES * heads * tokens**2
    return FLOAT * (scores + TOKEN_ACTIVATIONS * width * tokens)


def _autoencoder(config: Config, height: int, width: int, factor: int, batch: int) -> float:
    side = max(config.numbers("sample_size", (512,)))
    pixels = float(height * width)
    if pixels > TILED_FROM:
        pixels = side**2
    else:
        pixels *= max(1, min(batch, TOGETHER // (height * width)))
    return _decoded(config, pixels, min(height * width, pixels), factor)


def _decoded(config: Config, pixels: float, one: float, factor: int) -> float:
    """Bytes for so many pixels at once, and so many of one image."""
    channels = _channels(config)
    widest = channels[min(1, len(channels) - 1)]
    tokens = one / factor**2
    scores = SCORES * tokens**2 if config.flag("mid_block_add_attention", True) else 0.0
    return FLOAT * (DECODER_ACTIVATIONS * widest * pixels + scores)


def _text(config: Config) -> float:
    width = config.number("hidden_size", config.number("d_model", 512))
    heads = config.number("num_attention_heads", config.number("num_heads", math.ceil(width / 64)))
    length = min(config.number("max_position_embeddings", 0) or TEXT_TOKENS, TEXT_TOKENS)
    rows = ROWS
    if "image_size" in config.values:
        # An encoder of images, one at a time.
        length, rows = (config.number("image_size") / config.number("patch_size", 16)) ** 2 + 1, 1
    return FLOAT * rows * (TOKEN_ACTIVATIONS * width * length + SCORES * heads * length**2)
