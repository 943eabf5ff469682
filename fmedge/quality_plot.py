"""What `fmedge eval` found, as a picture: perplexity against size, or the figures of one bundle by position."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmedge_runtimes.errors import BackendError, RequestError

if TYPE_CHECKING:
    from fmedge.text_quality import TextQuality

SUFFIXES = (".png", ".svg", ".pdf")

Drawn = tuple[str, int, "TextQuality"]
"""The name of a bundle, its bytes, and what was found."""


def check_plot(output: Path) -> None:
    """Raise BackendError where the library is missing, RequestError for a file that cannot be drawn."""
    if output.suffix.lower() not in SUFFIXES:
        raise RequestError(f"--plot {output} must end in {', '.join(SUFFIXES)}.")
    if not output.absolute().parent.is_dir():
        raise RequestError(f"cannot draw {output}: {output.parent} is not a folder.")
    if find_spec("matplotlib") is None:
        raise BackendError("--plot needs matplotlib, which this environment lacks: pip install 'fmedge[eval]'.")


def draw(output: Path, found: Sequence[Drawn]) -> None:
    """Draw several bundles against their sizes, or one by position; the file appears whole. Raises RequestError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if len(found) == 1:
        _by_position(axes, *found[0])
    else:
        _by_size(axes, found)
    axes.grid(visible=True, alpha=0.3)
    aside = output.with_name(f".{output.stem}.partial{output.suffix}")
    try:
        figure.savefig(aside, dpi=150)
        aside.replace(output)
    except OSError as error:
        raise RequestError(f"cannot write {output}: {error.strerror}.") from error
    finally:
        aside.unlink(missing_ok=True)


def _by_size(axes: Any, found: Sequence[Drawn]) -> None:  # noqa: ANN401 - matplotlib is imported only where it is used
    sizes, values = [nbytes / 1e6 for _, nbytes, _ in found], [text.perplexity for _, _, text in found]
    axes.plot(sizes, values, "o")
    for (name, _, _), size, value in zip(found, sizes, values, strict=True):
        axes.annotate(name, (size, value), xytext=(5, 5), textcoords="offset points")
    axes.set(xlabel="size, MB", ylabel="perplexity")
    axes.margins(0.15)


def _by_position(axes: Any, name: str, nbytes: int, text: TextQuality) -> None:  # noqa: ANN401 - as above
    del nbytes
    labels = [f"{one.first}-{one.last}" for one in text.by_position]
    divergences = [one.mean_kl for one in text.by_position if one.mean_kl is not None]
    if divergences:
        axes.bar(labels, divergences)
        axes.set(ylabel="KL divergence, nats per token")
    else:
        axes.bar(labels, [one.perplexity for one in text.by_position])
        axes.set(ylabel="perplexity")
    axes.set(xlabel="tokens of context", title=name)
