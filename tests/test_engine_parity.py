"""The engine on real graphs: whatever is shared, cut, guessed or interleaved, each request gets what it gets alone."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_runtimes.completion import Completion
from fmedge_runtimes.load import load
from fmedge_runtimes.sampling import Sampling
from models import make_model
from tiny import tiny_config

WINDOW = 16
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma3_text": {"sliding_window": WINDOW},
    "lfm2": {},
}
"""All positions cached; rolling windows in all layers, and in some; states of convolutions."""


CIRCLES, LONG = [5, 6, 7, 8] * 10, Sampling(100, frequency_penalty=-2.0, ignore_eos=True)
"""A negative penalty makes a text repeat itself, which makes good drafts."""


def requests(vocabulary: int) -> list[tuple[list[int], Sampling]]:
    """Prompts of which many begin alike or turn in circles, greedy and drawn."""
    random = np.random.default_rng(0)
    system = random.integers(1, vocabulary, 50).tolist()
    found = []
    for number in range(12):
        prompt = system[: (0, 13, 50)[number % 3]] + random.integers(1, vocabulary, random.integers(1, 40)).tolist()
        if number % 4 == 3:
            prompt = [*prompt, *[5, 6, 7, 8] * 5]
        options = {"temperature": 1.0, "seed": number} if number % 2 else {}
        found.append((prompt, Sampling(int(random.integers(3, 40)), ignore_eos=True, **options)))
    return found


@pytest.mark.medium
@pytest.mark.parametrize("model_type", MODELS)
def test_interleaved_requests_get_what_they_get_alone(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmedge_runtimes.decoder.PREFILL_CHUNK", 24)
    monkeypatch.setattr("fmedge_runtimes.engine.SHARED_CHUNK", 8)
    config = tiny_config(model_type, **MODELS[model_type]).to_dict() if model_type == "lfm2" else MODELS[model_type]
    config.pop("model_type", None)
    folder = make_model(tmp_path / "model", model_type, **config)
    bundle = export(ExportOptions(str(folder), tmp_path / "bundle", verify="none")).folder
    with load(bundle, max_batch=1, prefix_reuse=False, prompt_lookup=False) as model:
        asked = requests(model.bundle.manifest.text.vocabulary)
        facts = model.bundle.manifest.text
        assert bool(facts.states) == (model_type == "lfm2")
        assert any(cache.rolling for cache in facts.caches) == ("sliding_window" in MODELS[model_type])
        alone = [model.generate([prompt], sampling)[0].tokens for prompt, sampling in asked]
        circles = model.generate(CIRCLES, LONG)[0].tokens
    with load(bundle, max_batch=3) as model:
        (drafted,) = model.generate(CIRCLES, LONG)
        assert drafted.tokens == circles
        assert (drafted.stats.accepted_tokens > 20) == (not facts.states)
        found: dict[int, Completion] = {}
        turns: dict[int, Completion] = {}

        def serve(start: int) -> None:
            for number in range(start, len(asked), 3):
                prompt, sampling = asked[number]
                (found[number],) = model.generate([prompt], sampling)
                # The next turn of a chat.
                turns[number] = model.generate([[*prompt, *found[number].tokens, 9]], Sampling(4, ignore_eos=True))[0]

        threads = [threading.Thread(target=serve, args=(start,)) for start in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[number].tokens for number in range(len(asked))] == alone
        together = model.generate([prompt for prompt, _ in asked], [sampling for _, sampling in asked])
        assert [completion.tokens for completion in together] == alone
    with load(bundle, max_batch=1, prefix_reuse=False, prompt_lookup=False) as model:
        for number, turn in turns.items():
            prompt = [*asked[number][0], *found[number].tokens, 9]
            assert model.generate([prompt], Sampling(4, ignore_eos=True))[0].tokens == turn.tokens
    # What could be shared, was.
    assert sum(turn.stats.reused_tokens for turn in turns.values()) > 200
