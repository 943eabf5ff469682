"""Unit normal noise that equals torch's: `torch.randn` of a CPU generator, drawn with numpy.

    noise = TorchNoise(7)
    noise.normal((4, 64, 64))   # torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(7))

The bits are those of the Mersenne Twister (Matsumoto and Nishimura 1998) in the seeding of 2002, the transform is Box
and Muller's (1958). Values differ from torch's by at most 5e-7, because log and cos are other implementations; the
state of the generator stays the same bit for bit, so the k-th draw equals torch's k-th draw. Round for half precision
afterwards: torch does the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.errors import RequestError

_BLOCK = 16  # torch transforms blocks of 16 uniforms; fewer values than that are drawn one by one in float64
_TWO_PI = np.float32(2 * math.pi)


class TorchNoise:
    """A generator of unit normal noise that draws what torch's CPU generator draws."""

    def __init__(self, seed: int) -> None:
        """Seed as `torch.Generator.manual_seed` does. Raises RequestError when the seed has more than 64 bits.

        Of the 64 bits torch's CPU generator uses the lower 32.
        """
        if not -(2**63) <= seed < 2**64:
            raise RequestError(f"seed {seed} has more than 64 bits; use a number from {-(2**63)} to {2**64 - 1}.")
        self._bits = np.random.MT19937(0)
        # RandomState's integer seeding is frozen by numpy's compatibility policy, and is the one of 2002. The generator
        # is handed to it: making another one takes longer than drawing a small image's noise.
        np.random.RandomState(self._bits).seed(seed & 0xFFFFFFFF)
        self._spare: float | None = None

    def normal(self, shape: Sequence[int]) -> npt.NDArray[np.float32]:
        """The values of `torch.randn(shape)`."""
        values: npt.NDArray[np.float32] = normal_rows([self], shape)[0]
        return values

    def _raw(self, count: int) -> npt.NDArray[np.uint64]:
        # uint64 numbers of 32 bits; unlike Generator.integers their sequence never changes.
        return self._bits.random_raw(count)

    def _uniforms(self, out: npt.NDArray[np.float32]) -> None:
        np.multiply(self._raw(out.size) & np.uint64(0xFFFFFF), np.float32(2.0**-24), out=out, casting="unsafe")

    def _single(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        words = [int(word) for word in self._raw(4)]
        angle, distance = (((high << 32 | low) & (2**53 - 1)) * 2.0**-53 for high, low in (words[:2], words[2:]))
        radius = math.sqrt(-2.0 * math.log1p(-distance))
        self._spare = radius * math.sin(2.0 * math.pi * angle)
        return radius * math.cos(2.0 * math.pi * angle)


def normal_rows(generators: Sequence[TorchNoise], shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """One draw of `shape` from each generator: [B, *shape], as diffusers draws with a list of generators."""
    count = math.prod(shape)
    values = np.empty((len(generators), count), np.float32)  # [B, n]
    if count < _BLOCK:
        for row, generator in zip(values, generators, strict=True):
            row[:] = [generator._single() for _ in range(count)]
        return values.reshape(len(generators), *shape)
    for row, generator in zip(values, generators, strict=True):
        generator._uniforms(row)
    whole = count - count % _BLOCK
    _box_muller(values[:, :whole])
    if whole < count:
        # torch draws the last 16 values anew when the blocks do not cover them.
        tail = np.empty((len(generators), _BLOCK), np.float32)
        for row, generator in zip(tail, generators, strict=True):
            generator._uniforms(row)
        _box_muller(tail)
        values[:, -_BLOCK:] = tail
    return values.reshape(len(generators), *shape)


def _box_muller(uniforms: npt.NDArray[Any]) -> None:
    """Turn uniforms [B, 16 k] into normals, in place; of each block of 16 8 are distances, then 8 angles."""
    blocks = uniforms.reshape(len(uniforms), -1, 2, _BLOCK // 2)  # a view unless rows are not contiguous
    radius = np.log(np.float32(1) - blocks[:, :, 0])
    radius *= np.float32(-2)
    np.sqrt(radius, out=radius)
    angle = blocks[:, :, 1] * _TWO_PI
    normals = np.stack((np.cos(angle), np.sin(angle)), axis=2)  # [B, k, 2, 8]
    normals *= radius[:, :, None]
    uniforms[:] = normals.reshape(uniforms.shape)
