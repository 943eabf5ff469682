"""Parse and build with TensorRT-RTX in a process of its own: a library that dies takes nothing along.

python -m fmedge_converters.preflight.rtx_child < {"graph": ..., "profiles": [...] or null}
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fmedge_runtimes.errors import BackendError, FmedgeError
from fmedge_runtimes.manifest import ProfileFacts

from fmedge_converters import rtx

PARSED = "parsed"
"""A line on the way, for when the builder dies."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What TensorRT-RTX says of a graph."""

    parsed: bool
    built: bool | None
    """None: it was not asked to."""
    problems: tuple[rtx.Problem, ...]


def ask_rtx(graph: Path, profiles: Sequence[ProfileFacts] | None, capability: str) -> Verdict:
    """Have a graph parsed, and built if there are profiles. Raises BackendError when that cannot be tried."""
    asked = {
        "capability": capability,
        "graph": str(graph),
        "profiles": None if profiles is None else [profile.model_dump(mode="json") for profile in profiles],
    }
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode < 0:
        parsed = PARSED in done.stdout.splitlines()
        did = "built an engine" if parsed else "read the graph"
        words = f"TensorRT-RTX died of signal {-done.returncode} while it {did}"
        return Verdict(parsed, False if parsed else None, (rtx.Problem(words),))
    if done.returncode:
        raise BackendError(
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "TensorRT-RTX gave no answer."
        )
    # The library writes to standard output as it likes; the answer is the last line.
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return Verdict(found["parsed"], found["built"], tuple(rtx.Problem(**problem) for problem in found["problems"]))


def _answer(graph: Path, profiles: Sequence[ProfileFacts] | None, capability: str) -> Verdict:
    problems = rtx.parse(graph)
    if problems or profiles is None:
        return Verdict(not problems, None, problems)
    sys.stdout.write(f"\n{PARSED}\n")
    sys.stdout.flush()
    built = rtx.build(graph, profiles, capability)
    return Verdict(True, built.engine is not None, built.problems)


def main() -> None:
    """Answer the question on standard input."""
    asked = json.load(sys.stdin)
    profiles = asked["profiles"]
    try:
        verdict = _answer(
            Path(asked["graph"]),
            None if profiles is None else [ProfileFacts.model_validate_json(json.dumps(item)) for item in profiles],
            asked["capability"],
        )
    except FmedgeError as error:
        sys.exit(str(error))
    sys.stdout.write("\n" + json.dumps(asdict(verdict)) + "\n")


if __name__ == "__main__":
    main()
