"""The parts of an image pipeline: their graphs, opened as the memory mode says, and their configs.

parts = Parts(bundle, open_part, keep=True)
with parts.use("text_encoder") as encoder:
    encoder.run({"input_ids": ids})["last_hidden_state"]
parts.config("vae_decoder").number("scaling_factor")
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np

from fmedge_runtimes.engine_limits import Axes
from fmedge_runtimes.errors import BackendError, BundleDamagedError, BundleError, RequestError
from fmedge_runtimes.manifest import MODEL_INDEX
from fmedge_runtimes.session import Array, Buffer, Session, TensorSpec

MemoryMode = Literal["keep", "sequential"]
"""keep: all parts stay loaded. sequential: each is loaded when its turn comes, and freed behind it."""

MODES: tuple[MemoryMode, ...] = get_args(MemoryMode)
OpenPart = Callable[[str], Session]


class Config:
    """A JSON object of the bundle, whose fields are asked for by name and kind."""

    def __init__(self, path: Path) -> None:
        """Raises BundleDamagedError when there is no JSON object."""
        self.path = path
        try:
            values = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise BundleDamagedError(f"cannot read {path}: {error.strerror}; export the bundle again.") from error
        except (ValueError, RecursionError) as error:
            raise BundleDamagedError(f"{path} is not JSON ({error}); copy or export the bundle again.") from error
        if not isinstance(values, dict):
            raise BundleDamagedError(f"{path} holds no JSON object; copy or export the bundle again.")
        self.values: Mapping[str, Any] = values

    def number(self, name: str, default: float | None = None) -> float:
        """A number. Raises BundleDamagedError if there is none and no default."""
        found = self.values.get(name)
        if found is None and default is not None:
            return default
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise self._wrong(name, "a number")
        return found

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number. Raises BundleDamagedError if there is none and no default."""
        found = self.number(name, default)
        if not isinstance(found, int):
            raise self._wrong(name, "a whole number")
        return found

    def numbers(self, name: str, default: tuple[float, ...] | None = None) -> tuple[float, ...]:
        """A list of numbers; a single one counts as such. Raises BundleDamagedError if there is none and no default."""
        found = self.values.get(name)
        if found is None and default is not None:
            return default
        listed = found if isinstance(found, list) else [found]
        if not listed or not all(isinstance(item, int | float) and not isinstance(item, bool) for item in listed):
            raise self._wrong(name, "a list of numbers")
        return tuple(listed)

    def text(self, name: str, default: str | None = None) -> str:
        """A string. Raises BundleDamagedError if there is none and no default."""
        found = self.values.get(name, default)
        if not isinstance(found, str):
            raise self._wrong(name, "a text")
        return found

    def flag(self, name: str, default: bool = False) -> bool:
        """Whether something is on."""
        found = self.values.get(name)
        return default if found is None else bool(found)

    def _wrong(self, name: str, wanted: str) -> BundleDamagedError:
        found = self.values.get(name)
        return BundleDamagedError(f"{self.path}: {name} is {found!r} and must be {wanted}; export the bundle again.")


class Part:
    """An opened graph that knows its name, so that what goes wrong in it is said of it."""

    def __init__(
        self,
        name: str,
        session: Session,
        standing: Mapping[str, Array] | None = None,
        limits: Axes = MappingProxyType({}),
    ) -> None:
        """`standing` are inputs that every run is given, if the graph takes them; `limits` are the sizes of axes that
        its engine was built for."""
        self.name = name
        self._limits = limits
        self._standing: Mapping[str, Array] = {} if standing is None else standing
        self._session = session
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in session.inputs}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in session.outputs}
        # Names of dtypes are made anew each time that they are asked for, which is slow.
        self._dtypes = {name: np.dtype(spec.dtype) for name, spec in self.inputs.items()}
        self.has_run = False

    def run(
        self, feeds: Mapping[str, Array | Buffer], results: Mapping[str, Array | Buffer] | None = None
    ) -> dict[str, Array]:
        """Run the graph once; see `Session.run`. Raises BackendError, also for feeds that it does not take."""
        feeds = {**{name: value for name, value in self._standing.items() if name in self.inputs}, **feeds}
        missing, unknown = self.inputs.keys() - feeds.keys(), feeds.keys() - self.inputs.keys()
        if missing or unknown:
            problem = f"needs {min(missing)}" if missing else f"takes no {min(unknown)}"
            raise BackendError(
                f"the graph of {self.name} {problem}, other than the pipeline does; export the bundle again."
            )
        given = {name: self._typed(name, value) for name, value in feeds.items()}
        self.has_run = True
        try:
            return self._session.run(given, results or {})
        except BackendError as error:
            raise BackendError(f"{self.name}: {error}") from error

    def most(self, axis: str, wished: int) -> int:
        """As many along an axis as are wished, or as the part takes in one run."""
        return min(wished, self._limits[axis][2]) if axis in self._limits else wished

    def least(self, axis: str, wished: int) -> int:
        """As few along an axis as are wished, or as the part takes."""
        return max(wished, self._limits[axis][0]) if axis in self._limits else wished

    def _typed(self, name: str, value: Array | Buffer) -> Array | Buffer:
        """A host array in the element type that the graph wants, as fp16 graphs of GPUs do."""
        wanted = self._dtypes[name]
        return value.astype(wanted) if isinstance(value, np.ndarray) and value.dtype != wanted else value

    def input(self, name: str) -> TensorSpec:
        """What the graph wants as one of its inputs. Raises BackendError if it has no such input."""
        if name not in self.inputs:
            raise BackendError(
                f"the graph of {self.name} takes no {name}, other than the pipeline does; export the bundle again."
            )
        return self.inputs[name]

    def output(self, name: str, outputs: Mapping[str, Array]) -> Array:
        """One of the outputs of a run, checked. Raises BackendError if the graph has no such output."""
        if name not in outputs:
            raise BackendError(f"the graph of {self.name} has no output {name}; export the bundle again.")
        return check_finite(self.name, outputs[name])


def check_finite(part: str, values: Array) -> Array:
    """The same values. Raises BackendError naming the part if one of them is not finite."""
    # A sum is cheap and catches everything; that it overflows by itself is what the second look rules out.
    if not np.isfinite(values.sum(dtype=np.float64)) and not np.isfinite(values).all():
        bad = np.count_nonzero(~np.isfinite(values))
        raise BackendError(
            f"{part} gave {bad} of {values.size} values that are not finite, so there is no image; if the bundle is in "
            "fp16, export it in bf16 or fp32, else report this."
        )
    return values


class Parts:
    """The parts of one bundle."""

    def __init__(
        self,
        folder: Path,
        names: frozenset[str],
        open_part: OpenPart,
        mode: MemoryMode,
        limits: Mapping[str, Axes] = MappingProxyType({}),
    ) -> None:
        """`limits` are the sizes that the engines of parts were built for, by part and axis."""
        self.folder = folder
        self._limits = limits
        self.names = names
        if mode not in MODES:
            raise RequestError(f"there is no memory mode {mode}; choose one of {', '.join(MODES)}.")
        self.mode = mode
        self._open = open_part
        self._kept: dict[str, tuple[Part, Session]] = {}
        self._configs: dict[str, Config] = {}
        self.standing: dict[str, Array] = {}
        """Inputs that hold for a whole request, by name: every graph that takes one is given it."""
        self._closed = False
        self.ran: set[str] = set()
        """Names of the parts that have run."""

    def __contains__(self, name: str) -> bool:
        """Whether the bundle has a part of that name."""
        return name in self.names

    def require(self, *names: str) -> None:
        """Raise BundleError for the first of these parts that is missing."""
        for name in names:
            if name not in self.names:
                raise BundleError(
                    f"{self.folder} has no {name}, which its pipeline needs ({MODEL_INDEX}); export it again."
                )

    def config(self, name: str, file: str = "config.json") -> Config:
        """The config of a part, or another file of its folder. Raises BundleDamagedError."""
        path = f"{name}/{file}" if name else file
        if path not in self._configs:
            self._configs[path] = Config(self.folder / path)
        return self._configs[path]

    def declared(self, name: str) -> bool:
        """Whether model_index.json says that the pipeline has this part."""
        found = self.index.values.get(name)
        return isinstance(found, list) and any(item is not None for item in found)

    @property
    def index(self) -> Config:
        """model_index.json."""
        return self.config("", MODEL_INDEX)

    @contextmanager
    def use(self, name: str) -> Iterator[Part]:
        """Open a part, if it is not; in the sequential mode it is closed behind. Raises BundleError, BackendError."""
        self.require(name)
        if self._closed:
            raise BackendError(f"the model of {self.folder} is closed; load it again.")
        if name not in self._kept:
            session = self._open(name)
            part = Part(name, session, MappingProxyType(self.standing), self._limits.get(name, {}))
            self._kept[name] = part, session
        try:
            yield self._kept[name][0]
        finally:
            if name in self._kept and self._kept[name][0].has_run:
                self.ran.add(name)
            if self.mode == "sequential" and (kept := self._kept.pop(name, None)) is not None:
                kept[1].close()

    @property
    def loaded(self) -> frozenset[str]:
        """Names of the parts that are loaded now."""
        return frozenset(self._kept)

    def load(self) -> None:
        """Open every part now, unless they are opened in turn."""
        if self.mode == "keep":
            for name in sorted(self.names):
                with self.use(name):
                    pass

    def close(self) -> None:
        """Give the memory of all parts back."""
        self._closed = True
        while self._kept:
            _, (_, session) = self._kept.popitem()
            session.close()
