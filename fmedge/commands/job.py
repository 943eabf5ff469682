"""Long jobs: a file of prompts into a file of results, in constant memory, to be continued after an interruption.

Lines are read when rows are about to be free, and what a line gives is written at once, in the order of finishing. A
result carries its line's number, so what is done already is known from the output alone: eight bytes for each line.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fmedge_runtimes.errors import RequestError

from fmedge.commands.prompts import LineId, PromptLine, decoded, parse_line

if TYPE_CHECKING:
    from fmedge_runtimes.completion import Completion
    from fmedge_runtimes.sampling import Sampling
    from fmedge_runtimes.text import Prompt, TextModel

Asked = tuple["Prompt", "Sampling"]
Report = Callable[[str, int, int], None]


@dataclass(slots=True)
class Done:
    """What an output holds already."""

    lines: array[int] = field(default_factory=lambda: array("Q"))
    """By number of line: a fingerprint of its id; 0 if it is not done."""
    count: int = 0
    failed: int = 0
    size: int = 0
    """Bytes of whole results; what follows them was being written when the job was interrupted."""

    def add(self, line: int, identity: LineId, *, failed: bool) -> None:
        """Take note of the results of a line."""
        if len(self.lines) <= line:
            self.lines.extend([0] * (line + 1 - len(self.lines)))
        self.lines[line] = fingerprint(identity)
        self.count += 1
        self.failed += failed

    def has(self, line: int) -> bool:
        """Whether a line is done."""
        return line < len(self.lines) and self.lines[line] != 0


def fingerprint(identity: LineId) -> int:
    """A number above 0 for an id, by which it is told that the input is still the same."""
    digest = blake2b(json.dumps(identity).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


@contextmanager
def opened(source: Path, output: Path, *, resume: bool, force: bool) -> Iterator[tuple[BinaryIO, Done]]:
    """The output of a job, which no other job can open meanwhile, and what it holds; nothing in it is changed yet.

    Raises RequestError if the input is not there, if another process writes the output, if there is something in it and
    neither `resume` nor `force` says what to do with it, or if that is not the output of a job.
    """
    if not source.is_file():
        raise RequestError(f"cannot read {source}: {'it is no file' if source.exists() else 'there is no such file'}.")
    if not output.parent.is_dir():
        raise RequestError(f"cannot write {output}: {output.parent} is not a folder.")
    if output.exists() and output.samefile(source):
        raise RequestError(f"{output} is the input; give another --output.")
    with _locked(output) as results:
        results.seek(0)
        if force or results.read(1) == b"":
            yield results, Done()
        elif resume:
            results.seek(0)
            yield results, _scan(output, results)
        else:
            raise RequestError(f"{output} exists; continue it with --resume, or replace it with --force.")


@contextmanager
def _locked(output: Path) -> Iterator[BinaryIO]:
    """A file to read and write, made if it is not there, and locked; one that stays empty is not left behind."""
    made = not output.exists()
    try:
        results = output.open("a+b")
    except OSError as error:
        raise RequestError(f"cannot write {output}: {error.strerror}.") from error
    with results:
        try:
            _lock(results)
        except BlockingIOError as error:
            raise RequestError(
                f"another process writes {output}; wait until it ends, or give another --output."
            ) from error
        except OSError:
            pass  # a disk without locks
        try:
            yield results
        finally:
            if made and os.fstat(results.fileno()).st_size == 0:
                output.unlink(missing_ok=True)


def _lock(file: BinaryIO) -> None:
    """Lock a file until it is closed, by whatever ends the process. Raises BlockingIOError when another one has it."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _scan(output: Path, file: BinaryIO) -> Done:
    """Read whole results; those of a line stand together, and the last line's count only if all of them are there."""
    done, size, seen, failed = Done(), 0, 0, False
    for number, raw in enumerate(file, 1):
        if not raw.endswith(b"\n"):
            break
        try:
            record = json.loads(raw)
            line, identity, of = int(record["line"]), record["id"], int(record["of"])
        except (ValueError, TypeError, KeyError) as error:
            raise RequestError(
                f"{output}:{number} is no result of `fmedge generate`, so this job cannot be continued; "
                "give another --output, or --force to replace it."
            ) from error
        size += len(raw)
        seen += 1
        failed |= record.get("error") is not None
        if seen == of:
            done.add(line, identity, failed=failed)
            done.size, seen, failed = size, 0, False
    return done


def run_job(
    model: TextModel, source: Path, results: BinaryIO, done: Done, ask: Callable[[PromptLine], Asked], report: Report
) -> Done:
    """Complete the lines of `source` that are not done and append to what `opened` gave; what is done then.

    `ask` makes a prompt and its options of a line; what it raises is that line's error. `report` is told how far the
    job is, in bytes of the input. Raises RequestError when the files cannot be read or written, or do not belong
    together, and BackendError when the graph fails: then the job can be continued.
    """
    try:
        with source.open("rb") as lines:
            results.truncate(done.size)
            asyncio.run(_Job(model, source, results, done, ask, report).run(lines))
    except OSError as error:
        raise RequestError(
            f"cannot go on with {source} into {results.name}: {error.strerror}; what is finished is there, "
            "and --resume continues it."
        ) from error
    return done


class _Job:
    """A job while it runs."""

    def __init__(
        self,
        model: TextModel,
        source: Path,
        results: BinaryIO,
        done: Done,
        ask: Callable[[PromptLine], Asked],
        report: Report,
    ) -> None:
        self._model, self._source, self._results, self._done = model, source, results, done
        self._ask, self._report = ask, report
        options = model.options
        self._most = options.max_batch + min(options.max_batch, options.max_waiting)
        """Sequences in work: those of all rows, and as many that wait for one, so that no row is ever idle."""
        self._running: dict[asyncio.Task[list[Completion]], tuple[PromptLine, int]] = {}

    async def run(self, lines: BinaryIO) -> None:
        """Read, ask, write, until all is done."""
        total, read = os.fstat(lines.fileno()).st_size, 0
        try:
            for line, size in self._todo(lines):
                read += size
                if line is not None:
                    self._start(line)
                while sum(rows for _, rows in self._running.values()) >= self._most:
                    await self._collect()
                self._report(self._stage(), read, total)
            while self._running:
                await self._collect()
                self._report(self._stage(), read, total)
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    def _stage(self) -> str:
        failed = f", {self._done.failed} failed" if self._done.failed else ""
        return f"{self._done.count} prompts{failed}"

    def _todo(self, lines: BinaryIO) -> Iterator[tuple[PromptLine | None, int]]:
        """Each line with its size in bytes; None for one that has nothing to do (any more)."""
        as_json = self._source.suffix == ".jsonl"
        for number, raw in enumerate(lines, 1):
            where = f"{self._source}:{number}"
            line: PromptLine | None = None
            identity: LineId = number
            problem: RequestError | None = None
            if raw.strip():
                try:
                    line = parse_line(where, number, decoded(where, raw), as_json=as_json)
                    identity = number if line.id is None else line.id
                except RequestError as error:
                    problem = error
            if self._done.has(number):
                if self._done.lines[number] != fingerprint(identity):
                    raise RequestError(
                        f"{where} is not the line whose result {self._results.name} has already; continue with the "
                        "same input, or give another --output."
                    )
                line = None
            elif problem is not None:
                self._write(number, identity, [{"finish_reason": "error", "error": str(problem)}])
            yield line, len(raw)

    def _start(self, line: PromptLine) -> None:
        try:
            prompt, sampling = self._ask(line)
        except RequestError as error:
            self._write(line.number, _identity(line), [{"finish_reason": "error", "error": str(error)}])
            return
        request = self._model.submit([prompt], sampling)
        self._running[asyncio.ensure_future(request.wait())] = (line, sampling.rows)

    async def _collect(self) -> None:
        """Wait until a line is finished, and write what it gave."""
        finished, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        for task in finished:
            line, _rows = self._running.pop(task)
            self._write(line.number, _identity(line), [_record(one) for one in task.result()])

    def _write(self, line: int, identity: LineId, records: Sequence[dict[str, Any]]) -> None:
        """All results of a line, at once."""
        known = {"id": identity, "line": line, "of": len(records)}
        text = "".join(json.dumps({**known, **record}, ensure_ascii=False) + "\n" for record in records)
        self._results.write(text.encode("utf-8", "replace"))
        self._results.flush()
        self._done.add(line, identity, failed=any(record["error"] is not None for record in records))


def _identity(line: PromptLine) -> LineId:
    return line.number if line.id is None else line.id


def _record(completion: Completion) -> dict[str, Any]:
    record = asdict(completion)
    del record["prompt_index"]  # each line is a call of its own
    record["error"] = None if completion.error is None else str(completion.error)
    return record
