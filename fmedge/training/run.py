"""A training run: prepared, trained, and published by one rename; what an interruption leaves is resumed.

What is trained is the business of `text.py` and `image.py`; a run is the same for both.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fmedge_runtimes.errors import FmedgeError, TrainingError

from fmedge.training.progress import Report
from fmedge.training.run_options import deciding_options, refuse_other_options

if TYPE_CHECKING:
    from fmedge.training.image import ImageTraining
    from fmedge.training.text import TextTraining
    from fmedge.training.workfolder import WorkFolder

Options = TypeVar("Options", "TextTraining", "ImageTraining")
Result = TypeVar("Result")


def carry_out(
    options: Options,
    report: Report,
    prepare: Callable[[Options, WorkFolder, Report], None],
    train: Callable[[Options, WorkFolder, Report], Result],
) -> Result:
    """Prepare what is not prepared yet, train, and let the output appear.

    Under torchrun every process calls this with the same options. Raises TrainingError, DataError.
    """
    from fmedge.training.workfolder import WorkFolder

    work = WorkFolder(options.output)
    if int(os.environ.get("RANK", "0")) > 0:  # Rank 0 prepares, and the others meet it in train.
        return train(options, work, report)
    work.check(resume=options.resume, force=options.force)
    with work.claimed(resume=options.resume):
        try:
            if not (options.resume and _is_prepared(options, work)):
                prepare(options, work, report)
            result = train(options, work, report)
        except FmedgeError:
            # Without a checkpoint there is nothing to resume, and the folder would only be in the way.
            if not options.resume and work.last_checkpoint() is None:
                work.discard()
            raise
        work.publish()
    return result


def _is_prepared(options: TextTraining | ImageTraining, work: WorkFolder) -> bool:
    """Whether the interrupted run got as far as training; refuse to go on with other options."""
    record = work.read_record()
    if record is None:
        return False
    refuse_other_options(work.path, record["options"], deciding_options(options))
    return True


def settled(work: WorkFolder) -> dict[str, Any]:
    """What the preparation of a run has settled."""
    record = work.read_record()
    if record is None:
        raise TrainingError(f"{work.path}: nothing was prepared to train on: see the first process's message")
    return record


def require_packages(*names: str) -> None:
    """Raise TrainingError for the first that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise TrainingError(f"{name} is not installed: pip install 'fmedge[train]'")
