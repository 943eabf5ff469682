"""Reading a machine's files, under any root: a missing or unreadable file is None, never an error."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MOST = 1 << 20
"""Bytes of a file that are read: those that are asked for are small."""


@dataclass(frozen=True, slots=True)
class FileTree:
    """The files of a machine; `root` is / for this one, and a folder where they were recorded."""

    root: Path = Path("/")

    def path(self, path: str) -> Path:
        """Where a file of the machine is."""
        return self.root / path.lstrip("/")

    def text(self, path: str) -> str | None:
        """The text of a file, without the zeros at the end that a device tree has."""
        try:
            with self.path(path).open("rb") as file:
                return file.read(MOST).decode("utf-8", "replace").rstrip("\0\n ")
        except OSError:
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
        except OSError:
            return []


def version_in(name: str) -> str:
    """The version behind a shared library's name: libnvinfer.so.10.3.0 -> 10.3.0; empty without one."""
    found = re.search(r"\.so\.(\d+(?:\.\d+)*)$", name)
    return found.group(1) if found else ""


def numbers(version: str) -> tuple[int, ...]:
    """10.13.3.9 -> (10, 13, 3, 9); what is no number ends it."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()
