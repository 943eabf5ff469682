"""Every error that fmedge raises on purpose.

A message says what is wrong, where, and what to do next.

    FmedgeError
    ├── BundleError          the folder is not a bundle, or is damaged
    │   ├── BundleFormatError    the manifest does not follow the format
    │   └── BundleDamagedError   a file is missing, or its bytes differ
    ├── BackendError         a backend is missing, or refused the graph
    │   └── DeviceMemoryError    the memory of a GPU does not suffice
    ├── RequestError         a prompt or an option that cannot be served
    │   ├── CacheMemoryError     the KV cache does not fit in the memory left
    │   └── QueueFullError       too many requests wait already
    ├── GenerationCancelledError  somebody stopped the request
    ├── SourceError          a model to export cannot be read or is not supported
    ├── ExportError          the export failed
    │   └── ParityError          the bundle does not compute what its source computes
    ├── DataError            training or evaluation data that cannot be used
    └── TrainingError        a training run that cannot start or go on
"""


class FmedgeError(Exception):
    """The root of all errors that fmedge raises on purpose."""


class BundleError(FmedgeError):
    """The folder is not a bundle, or is damaged."""


class BundleFormatError(BundleError):
    """The manifest does not follow the format that this version reads."""


class BundleDamagedError(BundleError):
    """A file of the bundle is missing, or its bytes are not those that were written."""


class BackendError(FmedgeError):
    """The backend is not installed, or refused the graph."""


class DeviceMemoryError(BackendError):
    """The memory of a GPU does not suffice for weights, or for a step."""


class RequestError(FmedgeError):
    """A prompt or an option that cannot be served."""


class CacheMemoryError(RequestError):
    """The KV cache of a request does not fit in the memory that is left."""


class QueueFullError(RequestError):
    """Too many requests wait already; try again later."""


class GenerationCancelledError(FmedgeError):
    """A request was stopped by whoever made it."""


class SourceError(FmedgeError):
    """A model that cannot be read, or that fmedge does not support."""


class ExportError(FmedgeError):
    """The export failed."""


class ParityError(ExportError):
    """The exported bundle does not compute what its source computes."""


class DataError(FmedgeError):
    """Training or evaluation data that cannot be used."""


class TrainingError(FmedgeError):
    """A training run that cannot start or go on."""
