"""Images to latents and back: the autoencoder of a latent diffusion model, in numpy around its two graphs.

    autoencoder = Autoencoder(parts)
    mean, deviation = autoencoder.encode(part, image)
    pixels = yield from autoencoder.decode(latents, order)

Images are decoded a few at a time, and large ones in overlapping tiles that are blended: the memory of a decoder grows
with the pixels that it makes at once, and is often more than the denoiser's. Tiles and blending are diffusers'.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from fmedge_runtimes.errors import BackendError, BundleDamagedError, RequestError
from fmedge_runtimes.parts import Part, Parts
from fmedge_runtimes.pipelines.pipeline import Array, Order, Pixels, Progress

TILED_FROM = 1_500_000
"""Pixels of an image from which on it is decoded in tiles, if nobody said otherwise."""
TOGETHER = 2**20
"""Pixels that are decoded in one call at most, if they are of several images."""
OVERLAP = 0.25
"""Of a tile, with its neighbour."""
TINY = "tiny_vae_decoder"
"""The part that decodes faster and coarser, where a bundle has one."""


@dataclass(frozen=True, slots=True)
class Posterior:
    """What an encoder says of an image: a normal distribution for each latent, or the latent itself."""

    mean: Array
    """[C, h, w], in the denoiser's units."""
    deviation: Array | None
    """[C, h, w]; None where the encoder leaves nothing to chance."""

    def sample(self, normal: Callable[[Sequence[int], Sequence[int]], Array], rows: Sequence[int]) -> Array:
        """A sample for each row [B, C, h, w]; draws `normal` (Order.normal), unless nothing is left to chance."""
        if self.deviation is None:
            return np.broadcast_to(self.mean, (len(rows), *self.mean.shape)).copy()
        return self.mean + self.deviation * normal(rows, self.mean.shape)


class Autoencoder:
    """The decoder part, and the encoder part if there is one. The constructor reads the decoder's config."""

    def __init__(
        self, parts: Parts, decoder: str = "vae_decoder", encoder: str = "vae_encoder", *, scale: float | None = None
    ) -> None:
        """`scale` is used in place of all factors of the config; at 1 the denoiser works in the autoencoder's units."""
        self._parts, self._decoder, self.encoder = parts, decoder, encoder
        self._norm = _Norm.of(parts, decoder) if scale is None else _Norm(scale)
        config = parts.config(decoder)
        names = ("block_out_channels", "decoder_block_out_channels", "encoder_block_out_channels")
        blocks = next((name for name in names if name in config.values), names[0])
        self.factor = 2 ** (len(config.numbers(blocks)) - 1)
        """Pixels of a latent's side."""
        self.channels = config.whole("latent_channels")
        side = int(max(config.numbers("sample_size", (512,))))
        self._tile = max(side // self.factor, 2)
        """Latents of a tile's side."""
        self._colours: Array | None = None

    def check(self, order: Order, *, encodes: bool = True) -> None:
        """Raise RequestError for an order that it cannot decode, BundleError if it cannot encode the order's image."""
        if order.options.tiny_vae and TINY not in self._parts:
            raise RequestError(f"Diffusion.tiny_vae: {self._parts.folder} has no {TINY}; leave it out.")
        if order.image is not None and encodes:
            self._parts.require(self.encoder)

    def encode(self, part: Part, image: Array, tiling: bool | None) -> Posterior:
        """The latents of an image [3, H, W] in -1 to 1. Raises BackendError."""
        tile = self._tile_of(part, self.factor)
        size = tile * self.factor

        def run(pixels: Array) -> Array:
            return part.output("latent_parameters", part.run({"sample": pixels}))

        found = (
            _tiled(run, image[None], size, tile)
            if _wants_tiles(image.shape, tiling, size, part, 1)
            else run(image[None])
        )[0].astype(np.float32, copy=False)
        if len(found) == self.channels:
            return Posterior(self._norm.latents(found), None)
        mean, logvar = found[: self.channels], found[self.channels :]
        deviation = np.exp(np.float32(0.5) * np.clip(logvar, -30, 20))
        zero = np.zeros_like(mean)
        return Posterior(self._norm.latents(mean), self._norm.latents(deviation) - self._norm.latents(zero))

    def decode(self, latents: Sequence[Array], order: Order) -> Generator[Progress, None, list[Pixels]]:
        """The images of all jobs' latents [C, h, w]. Raises BackendError, also for an image of one colour."""
        name = TINY if order.options.tiny_vae else self._decoder
        pixels: list[Pixels] = []
        with self._parts.use(name) as part:
            height, width = (side * self.factor for side in latents[0].shape[1:])
            most = part.most("batch", max(1, min(order.max_batch, TOGETHER // (height * width))))
            for start in range(0, len(latents), most):
                some = np.stack(latents[start : start + most])
                pixels += [_varied(name, image) for image in self._pixels(part, some, order.options.tiling)]
                yield Progress("decode", len(pixels), len(latents), tuple(range(start, len(pixels))))
        return pixels

    def _pixels(self, part: Part, latents: Array, tiling: bool | None) -> list[Pixels]:
        tiny = part.name == TINY
        norm = _Norm.of(self._parts, TINY) if tiny else self._norm
        values = norm.values(latents)
        tile = self._tile_of(part, 1)
        size = tile * self.factor

        def run(some: Array) -> Array:
            outputs = part.run({"latent_sample": some})
            return part.output("sample", outputs)

        shape = (3, *(side * self.factor for side in latents.shape[2:]))
        found = (
            _tiled(run, values, tile, size) if _wants_tiles(shape, tiling, size, part, self.factor) else run(values)
        )  # [B, 3, H, W]
        return list(to_pixels(found))

    def _tile_of(self, part: Part, unit: int) -> int:
        """Latents of the side of a tile that a part takes, whose input has so many places for each."""
        return min(part.most(axis, self._tile * unit) // unit for axis in ("height", "width"))

    def preview(self, latents: Array) -> list[Pixels]:
        """Small images [h * k, w * k, 3] of latents [B, C, h, w]: by the tiny decoder, else a pixel of each latent.

        The colour of a latent is a linear function of it, which is fitted to what the decoder makes of random ones.
        """
        if TINY in self._parts:
            with self._parts.use(TINY) as part:
                return self._pixels(part, latents, None)
        if self._colours is None:
            with self._parts.use(self._decoder) as part:
                self._colours = self._fitted(part)
        flat = np.moveaxis(latents, 1, -1)  # [B, h, w, C]
        image = flat @ self._colours[:-1] + self._colours[-1]  # [B, h, w, 3]
        return list(_levels(image))

    def _fitted(self, part: Part) -> Array:
        """The linear map [C + 1, 3] from latents to colours."""
        draw = np.random.default_rng(0)
        side = max(part.least(axis, 8) for axis in ("height", "width"))
        # One hue for each patch, and a little grain: what decoders make colours of.
        shape = (32, self.channels, side, side)
        patches = draw.standard_normal(shape[:2])[..., None, None] + 0.3 * draw.standard_normal(shape)
        latents = patches.astype(np.float32)
        values, most = self._norm.values(latents), part.most("batch", len(latents))
        image = np.concatenate(
            [
                part.output("sample", part.run({"latent_sample": values[start : start + most]}))
                for start in range(0, len(values), most)
            ]
        )  # [P, 3, H, W]
        small = image.reshape(len(image), 3, side, self.factor, side, self.factor).mean(axis=(3, 5))  # [P, 3, h, w]
        known = np.moveaxis(latents, 1, -1).reshape(-1, self.channels)
        known = np.concatenate([known, np.ones((len(known), 1), np.float32)], axis=1)  # [N, C + 1]
        colours, *_ = np.linalg.lstsq(known, np.moveaxis(small, 1, -1).reshape(-1, 3), rcond=None)
        return np.asarray(colours, np.float32)


@dataclass(frozen=True, slots=True)
class _Norm:
    """Between an autoencoder's units and the denoiser's, in which latents have about unit variance."""

    scale: float = 1.0
    shift: float = 0.0
    mean: Array | None = None
    """[C, 1, 1]"""
    deviation: Array | None = None

    @classmethod
    def of(cls, parts: Parts, decoder: str) -> _Norm:
        config = parts.config(decoder)
        tables = [config.numbers(name, ()) for name in ("latents_mean", "latents_std")]
        mean, deviation = (np.array(table, np.float32)[:, None, None] if table else None for table in tables)
        scale = config.number("scaling_factor", 1.0)
        if not scale:
            raise BundleDamagedError(f"{config.path}: scaling_factor is 0; export the bundle again.")
        shift = config.number("shift_factor", 0.0)
        return cls(scale, shift, mean, deviation) if mean is not None and deviation is not None else cls(scale, shift)

    def latents(self, values: Array) -> Array:
        """In the denoiser's units [..., C, h, w]."""
        if self.mean is not None and self.deviation is not None:
            return (values - self.mean) * self.scale / self.deviation
        return (values - self.shift) * self.scale

    def values(self, latents: Array) -> Array:
        """In the autoencoder's units [..., C, h, w]."""
        if self.mean is not None and self.deviation is not None:
            return latents * self.deviation / self.scale + self.mean
        return latents / self.scale + self.shift


def to_pixels(image: Array) -> Pixels:
    """Images in -1 to 1 [B, 3, H, W] as levels [B, H, W, 3]."""
    return _levels(np.moveaxis(image, 1, -1))


def _levels(image: Array) -> Pixels:
    levels = np.clip(image.astype(np.float32, copy=False) * np.float32(0.5) + np.float32(0.5), 0, 1)
    pixels: Pixels = np.rint(levels * np.float32(255)).astype(np.uint8)
    return pixels


def _varied(part: str, pixels: Pixels) -> Pixels:
    if (pixels == pixels[0, 0]).all():
        raise BackendError(
            f"{part} gave an image of one colour, {pixels[0, 0].tolist()}, which shows nothing; report this."
        )
    return pixels


def _wants_tiles(shape: Sequence[int], tiling: bool | None, size: int, part: Part, unit: int) -> bool:
    """Whether an image [3, height, width] is made in tiles of that size: also if the part, whose input has one place
    for `unit` pixels, takes nothing so large. Raises RequestError if that is not wanted."""
    height, width = shape[1:]
    sides = (("height", height // unit), ("width", width // unit))
    larger = any(part.most(axis, side) < side for axis, side in sides)
    if larger and tiling is False:
        raise RequestError(
            f"Diffusion.tiling is off, and the engine of {part.name} takes {width}x{height} in tiles only; leave "
            "it out."
        )
    wanted = larger or (height * width > TILED_FROM if tiling is None else tiling)
    return wanted and max(height, width) > size


def _tiled(run: Callable[[Array], Array], whole: Array, size: int, made: int) -> Array:
    """Run tiles of `size` that overlap, of each of which `made` come out, and blend them [B, C, H, W]."""
    stride, blend = int(size * (1 - OVERLAP)), int(made * OVERLAP)
    keep = made - blend
    above: list[Array] = []
    rows = []
    for top in range(0, whole.shape[2], stride):
        tiles = [
            run(np.ascontiguousarray(whole[:, :, top : top + size, left : left + size]))
            for left in range(0, whole.shape[3], stride)
        ]
        for number, tile in enumerate(tiles):
            if above:
                _blend(np.moveaxis(above[number], 2, 0), np.moveaxis(tile, 2, 0), blend)
            if number:
                _blend(np.moveaxis(tiles[number - 1], 3, 0), np.moveaxis(tile, 3, 0), blend)
        rows.append(np.concatenate([tile[:, :, :keep, :keep] for tile in tiles], axis=3))
        above = tiles
    return np.concatenate(rows, axis=2)


def _blend(before: Array, tile: Array, width: int) -> None:
    """Let a tile begin, along axis 0, with what the one before ends with, and go over to its own; in place."""
    width = min(len(before), len(tile), width)
    share = (np.arange(width, dtype=np.float32) / np.float32(width)).reshape(-1, *[1] * (tile.ndim - 1))
    tile[:width] = before[len(before) - width :] * (1 - share) + tile[:width] * share
