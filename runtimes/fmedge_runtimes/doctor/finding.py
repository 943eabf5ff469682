"""A line of the report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """How bad a finding is."""

    OK = 0
    NOTE = 1
    """Worth knowing; nothing is wrong."""
    WARNING = 2
    """Something will be slower, or fail later."""
    PROBLEM = 3
    """Something cannot work as it is."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was found, and what to do about it."""

    section: str
    name: str
    value: str
    level: Level = Level.OK
    advice: str = ""
    """A command, or what to change; empty where nothing is to be done."""
