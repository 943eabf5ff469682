"""Files of a repository on the Hugging Face hub, through huggingface_hub and its cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fmedge_runtimes.errors import SourceError

SMALL_FILES = (
    "*.json",
    "*.model",
    "*.jinja",
    "*.txt",
    "README.md",
    "LICENSE*",
)
"""What is fetched besides weights: never pickles, never code."""


def fetch(source: str, revision: str | None, patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """The snapshot of a repository with the files of these patterns, those of earlier calls included; its folder is
    named by the commit. Raises SourceError."""
    from huggingface_hub import snapshot_download

    with _as_source_errors(source, revision):
        return Path(
            snapshot_download(
                source, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignored) or None
            )
        )


@contextmanager
def _as_source_errors(source: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise SourceError(f"{source} is neither a folder that exists nor a hub id like owner/name.") from error
    except GatedRepoError as error:
        raise SourceError(f"{source} is gated: accept its terms on the hub, then run `hf auth login`.") from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{source} has no revision {revision}.") from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{source} is neither a folder that exists nor a model on the hub (a private one needs `hf auth login`)."
        ) from error
    except OSError as error:
        if not isinstance(error, LocalEntryNotFoundError) and error.errno is not None:
            raise SourceError(f"cannot fetch {source}: {error.strerror}.") from error
        raise SourceError(
            f"{source} is not a folder, and the hub cannot be reached to look for it (it is not in the cache either); "
            "check the path or the network."
        ) from error
