"""What `fmedge eval` does with bundles that write text: measure each, compare, show, draw, record."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import typer
from fmedge_converters.builtin_text import builtin_text
from fmedge_runtimes.bundle import Bundle, open_bundle
from fmedge_runtimes.chat import ChatTemplate
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.errors import BundleError, DataError, RequestError
from fmedge_runtimes.foreign import find_foreign
from fmedge_runtimes.load import open_decoder
from fmedge_runtimes.manifest import Evidence, write_manifest
from fmedge_runtimes.prefill_graph import PrefillGraph
from fmedge_runtimes.tokenizer import Tokenizer

from fmedge.commands.console import progress_bar
from fmedge.extras import require_export
from fmedge.held_out_text import STDIN, Cut, TextInWindows, read_pieces, token_stream
from fmedge.multiple_choice import ChoiceAccuracy, Question, answer, read_questions
from fmedge.text_quality import BundleOriginal, Original, Report, TextQuality, bits_per_weight, evaluate_text

WINDOW = 512
"""llama.cpp's perplexity uses this, too."""


@dataclass(frozen=True, slots=True)
class TextEval:
    """What is asked for."""

    bundles: tuple[Path, ...]
    data: Path | None
    tokens: int | None
    window: int | None
    stride: int | None
    against: str | None
    choices: Path | None
    chat: bool
    plot: Path | None
    record: bool
    device: str | None
    threads: int | None
    prefill_graph: PrefillGraph
    """Which graph reads the windows of a bundle that has two: "prompts", the one for prompts; "off", the other."""

    @property
    def of_text(self) -> bool:
        """Whether a text is scored: always, unless there are only questions to be answered."""
        return self.choices is None or self.data is not None or self.against is not None


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One bundle, and what was found."""

    bundle: str
    precision: str
    nbytes: int
    """Of all files."""
    bits_per_weight: float | None
    text: TextQuality | None
    choices: ChoiceAccuracy | None


def evaluate_texts(asked: TextEval, *, as_json: bool) -> None:
    """Measure bundles and print what was found.

    Raises a usage error for options that do not go together, and FmedgeError.
    """
    _check(asked)
    questions = [] if asked.choices is None else read_questions(asked.choices)
    found = []
    for folder in asked.bundles:
        bundle, decoder = open_decoder(
            folder, device=asked.device, threads=asked.threads, prefill_graph=asked.prefill_graph
        )
        try:
            found.append(_evaluate(asked, bundle, decoder, questions))
        finally:
            decoder.close()
        if asked.record:
            _record(asked, bundle, found[-1])
    if asked.plot is not None:
        from fmedge.quality_plot import draw

        draw(asked.plot, [(Path(one.bundle).name, one.nbytes, one.text) for one in found if one.text is not None])
    if as_json:
        typer.echo(json.dumps({"bundles": [asdict(one) for one in found]}))
    else:
        from fmedge.commands.quality_table import show

        show(found)


def _check(asked: TextEval) -> None:
    if asked.chat and asked.choices is None:
        raise typer.BadParameter("--chat is for the questions of --choices.")
    if asked.prefill_graph == "batches":
        raise typer.BadParameter("windows go through the graph one by one; --prefill-graph is prompts or off.")
    of_text = {"--tokens": asked.tokens, "--window": asked.window, "--stride": asked.stride, "--plot": asked.plot}
    given = [name for name, value in of_text.items() if value is not None]
    if given and not asked.of_text:
        raise typer.BadParameter(f"{given[0]} is for a text; give --data with --choices.")
    if asked.data == STDIN and len(asked.bundles) > 1:
        raise typer.BadParameter("standard input can be read once; give --data a file for several bundles.")
    if len(set(asked.bundles)) < len(asked.bundles):
        raise typer.BadParameter("a bundle is given twice.")
    if asked.plot is not None:
        from fmedge.quality_plot import check_plot

        check_plot(asked.plot)
    for folder in asked.bundles if asked.record else ():
        if find_foreign(folder) is not None:
            raise typer.BadParameter(f"--record needs a bundle; {folder} was written by another exporter.")


def _evaluate(asked: TextEval, bundle: Bundle, decoder: Decoder, questions: list[Question]) -> Evaluated:
    facts = bundle.manifest.text
    if facts.tokenizer is None:
        raise BundleError(
            f"{bundle.folder} has no tokenizer.json, so it cannot read a text; export with its tokenizer."
        )
    tokenizer = Tokenizer(bundle.file(facts.tokenizer))
    template = _template(bundle) if asked.chat else None
    name = bundle.folder.name
    text = accuracy = None
    with progress_bar() as bar:
        if asked.of_text:
            text = _of_text(asked, bundle, decoder, tokenizer, lambda *done: bar(f"scoring with {name}", *done))
        if questions:
            accuracy = answer(
                bundle, decoder, tokenizer, questions, template, lambda *done: bar(f"answering with {name}", *done)
            )
    return Evaluated(
        str(bundle.folder), bundle.manifest.precision, bundle.nbytes, bits_per_weight(bundle), text, accuracy
    )


def _template(bundle: Bundle) -> ChatTemplate:
    source = bundle.chat_template()
    if source is None:
        raise RequestError(f"{bundle.folder} has no chat template; leave --chat out.")
    return ChatTemplate(source, bundle.manifest.text.special_tokens)


def _of_text(asked: TextEval, bundle: Bundle, decoder: Decoder, tokenizer: Tokenizer, report: Report) -> TextQuality:
    prefix = tokenizer.prefix()
    cut = _cut(asked, bundle, len(prefix))
    of = 0
    if asked.data is None:
        of = len(builtin_text().encode())
    elif asked.data != STDIN and asked.data.is_file():
        of = asked.data.stat().st_size

    def told(scored: int, nbytes: int) -> None:
        report(*((nbytes, of) if asked.tokens is None else (scored, asked.tokens)))

    with (
        closing(_pieces(asked.data)) as pieces,
        _original(asked, bundle, tokenizer, len(prefix) + cut.length) as original,
    ):
        text = TextInWindows(token_stream(pieces, tokenizer, asked.tokens), cut, prefix)
        return evaluate_text(bundle, decoder, text, original, told)


def _pieces(data: Path | None) -> Generator[str, None, None]:
    if data is None:
        yield builtin_text()
    else:
        yield from read_pieces(data)


def _cut(asked: TextEval, bundle: Bundle, before: int) -> Cut:
    """How the text is cut. Raises RequestError for windows that cannot be."""
    longest = bundle.manifest.text.context - before
    length = min(WINDOW, longest) if asked.window is None else asked.window
    if length > longest:
        raise RequestError(f"--window {length} is more than the context of {bundle.folder}, which leaves {longest}.")
    stride = max(1, length // 2) if asked.stride is None else asked.stride
    if stride > length:
        raise RequestError(f"--stride {stride} leaves out tokens between windows of {length}; give at most {length}.")
    return Cut(length, stride)


@contextmanager
def _original(asked: TextEval, bundle: Bundle, tokenizer: Tokenizer, longest: int) -> Iterator[Original | None]:
    """What --against names, opened, for rows of up to `longest` tokens."""
    if asked.against is None:
        yield None
        return
    folder = Path(asked.against)
    if not (folder / "fmedge.json").is_file() and (not folder.is_dir() or find_foreign(folder) is None):
        require_export()
        from fmedge_converters.original import open_original

        with open_original(asked.against, bundle.manifest.text.context) as original:
            yield original
        return
    other, decoder = open_decoder(folder, device=asked.device, threads=asked.threads, prefill_graph=asked.prefill_graph)
    try:
        if other.manifest.text.context < longest:
            context = other.manifest.text.context
            raise RequestError(
                f"windows of {longest} tokens are more than the context of {folder}, {context}; "
                "give a smaller --window."
            )
        _check_vocabulary(bundle, other, tokenizer)
        yield BundleOriginal(other, decoder)
    finally:
        decoder.close()


def _check_vocabulary(bundle: Bundle, other: Bundle, tokenizer: Tokenizer) -> None:
    """Raise DataError when the tokens of two bundles are not the same."""
    ours, theirs = bundle.manifest.text, other.manifest.text
    same = ours.vocabulary == theirs.vocabulary
    if same and theirs.tokenizer is not None:
        sample = builtin_text()[:2000]
        same = Tokenizer(other.file(theirs.tokenizer)).encode(sample) == tokenizer.encode(sample)
    if not same:
        raise DataError(
            f"{bundle.folder} and {other.folder} have different vocabularies ({ours.vocabulary} and "
            f"{theirs.vocabulary} tokens), so their distributions cannot be compared; leave --against out and read the "
            "bits per byte."
        )


def _record(asked: TextEval, bundle: Bundle, found: Evaluated) -> None:
    """Write what was found into the manifest, in place of what was found of the same before."""
    made = list(_evidence(asked, bundle, found))
    # Read anew: another process may have recorded something meanwhile.
    manifest = open_bundle(bundle.folder, checksums=False).manifest
    what = {item.what for item in made}
    kept = [item for item in manifest.evidence if item.name != "eval" or item.what not in what]
    try:
        write_manifest(bundle.folder, manifest.model_copy(update={"evidence": (*kept, *made)}))
    except OSError as error:
        raise BundleError(f"cannot write the manifest of {bundle.folder}: {error.strerror}.") from error


def _evidence(asked: TextEval, bundle: Bundle, found: Evaluated) -> Iterator[Evidence]:
    """The figures as evidence. Nothing of this machine is in it but the names of files."""
    aside = asked.prefill_graph == "off" and "prefill" in bundle.manifest.graphs
    graph = ", without the graph for prompts" if aside else ""
    if found.text is not None:
        text, difference = found.text, found.text.difference
        name = "a page of Python's documentation" if asked.data is None else asked.data.name
        against = "" if difference is None else f", against {difference.against}"
        figures: dict[str, float | int | str | bool] = {
            "text_tokens": text.tokens,
            "perplexity": text.perplexity,
            "bits_per_byte": text.bits_per_byte,
        }
        if difference is not None:
            figures |= {
                "source_perplexity": difference.perplexity,
                "mean_kl": difference.mean_kl,
                "top1_agreement": difference.top1_agreement,
                "top5_agreement": difference.top5_agreement,
            }
        cut = f"in windows of {text.window} tokens, one every {text.stride}{graph}"
        yield Evidence(name="eval", what=f"the text of {name} {cut}{against}", passed=True, figures=figures)
    if found.choices is not None and asked.choices is not None:
        how = ", as a chat" if asked.chat else ""
        figures = dict(asdict(found.choices).items())
        yield Evidence(
            name="eval", what=f"the questions of {asked.choices.name}{how}{graph}", passed=True, figures=figures
        )
