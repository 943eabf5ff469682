"""What weights are fitted to before they are rounded: calibration text, and what each rounding would cost."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fmedge_runtimes.chat import ChatTemplate
from fmedge_runtimes.errors import ExportError, SourceError
from fmedge_runtimes.tokenizer import Tokenizer

from fmedge_converters.build import Progress
from fmedge_converters.calibration.calibration import Calibration
from fmedge_converters.calibration.model import CalibrationModel
from fmedge_converters.calibration.text import calibration_text
from fmedge_converters.compared_tokens import compared_tokens
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.evidence import TEXT_TOKENS
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.mixed_precision import candidates
from fmedge_converters.pieces import NotLoadedError
from fmedge_converters.reference import open_streamed
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.sensitivity import Sensitivities, measure_sensitivities
from fmedge_converters.source import Source
from fmedge_converters.tokenizer_files import TokenizerFacts


def looks_at_text(scheme: Scheme, options: ExportOptions) -> bool:
    """Whether a scheme needs calibration text, or makes something of it, and it was given."""
    asked = bool(options.calibrate) or options.statistics is not None
    return scheme.calibrate is not None and (asked or scheme.needs_calibration)


@contextmanager
def opened_calibration(
    options: ExportOptions,
    source: Source,
    schemes: Sequence[Scheme],
    folder: Path,
    tokenizer: TokenizerFacts | None,
    context: int,
    evaluation_text: str,
    found: Sensitivities | None,
) -> Iterator[Calibration | None]:
    """The calibration that a scheme looks at, while its codes are needed. Raises ExportError."""
    if not any(looks_at_text(scheme, options) for scheme in schemes):
        yield None
        return
    if tokenizer is None:
        raise ExportError(f"{source.id} has no tokenizer, without which calibration text cannot be read.")
    reader = Tokenizer(folder / tokenizer.tokenizer)
    template = None
    if tokenizer.chat_template is not None:
        template = ChatTemplate((folder / tokenizer.chat_template).read_text("utf-8"), tokenizer.special_tokens)
    compared = reader.encode(evaluation_text)[:TEXT_TOKENS]
    text = calibration_text(options, reader, template, context, compared, evaluation_text)
    model = CalibrationModel(source.config, source.files, context, text.rows)
    # Inside the folder that disappears if the export does.
    with tempfile.TemporaryDirectory(prefix="calibration-", dir=folder) as scratch:
        lookups = None if found is None or schemes[0].lookup_bits is not None else found.lookups
        yield Calibration(model, text, options.statistics, Path(scratch), lookups=lookups)


def find_sensitivities(
    source: Source,
    scheme: Scheme,
    folder: Path,
    tokenizer: TokenizerFacts | None,
    text: str,
    context: int,
    options: ExportOptions,
    progress: Progress,
) -> Sensitivities | None:
    """What each rounding of each matrix costs on other text than the comparison's, if that is long enough; None where
    nothing is to be chosen, and no head is to be fitted that is the token embedding, too."""
    fits_head = options.head_bits is not None and scheme.needs_calibration and scheme.lookup_bits is None
    if options.bits is None and not fits_head:
        return None
    stage = "measuring what each matrix's rounding costs"
    progress(stage, 0, 0)
    roundings = () if options.bits is None else scheme.choices or candidates(symmetric=not options.asymmetric)
    name = tokenizer.tokenizer if tokenizer else None
    try:
        with open_streamed(source, context) as streamed, quiet_libraries():
            vocabulary = streamed.model.get_output_embeddings().weight.shape[0]
            tokens = compared_tokens(text, folder, name, vocabulary, context).calibration
            return measure_sensitivities(streamed, tokens, roundings, functools.partial(progress, stage))
    except NotLoadedError as error:
        raise SourceError(
            f"PyTorch cannot compute this model layer by layer: a layer uses the weights of another ({error}); leave "
            "--bits and --head-bits out."
        ) from error
