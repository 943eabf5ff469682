"""Matrices that were fitted to calibration data, on disk until the writer reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fmedge_converters.calibration.linear_inputs import Place
from fmedge_converters.rounding import RoundedBlocks
from fmedge_converters.scales import scale_dtype
from fmedge_converters.weight import Array, PackedMatrix, Read, Weight, concatenated, reshaped


@dataclass(frozen=True, slots=True)
class _Files:
    shape: tuple[int, int]
    bits: int
    block_size: int
    codes: Path
    scales: Path
    zero_points: Path | None


class FittedMatrices:
    """Codes and scales by the places that they are for, in a folder that must outlive what is made of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Place, _Files] = {}

    def __contains__(self, place: Place) -> bool:
        return place in self._files

    def __len__(self) -> int:
        return len(self._files)

    def add(self, place: Place, rounded: RoundedBlocks, shape: tuple[int, int]) -> None:
        """Keep what a matrix [N, K] has become."""
        stem = f"{len(self._files)}"
        zeros = rounded.packed_zero_points()
        paths = {name: self._folder / f"{stem}.{name}.npy" for name in ("codes", "scales", "zero_points")}
        np.save(paths["codes"], rounded.packed_codes().numpy())
        np.save(paths["scales"], rounded.scales.numpy())
        if zeros is not None:
            np.save(paths["zero_points"], zeros.numpy())
        self._files[place] = _Files(
            shape,
            rounded.bits,
            rounded.codes.shape[2],
            paths["codes"],
            paths["scales"],
            None if zeros is None else paths["zero_points"],
        )

    def weight(self, place: Place, dtype: np.dtype[np.generic]) -> Weight:
        """A matrix [N, K] with its codes; what it reads as is what they stand for."""
        files = self._files[place]
        scales = scale_dtype(dtype)
        packed = PackedMatrix(
            files.bits,
            files.block_size,
            _rows(files.codes),
            _rows(files.scales, scales),
            None if files.zero_points is None else _rows(files.zero_points),
            of_source=False,
            scale_dtype=scales,
        )
        return Weight(files.shape, dtype, _dequantized(packed, files.shape[1], dtype), packed)

    def stack(self, places: Sequence[Place], dtype: np.dtype[np.generic]) -> Weight:
        """Matrices of one shape [N, K] as [E, N, K], with their codes."""
        weights = [self.weight(place, dtype) for place in places]
        return reshaped(concatenated(weights), (len(places), *weights[0].shape))


def _rows(path: Path, dtype: np.dtype[np.generic] | None = None) -> Read:
    def read(start: int, stop: int) -> Array:
        part = np.load(path, mmap_mode="r")[start:stop]
        return np.array(part, dtype=part.dtype if dtype is None else dtype)

    return read


def _dequantized(packed: PackedMatrix, size: int, dtype: np.dtype[np.generic]) -> Read:
    def read(start: int, stop: int) -> Array:
        codes = _unpacked(packed.codes(start, stop), packed.bits).astype(np.float32)  # [n, blocks, block_size]
        if packed.zero_points is None:
            codes -= 1 << (packed.bits - 1)
        else:
            codes -= _unpacked(packed.zero_points(start, stop), packed.bits)[:, : codes.shape[1], None]
        codes *= packed.scales(start, stop)[..., None].astype(np.float32)
        return np.ascontiguousarray(codes.reshape(len(codes), -1)[:, :size].astype(dtype))

    return read


def _unpacked(packed: Array, bits: int) -> Array:
    """Codes along the last axis, several to a byte, the first in the lowest bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    return np.ascontiguousarray(codes.reshape(*packed.shape[:-1], -1))
