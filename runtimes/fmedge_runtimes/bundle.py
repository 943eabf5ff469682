"""The bundle: a folder with graphs, weights, tokenizer, and a manifest that says what they are (manifest.py).

bundle = open_bundle(Path("out/bundle"))  # or open_image_bundle
bundle.manifest.text.context
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from fmedge_runtimes.errors import BundleDamagedError, BundleError
from fmedge_runtimes.manifest import MANIFEST, FileFacts, ImageManifest, TextManifest, read_manifest


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened text bundle: its folder and what the manifest says."""

    folder: Path
    manifest: TextManifest
    exporter: str | None = None
    """Who wrote the folder, if it was not fmedge: it has no manifest of its own then, no checksums and no evidence."""

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest; of a foreign folder, of all but graphs that are not used."""
        if self.exporter is None:
            return sum(facts.bytes for facts in self.manifest.files.values())
        used = self.file(self.manifest.graphs["decoder"].file)
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files if path == used or path.suffix != used.suffix)

    @property
    def prefill_nbytes(self) -> int:
        """Bytes of the files that only the graph for prompts needs; 0 if there is none."""
        if "prefill" not in self.manifest.graphs:
            return 0
        name = self.manifest.graphs["prefill"].file
        return sum(facts.bytes for file, facts in self.manifest.files.items() if file.startswith(name))

    def file(self, name: str) -> Path:
        """The path of one of the bundle's files."""
        return self.folder / name

    def chat_template(self) -> str | None:
        """The text of the chat template; None if there is none. Raises BundleError when it cannot be read."""
        name = self.manifest.text.chat_template
        if name is None:
            return None
        path = self.file(name)
        try:
            text = path.read_text("utf-8")
            # Other exporters may keep it among the settings of the tokenizer, alone or as one of several.
            found = json.loads(text)["chat_template"] if name.endswith(".json") else text
            if isinstance(found, list):
                found = next(item["template"] for item in found if item["name"] == "default")
        except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise BundleDamagedError(
                f"{path} holds no chat template that can be read; copy the folder again."
            ) from error
        return str(found)


@dataclass(frozen=True, slots=True)
class ImageBundle:
    """An opened image bundle: its folder and what the manifest says."""

    folder: Path
    manifest: ImageManifest

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(facts.bytes for facts in self.manifest.files.values())

    def file(self, name: str) -> Path:
        """The path of one of the bundle's files."""
        return self.folder / name


def open_any_bundle(folder: Path, *, checksums: bool = True) -> Bundle | ImageBundle:
    """Read the manifest and check the files: their sizes always, their SHA-256 if `checksums`.

    Raises BundleError (no bundle), BundleFormatError (manifest), BundleDamagedError (files).
    """
    manifest = read_manifest(folder)
    bundle = Bundle(folder, manifest) if isinstance(manifest, TextManifest) else ImageBundle(folder, manifest)
    check_files(bundle, checksums=checksums)
    return bundle


def open_bundle(folder: Path, *, checksums: bool = True) -> Bundle:
    """A text bundle, opened as open_any_bundle does. Raises BundleError for an image bundle, too."""
    bundle = open_any_bundle(folder, checksums=checksums)
    if not isinstance(bundle, Bundle):
        raise BundleError(f"{folder} makes images, not text; give a text bundle.")
    return bundle


def open_image_bundle(folder: Path, *, checksums: bool = True) -> ImageBundle:
    """An image bundle, opened as open_any_bundle does. Raises BundleError for a text bundle, too."""
    bundle = open_any_bundle(folder, checksums=checksums)
    if not isinstance(bundle, ImageBundle):
        raise BundleError(f"{folder} writes text, it makes no images; give an image bundle.")
    return bundle


def check_files(
    bundle: Bundle | ImageBundle, *, checksums: bool, progress: Callable[[int, int], None] | None = None
) -> None:
    """Compare the files with the manifest. Raises BundleDamagedError at the first that differs."""
    root = bundle.folder.resolve()
    done = 0
    for name, facts in bundle.manifest.files.items():
        path = bundle.folder / name
        if not path.is_file():
            raise BundleDamagedError(f"{path} is missing; copy or export the bundle again.")
        if not path.resolve().is_relative_to(root):
            raise BundleDamagedError(f"{path} is a link that leaves the bundle's folder; do not trust this bundle.")
        size = path.stat().st_size
        if size != facts.bytes:
            raise BundleDamagedError(
                f"{path} has {size} bytes instead of {facts.bytes}; copy or export the bundle again."
            )
        if checksums and sha256_of(path) != facts.sha256:
            raise BundleDamagedError(
                f"{path} has the right size but other content (SHA-256 differs); copy or export the bundle again."
            )
        done += size
        if progress is not None:
            progress(done, bundle.nbytes)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    try:
        # hashlib.file_digest, which Python 3.10 does not have.
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}.") from error
    return digest.hexdigest()


def list_files(folder: Path, known: Mapping[Path, str] = MappingProxyType({})) -> dict[str, FileFacts]:
    """Size and checksum of every file below a folder, but the manifest; `known` are checksums that need not be made."""
    return {
        path.relative_to(folder).as_posix(): FileFacts(
            bytes=path.stat().st_size, sha256=known.get(path) or sha256_of(path)
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
