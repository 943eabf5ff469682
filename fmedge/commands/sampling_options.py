"""What a completion is asked to be like, as options of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SHAPES = "How draws are shaped"
TOKENS = "Which tokens"
ENDS = "Where completions end"
FORMS = "What the text must follow: one of these (needs pip install 'fmedge\\[constraints]')"

Temperature = Annotated[float | None, typer.Option(help="0 is greedy; above 0 draws.", rich_help_panel=SHAPES)]
TopK = Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; 0 is off.", rich_help_panel=SHAPES)]
TopP = Annotated[
    float | None,
    typer.Option(help="Draw from the likeliest tokens that sum to p; 1 is off.", rich_help_panel=SHAPES),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Draw from tokens at least this times as likely as the likeliest; 0 is off.", rich_help_panel=SHAPES
    ),
]
TypicalP = Annotated[
    float | None,
    typer.Option(help="Draw from tokens as surprising as expected, that sum to p; 1 is off.", rich_help_panel=SHAPES),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1 discourages repetition.", rich_help_panel=SHAPES)
]
PresencePenalty = Annotated[
    float | None, typer.Option(help="Subtracted from logits of tokens seen.", rich_help_panel=SHAPES)
]
FrequencyPenalty = Annotated[float | None, typer.Option(help="The same, for each time seen.", rich_help_panel=SHAPES)]
Seed = Annotated[int | None, typer.Option(help="Makes draws reproducible.", rich_help_panel=SHAPES)]
HowMany = Annotated[
    int | None, typer.Option("--n", "-n", help="Completions, or images, for each prompt.", rich_help_panel=SHAPES)
]
BestOf = Annotated[
    int | None,
    typer.Option(help="Generate so many, give the --n of highest log-probability.", rich_help_panel=SHAPES),
]
LengthPenalty = Annotated[
    float | None,
    typer.Option(
        help="With --best-of: 1 compares the mean of the tokens' log-probabilities, 0 their sum.",
        rich_help_panel=SHAPES,
    ),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(metavar="ID=BIAS", help="Add to the logit of a token; may be repeated.", rich_help_panel=TOKENS),
]
Ban = Annotated[
    list[int] | None,
    typer.Option(metavar="ID", help="Token that never comes; may be repeated.", rich_help_panel=TOKENS),
]
ForceToken = Annotated[
    list[int] | None,
    typer.Option(metavar="ID", help="Token that completions begin with; may be repeated.", rich_help_panel=TOKENS),
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        help="With JSON output: log-probabilities of each token and of so many likeliest ones.",
        rich_help_panel=TOKENS,
    ),
]
MaxNewTokens = Annotated[int | None, typer.Option(help="Tokens to generate at most.", rich_help_panel=ENDS)]
MinNewTokens = Annotated[
    int | None, typer.Option(help="No end-of-sequence or stop token before so many.", rich_help_panel=ENDS)
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="String that ends a completion; may be repeated.", rich_help_panel=ENDS),
]
StopToken = Annotated[
    list[int] | None,
    typer.Option(metavar="ID", help="Token that ends a completion; may be repeated.", rich_help_panel=ENDS),
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on past end-of-sequence tokens.", rich_help_panel=ENDS)
]
JsonObject = Annotated[bool, typer.Option("--json-object", help="The text is a JSON object.", rich_help_panel=FORMS)]
JsonSchema = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="The text is JSON of this JSON Schema: a file, or {...} itself.", rich_help_panel=FORMS
    ),
]
Regex = Annotated[
    str | None, typer.Option(help="The text matches this regular expression as a whole.", rich_help_panel=FORMS)
]
Grammar = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The text follows this grammar, Lark or GBNF.", rich_help_panel=FORMS),
]
