"""Folders of other exporters: what they hold runs as it would alone, or is refused with what it lacks."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from fake_session import EOS, VOCABULARY, WINDOWED, logits_of, make_bundle
from fmedge_runtimes.bundle import Bundle
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.engine import EngineOptions
from fmedge_runtimes.errors import BackendError, BundleDamagedError, BundleError, BundleFormatError
from fmedge_runtimes.foreign import find_foreign
from fmedge_runtimes.foreign_check import adapt
from fmedge_runtimes.foreign_folder import GenerationSettings
from fmedge_runtimes.foreign_graph import read_graph
from fmedge_runtimes.foreign_session import ForeignGraph, GraphNames
from fmedge_runtimes.load import load
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.session import TensorSpec
from fmedge_runtimes.text import TextModel
from foreign_models import FakeGrowing, FakeShared, merge_branches, save_like_optimum
from hypothesis import given, settings
from hypothesis import strategies as st
from models import greedy, make_model

LENGTHS = (1, 40, 7, 23)


def foreign_graph(session, **changes) -> ForeignGraph:
    facts = {
        "names": GraphNames(),
        "caches": (session.layers if isinstance(session, FakeGrowing) else session.inner.layers).caches,
        "cache_dtype": "float32",
        "vocabulary": VOCABULARY,
        "in_place": isinstance(session, FakeShared),
        "last_only": session.last_only,
    }
    return ForeignGraph(**{**facts, **changes})


def adapted(session, bundle: Bundle):
    return adapt(session, foreign_graph(session), bundle.manifest.text, Path("model.onnx"))


def alone(prompt: list[int], count: int) -> list[int]:
    made: list[int] = []
    while len(made) < count and (not made or made[-1] != EOS):
        made.append(int(logits_of((*prompt, *made)).argmax()))
    return made


SESSIONS = {
    "growing": FakeGrowing,
    "growing, last logits": lambda: FakeGrowing(last_only=True),
    "no rows of different lengths": lambda: FakeGrowing(frozenset({"ragged"})),
    "no tokens on top of a past": lambda: FakeGrowing(frozenset({"extends"})),
    "neither": lambda: FakeGrowing(frozenset({"extends", "ragged"}), last_only=True),
    "shared": FakeShared,
    "shared, last logits": lambda: FakeShared(last_only=True),
}


@pytest.mark.parametrize("kind", SESSIONS)
@settings(max_examples=12, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20), min_size=1, max_size=5),
    budgets=st.lists(st.integers(1, 12), min_size=5, max_size=5),
)
def test_every_row_gets_what_it_would_get_alone(kind, bundle, prompts, budgets):
    # Prompts come in several chunks.
    with (
        mock.patch("fmedge_runtimes.decoder.PREFILL_CHUNK", 6),
        TextModel(bundle, adapted(SESSIONS[kind](), bundle), EngineOptions(max_batch=3)) as model,
    ):
        samplings = [Sampling(max_new_tokens=budget) for budget in budgets[: len(prompts)]]
        found = model.generate(prompts, samplings)
    assert [list(item.tokens) for item in found] == [
        alone(prompt, budget) for prompt, budget in zip(prompts, budgets, strict=False)
    ]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("fake") / "bundle")


@pytest.mark.parametrize("kind", SESSIONS)
def test_logits_of_every_position(kind, bundle):
    decoder = Decoder(adapted(SESSIONS[kind](), bundle), bundle.manifest.text)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    wanted = [logits_of(tuple(tokens[: end + 1])) for end in range(len(tokens))]
    assert np.array_equal(decoder.score(decoder.new_cache(), tokens), np.stack(wanted))


def test_windows_of_shared_caches(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", layers=WINDOWED)
    prompts = [list(range(20)), [5], list(range(9, 23))]
    with TextModel(bundle, adapted(FakeShared(WINDOWED), bundle)) as model:
        found = model.generate(prompts, Sampling(max_new_tokens=30, ignore_eos=True))
    for completion, prompt in zip(found, prompts, strict=True):
        for end, token in enumerate(completion.tokens):
            assert token == logits_of((*prompt, *completion.tokens[:end]), WINDOWED).argmax()


def test_what_a_graph_can_do_is_found_out(bundle):
    for flaws in ((), ("extends",), ("ragged",), ("extends", "ragged")):
        graph = adapted(FakeGrowing(frozenset(flaws)), bundle).graph
        assert (graph.extends, graph.ragged) == ("extends" not in flaws, "ragged" not in flaws)
    with pytest.raises(BundleError, match=r"model\.onnx does not continue a text from its cache"):
        adapted(FakeGrowing(frozenset({"past"})), bundle)


def test_only_what_a_graph_can_do_is_asked_of_it(bundle):
    prompts = [[1, 2, 3, 4, 5], [6], [7]]
    steps = {}
    for flaws in ((), ("extends",), ("ragged",)):
        session = FakeGrowing(frozenset(flaws))
        decoder = Decoder(adapted(session, bundle), bundle.manifest.text)
        session.steps.clear()
        cache = decoder.new_cache()
        with mock.patch("fmedge_runtimes.decoder.PREFILL_CHUNK", 3):
            for row, prompt in enumerate(prompts):
                decoder.prefill(cache, row, prompt)
        decoder.decode(cache, [8, 9, 10])
        steps[flaws] = sorted(session.steps)
    assert steps[()] == [(1, 1), (1, 1), (1, 2), (1, 3), (3, 1)]
    assert steps["extends",] == [(1, 1), (1, 1), (1, 1), (1, 1), (1, 3), (3, 1)]
    assert steps["ragged",] == [*[(1, 1)] * 5, (1, 2), (1, 3)]


def test_growing_caches_leave_room_for_their_copies(bundle):
    assert adapted(FakeGrowing(free=3 << 30), bundle).free_memory() == 1 << 30
    assert adapted(FakeShared(), bundle).free_memory() is None


@dataclass
class Interface:
    """A session that is only looked at."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def interface(**changes: tuple[str, tuple[int | str, ...]] | None) -> Interface:
    """What optimum's decoders of one layer take and give; a change replaces, adds or (None) takes away."""
    cache, present = ("batch", 2, "past", 16), ("batch", 2, "past + sequence", 16)
    usual = {
        "input_ids": ("int64", ("batch", "sequence")),
        "attention_mask": ("int64", ("batch", "past + sequence")),
        "past_key_values.0.key": ("float32", cache),
        "past_key_values.0.value": ("float32", cache),
        "logits": ("float32", ("batch", "sequence", 320)),
        "present.0.key": ("float32", present),
        "present.0.value": ("float32", present),
    }
    known = {**usual, **{name.replace("__", "."): value for name, value in changes.items()}}
    specs = [TensorSpec(name, *value) for name, value in known.items() if value is not None]
    given = [spec for spec in specs if spec.name != "logits" and not spec.name.startswith("present")]
    return Interface(tuple(given), tuple(spec for spec in specs if spec not in given))


@pytest.fixture
def optimum(tmp_path):
    """A folder whose graph is not looked at."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 320, "max_position_embeddings": 64}')
    (tmp_path / "model.onnx").write_bytes(b"")
    return find_foreign(tmp_path)


def test_an_interface_is_read(optimum):
    graph = read_graph(optimum, interface())
    assert (graph.vocabulary, graph.last_only, graph.in_place, graph.cache_dtype) == (320, False, False, "float32")
    assert [(facts.layer, facts.kv_heads, facts.key_dim, facts.value_dim) for facts in graph.caches] == [(0, 2, 16, 16)]
    shared = replace(optimum, in_place=True, head_size=8, windows={0: 4})
    open_axes = ("batch", 2, "past", "size")
    graph = read_graph(
        shared,
        interface(
            past_key_values__0__key=("float16", open_axes),
            past_key_values__0__value=("float16", open_axes),
            logits=("float16", ("batch", 1, "vocabulary")),
        ),
    )
    assert (graph.vocabulary, graph.last_only, graph.in_place, graph.cache_dtype) == (320, True, True, "float16")
    assert (graph.caches[0].key_dim, graph.caches[0].window, graph.caches[0].rolling) == (8, 4, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_type_ids": ("int64", ("batch", "sequence"))}, "takes token_type_ids, which fmedge does not know"),
        ({"inputs_embeds": ("float32", ("batch", "sequence", 64)), "input_ids": None}, "takes inputs_embeds"),
        ({"encoder_hidden_states": ("float32", ("batch", "s", 64))}, "takes encoder_hidden_states"),
        ({f"past_{number}": ("float32", (2, "batch", 4, "past", 16)) for number in range(7)}, "past_4 and 2 more"),
        ({"past_key_values__0__key": None, "past_key_values__0__value": None}, "takes no past keys and values"),
        ({"past_key_values__0__value": None}, r"lacks past_key_values\.0\.value"),
        ({"present__0__key": None, "logits": None}, r"lacks logits, present\.0\.key"),
        ({"input_ids": None}, "lacks input_ids"),
        ({"input_ids": ("int64", (1, "sequence"))}, r"takes input_ids \[1, 'sequence'\] .* with dynamic axes"),
        ({"position_ids": ("int64", ("three", "batch", "sequence"))}, r"takes position_ids \['three', 'batch'"),
        ({"attention_mask": ("tensor(bfloat16)", ("batch", "total"))}, r"as tensor\(bfloat16\) instead of"),
        ({"logits": ("float32", ("batch", 320))}, "instead of .batch, sequence, vocabulary."),
        ({"logits": ("tensor(bfloat16)", ("batch", "sequence", 320))}, r"as tensor\(bfloat16\) instead of"),
        ({"past_key_values__0__key": ("float32", ("batch", 2, 64, 16))}, "a length that is free"),
        ({"past_key_values__0__key": ("float32", ("heads", 16, "past"))}, "does not know how to lay out"),
        ({"past_key_values__0__key": ("float32", ("batch", 2, "past", "size"))}, "does not know how to lay out"),
        ({"past_key_values__0__key": ("float32", ("batch", 4, "past", 16))}, "4 heads of keys and 2 of values"),
        (
            {"past_key_values__0__key": ("tensor(bfloat16)", ("batch", 2, "past", 16))},
            r"as float32, tensor\(bfloat16\)",
        ),
    ],
)
def test_interfaces_that_are_refused(changes, words, optimum):
    with pytest.raises(BundleError, match=words):
        read_graph(optimum, interface(**changes))


def test_a_shared_cache_needs_the_mask(optimum):
    assert read_graph(optimum, interface(attention_mask=None)).caches
    with pytest.raises(BundleError, match="lacks attention_mask"):
        read_graph(replace(optimum, in_place=True), interface(attention_mask=None))


GENAI = {
    "model": {
        "type": "llama",
        "context_length": 256,
        "vocab_size": 320,
        "eos_token_id": [0, 7],
        "decoder": {"filename": "model.onnx", "head_size": 16, "inputs": {"past_key_names": "k.%d"}},
    },
    "search": {"do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.0, "past_present_share_buffer": True},
}


def genai_folder(folder: Path, *path: str, value: object = None, drop: bool = False):
    content = json.loads(json.dumps(GENAI))
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    if drop:
        del parent[path[-1]]
    elif path:
        parent[path[-1]] = value
    (folder / "genai_config.json").write_text(json.dumps(content))
    return find_foreign(folder)


def test_the_settings_of_genai(tmp_path):
    found = genai_folder(tmp_path)
    assert (found.exporter, found.graph, found.in_place) == ("onnxruntime-genai", tmp_path / "model.onnx", True)
    assert (found.context, found.vocabulary, found.head_size, found.device) == (256, 320, 16, "cpu")
    assert found.eos_token_ids == (0, 7)
    assert (found.sampling.temperature, found.sampling.top_k, found.sampling.top_p) == (0.5, 7, 1.0)
    assert (found.names.past_key, found.names.past_value) == ("k.%d", "past_key_values.%d.value")
    options = {"provider_options": [{"cuda": {"enable_cuda_graph": "0"}}]}
    assert genai_folder(tmp_path, "model", "decoder", "session_options", value=options).device == "cuda"
    assert genai_folder(tmp_path, "search", drop=True).sampling.temperature == 0
    window = {"window_size": 8, "slide_key_value_cache": False, "slide_inputs": False, "layers": [1]}
    assert genai_folder(tmp_path, "model", "decoder", "sliding_window", value=window).windows == {1: 8}
    found = genai_folder(tmp_path, "model", "decoder", "sliding_window", value={**window, "layers": []})
    assert (found.windows, found.context) == ({}, 8)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("model", "context_length"), None, "model.context_length is missing"),
        (("model", "decoder", "filename"), None, "model.decoder.filename is missing"),
        (("model", "vocab_size"), "many", "model.vocab_size is wrong"),
        (("model", "decoder", "filename"), "../../model.onnx", "leaves the folder"),
        (("model", "decoder", "pipeline"), [{}, {}], "a pipeline of 2 graphs"),
        (("model", "vision"), {"filename": "vision.onnx"}, "a graph for its vision"),
        (("model", "encoder"), {"filename": "encoder.onnx"}, "a graph for its encoder"),
        (("model", "decoder", "sliding_window"), {"window_size": 64}, "slide a window"),
    ],
)
def test_settings_of_genai_that_are_refused(path, value, words, tmp_path):
    with pytest.raises(BundleError, match=words):
        genai_folder(tmp_path, *path, value=value, drop=value is None)


def test_settings_that_are_no_json(tmp_path):
    for content, words in (("{", "is not JSON"), ("[]", "no JSON object")):
        (tmp_path / "genai_config.json").write_text(content)
        with pytest.raises(BundleFormatError, match=words):
            find_foreign(tmp_path)


def test_the_settings_of_optimum(tmp_path):
    def found(config, generation=None, graphs=("model.onnx",)):
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 320, **config}))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        for name in graphs:
            (tmp_path / name).write_bytes(b"")
        return find_foreign(tmp_path)

    foreign = found({"n_positions": 64, "eos_token_id": 5})
    assert (foreign.exporter, foreign.context, foreign.eos_token_ids, foreign.in_place) == ("optimum", 64, (5,), False)
    foreign = found(
        {"text_config": {"max_position_embeddings": 32, "vocab_size": 99}, "eos_token_id": 5},
        {"eos_token_id": [1, 2], "do_sample": True, "top_p": 0.5},
        ("decoder_model.onnx", "decoder_with_past_model.onnx", "decoder_model_merged.onnx"),
    )
    assert (foreign.context, foreign.vocabulary, foreign.eos_token_ids) == (32, 99, (1, 2))
    assert (foreign.graph.name, foreign.sampling.top_p) == ("decoder_model_merged.onnx", 0.5)
    with pytest.raises(BundleFormatError, match="max_position_embeddings is missing"):
        found({})
    with pytest.raises(BundleError, match="holds an encoder and a decoder"):
        found({"n_positions": 64}, graphs=("encoder_model.onnx", "decoder_model_merged.onnx"))
    with pytest.raises(BundleError, match="holds an encoder and a decoder"):
        found({"n_positions": 64, "is_encoder_decoder": True})
    with pytest.raises(BundleError, match=r"has decoder_model\.onnx and none of the graphs that take a past"):
        found({"n_positions": 64}, graphs=("decoder_model.onnx",))
    # A model that was never exported is not this module's business.
    assert found({"n_positions": 64}, graphs=()) is None


def test_recommended_sampling():
    assert GenerationSettings(temperature=0.7).sampling().temperature == 0
    drawn = GenerationSettings(do_sample=True, repetition_penalty=1.2, min_p=0.1).sampling()
    assert (drawn.temperature, drawn.top_k, drawn.top_p, drawn.min_p) == (1.0, 50, 1.0, 0.1)
    assert drawn.repetition_penalty == 1.2


# Graphs in ONNX Runtime


@pytest.fixture(scope="module")
def exported(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as optimum exports it."""
    return save_like_optimum(llama, tmp_path_factory.mktemp("optimum") / "llama")


def check(folder: Path, source: Path, *, ragged: bool = True) -> None:
    """Compare each row with transformers.generate on that row alone."""
    random = np.random.default_rng(0)
    prompts = [random.integers(2, 320, length).tolist() for length in LENGTHS]
    wanted = [greedy(source, prompt, 16) for prompt in prompts]
    with mock.patch("fmedge_runtimes.decoder.PREFILL_CHUNK", 16), load(folder, max_batch=3) as model:
        assert model._decoder.session.graph.ragged == ragged
        found = model.generate(prompts, Sampling(max_new_tokens=16, ignore_eos=True))
    assert [list(completion.tokens) for completion in found] == wanted


def test_a_folder_of_optimum_generates_what_pytorch_generates(exported: Path, llama: Path) -> None:
    check(exported, llama)


@pytest.mark.parametrize(
    ("model_type", "changes", "window"),
    [
        ("mistral", {"sliding_window": 8}, 8),
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}, None),
    ],
)
def test_windows_and_learned_positions(model_type: str, changes: dict, window: int | None, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", model_type, **changes)
    check(save_like_optimum(source, tmp_path / "exported", window), source)


def test_without_positions_rows_of_different_lengths_go_one_by_one(llama: Path, tmp_path: Path) -> None:
    check(save_like_optimum(llama, tmp_path / "exported", positions=False), llama, ragged=False)


def test_merged_graphs_are_told_whether_there_is_a_past(exported: Path, llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "merged"))
    merge_branches(folder / "model.onnx", folder / "decoder_model_merged.onnx")
    (folder / "model.onnx").unlink()
    check(folder, llama)


def test_chats_and_texts(exported: Path, bundle: Bundle, llama: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "What is a tuple?"}]
    folder = Path(shutil.copytree(exported, tmp_path / "old"))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    with load(exported, memory=1 << 30) as model:
        assert model.bundle.nbytes == sum(path.stat().st_size for path in exported.iterdir())
        wanted = model.chat_prompt(messages)
        (completion,) = model.generate("The list", Sampling(max_new_tokens=8, ignore_eos=True))
        assert model.tokenizer is not None
        assert list(completion.tokens) == greedy(llama, model.tokenizer.encode("The list"), 8)
    others = [{"name": "tool_use", "template": "{{ nothing }}"}, {"name": "default", "template": template}]
    for kept in (template, others):
        # As older exporters write it: the template among the tokenizer's settings, special tokens with theirs.
        old = {**config, "chat_template": kept, "bos_token": {"content": "<|begin|>", "lstrip": False}}
        (folder / "tokenizer_config.json").write_text(json.dumps(old))
        with load(folder) as model:
            assert model.chat_prompt(messages) == wanted
            assert model.bundle.manifest.text.special_tokens["bos_token"] == "<|begin|>"
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": others[:1]}))
    with pytest.raises(BundleDamagedError, match="no chat template that can be read"):
        load(folder)


def test_damage(exported: Path, tmp_path: Path) -> None:
    import onnx_ir as ir

    folder = Path(shutil.copytree(exported, tmp_path / "damaged"))
    ir.save(ir.load(folder / "model.onnx"), folder / "model.onnx", external_data="weights.bin")
    with load(folder):
        pass
    (folder / "weights.bin").unlink()
    with pytest.raises(BundleDamagedError, match=r"weights\.bin is missing, where .*model\.onnx keeps its weights"):
        load(folder)
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"cannot open .*model\.onnx"):
        load(folder)
    genai_folder(tmp_path)
    with pytest.raises(BundleDamagedError, match=r"model\.onnx is missing"):
        load(tmp_path)


def test_a_graph_that_fails_is_refused_in_one_line(bundle: Bundle) -> None:
    session = FakeGrowing()
    with (
        mock.patch.object(FakeGrowing, "run", side_effect=BackendError("ONNX Runtime failed:\n a node\n")),
        pytest.raises(BundleError, match=r"^model\.onnx fails on its first steps: ONNX Runtime failed: a node$"),
    ):
        adapted(session, bundle)


# With the exporters themselves


@pytest.mark.medium
def test_a_folder_of_genais_builder(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "onnxruntime_genai", reason="onnxruntime-genai is not installed (pip install onnxruntime-genai)"
    )
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", llama, "-o", tmp_path / "built"]
    subprocess.run([*command, "-p", "fp32", "-e", "cpu", "-c", tmp_path / "cache"], check=True, capture_output=True)
    check(tmp_path / "built", llama)


@pytest.mark.medium
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_folder_of_optimum_itself(model_type: str, tmp_path: Path) -> None:
    python = os.environ.get("FMEDGE_OPTIMUM_PYTHON")
    if python is None:
        pytest.skip(
            reason="FMEDGE_OPTIMUM_PYTHON names no Python with optimum-onnx, which needs a transformers of its own"
        )
    changes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256} if model_type == "gpt2" else {}
    source = make_model(tmp_path / "model", model_type, **changes)
    command = [Path(python).parent / "optimum-cli", "export", "onnx", "-m", source, tmp_path / "exported"]
    subprocess.run([*command, "--task", "text-generation-with-past"], check=True, capture_output=True)
    check(tmp_path / "exported", source)


def fmedge(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fmedge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line(exported: Path) -> None:
    done = fmedge("inspect", exported)
    assert "written by optimum" in done.stdout
    assert "none, and no checksums" in done.stdout
    done = fmedge("verify", exported)
    assert (done.returncode, done.stdout) == (1, "")
    assert "was written by optimum" in done.stderr
    assert "fmedge export" in done.stderr
    done = fmedge("generate", exported, "The list", "--max-new-tokens", 3, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["tokens"]) == 3
