"""The folder that an export writes: complete, or as it was before.

Everything is written to a hidden sibling, which takes the output's place at the end. A killed process leaves its
sibling behind; the next export to the same output removes it. A sibling is locked while its process lives.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fmedge_runtimes.errors import ExportError

if sys.platform != "win32":  # where folders cannot be locked
    import fcntl

PARTIAL = ".partial"
OLD = ".old"


@contextmanager
def written_aside(output: Path) -> Iterator[Path]:
    """A temporary sibling of the output that takes its place at the end, or disappears. Raises ExportError."""
    output = output.absolute()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder, lock = _locked_sibling(output, PARTIAL)
    except OSError as error:
        raise ExportError(f"cannot write to {output.parent}: {error.strerror}.") from error
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        _replace(folder, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(f"no space is left on the disk of {output.parent}; nothing was written.") from error
        raise ExportError(f"writing to {output.parent} failed: {error}; nothing was written.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def sweep(output: Path) -> None:
    """Remove what killed exports to this output have left, and put back an output that one was about to replace."""
    output = output.absolute()
    for suffix in (OLD, PARTIAL):
        for folder in sorted(output.parent.glob(f".{glob.escape(output.name)}.*{suffix}")):
            try:
                lock = _lock(folder)
            except OSError:
                # A living export holds it, it is gone by now, or this disk has no locks.
                continue
            if suffix == OLD and not output.exists() and (folder / output.name).exists():
                (folder / output.name).rename(output)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked_sibling(output: Path, suffix: str) -> tuple[Path, int | None]:
    """A new hidden sibling, and the descriptor that holds its lock, None on a disk without locks. Raises OSError."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=suffix, dir=output.parent))
        try:
            lock = _lock(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # another export took it for a dead one's before it was locked
        except OSError:
            return folder, None
        if folder.exists():
            return folder, lock
        os.close(lock)


def _lock(folder: Path) -> int:
    """The descriptor that locks a folder until it is closed. Raises OSError, BlockingIOError when another has it."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush(folder: Path) -> None:
    """Wait until the disk holds every file."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _replace(folder: Path, output: Path) -> None:
    if not output.exists():
        folder.rename(output)
        return
    old, lock = _locked_sibling(output, OLD)
    output.rename(old / output.name)
    try:
        folder.rename(output)
    except BaseException:
        (old / output.name).rename(output)
        old.rmdir()
        raise
    finally:
        _unlock(lock)
    shutil.rmtree(old, ignore_errors=True)
