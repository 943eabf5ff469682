"""Reading a machine's files, under any root: a missing or unreadable file is None, never an error.

Links in recorded files are followed below their root, as they were on the machine: /usr/local/cuda leads through
/etc/alternatives there, not through this machine's.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path

MOST = 1 << 20
"""Bytes of a file that are read: those that are asked for are small."""
MOST_LINKS = 40
"""Links on the way to a file; Linux stops at as many."""


@dataclass(frozen=True, slots=True)
class FileTree:
    """The files of a machine; `root` is / for this one, and a folder where they were recorded."""

    root: Path = Path("/")

    def path(self, path: str) -> Path:
        """Where a file of the machine is. Raises OSError for a loop of links."""
        if self.root == Path("/"):
            return self.root / path.lstrip("/")
        parts, place, links = path.split("/")[::-1], self.root, 0
        while parts:
            part = parts.pop()
            if part == "..":
                place = place.parent if place != self.root else place
                continue
            if part in ("", "."):
                continue
            try:
                target = str((place / part).readlink())
            except (OSError, ValueError):  # no link, or nothing there
                place /= part
                continue
            links += 1
            if links > MOST_LINKS:
                raise OSError(errno.ELOOP, "too many links", path)
            place = self.root if target.startswith("/") else place
            parts += target.split("/")[::-1]
        return place

    def text(self, path: str) -> str | None:
        """The text of a file, without the zeros at the end that a device tree has."""
        try:
            place = self.path(path)
            if not place.is_file():  # opening a pipe would wait for ever
                return None
            with place.open("rb") as file:
                return file.read(MOST).decode("utf-8", "replace").rstrip("\0\n ")
        except (OSError, ValueError):
            return None

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        try:
            return self.path(path).exists()
        except OSError:
            return False

    def names(self, pattern: str) -> list[Path]:
        """The files that a glob pattern finds, in order."""
        try:
            return sorted(self.root.glob(pattern.lstrip("/")))
        except (OSError, ValueError, RuntimeError):
            return []


def version_in(name: str) -> str:
    """The version behind a shared library's name: libnvinfer.so.10.3.0 -> 10.3.0; empty without one."""
    found = re.search(r"\.so\.(\d{1,9}(?:\.\d{1,9})*)$", name, re.ASCII)
    return found.group(1) if found else ""


def numbers(version: str) -> tuple[int, ...]:
    """10.13.3.9 -> (10, 13, 3, 9); what is no number ends it."""
    found = re.match(r"\d{1,9}(?:\.\d{1,9})*", version, re.ASCII)
    return tuple(map(int, found.group().split("."))) if found else ()
