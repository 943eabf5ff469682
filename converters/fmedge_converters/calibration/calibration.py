"""The calibration of one export: what fits of a scheme may ask for, and what they leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fmedge_runtimes.errors import ExportError
from fmedge_runtimes.manifest import Evidence

from fmedge_converters.calibration.linear_inputs import Inputs, Place
from fmedge_converters.calibration.model import CalibrationModel, Fit
from fmedge_converters.calibration.statistics import (
    Statistics,
    StatisticsKey,
    read_statistics,
    statistics_key,
    statistics_of,
    write_statistics,
)
from fmedge_converters.calibration.text import CalibrationText
from fmedge_converters.weight import Array

Report = Callable[[str, int, int], None]


@dataclass(slots=True)
class Calibration:
    """A model with calibration text, and a folder for what is fitted, which lives until the graph is written."""

    model: CalibrationModel
    text: CalibrationText
    statistics_file: Path | None
    scratch: Path
    parameters: Mapping[str, str] = field(default_factory=dict)
    """The parameter of each initializer of the graph that is one."""
    lookups: Array | None = None
    """Of Sensitivities, where the head is to be fitted, too; None leaves it to the scheme."""

    def statistics(self, progress: Report) -> dict[Place, Statistics]:
        """Of all matrices in the layers: those of the file, if there is one, which is written otherwise.

        Raises ExportError (the file) and SourceError (the model).
        """
        path, key = self.statistics_file, None
        if path is not None:
            key = self._key()
            if path.exists():
                return read_statistics(path, key)
        found = statistics_of(self.model.statistics(lambda done, whole: progress("calibrating", done, whole)))
        if path is not None and key is not None:
            write_statistics(path, key, found)
        return found

    def fit(self, fit: Fit, progress: Report, head: Inputs | None = None) -> None:
        """Fit each layer's matrices to their inputs; `head` gets those of the head. Raises SourceError."""
        if self.statistics_file is not None:
            raise ExportError(
                "--statistics keeps what int4, int4-awq, w8a8 and fp8 need; int4-gptq needs products of all pairs of "
                "features, which would take more room than the model: leave it out."
            )
        self.model.fit(fit, lambda done, whole: progress("fitting weights", done, whole), head)

    def _key(self) -> StatisticsKey:
        return statistics_key(self.model.config, self.model.files, self.text.sha256, self.text.tokens)

    def evidence(self, what: str, figures: Mapping[str, float | int | str | bool]) -> Evidence:
        """What was done with the text; it proves nothing by itself, so it passes."""
        return Evidence(
            name="calibration",
            what=f"{what}, on {self.text.tokens} tokens of {self.text.what}",
            passed=True,
            figures={"calibration_tokens": self.text.tokens, **figures},
        )
