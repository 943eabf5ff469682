"""Folders as other exporters write them, made without those exporters, and a foreign graph in numpy.

`save_like_optimum` traces transformers' own model with growing caches, as `optimum-cli export onnx` does.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from fake_session import PLAIN, VOCABULARY, FakeSession, Layers, hashed, remains
from fmedge_converters.decoder import quiet_libraries
from fmedge_runtimes.session import TensorSpec
from transformers import AutoModelForCausalLM, DynamicCache

SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class _Step(torch.nn.Module):
    """A step with growing caches, behind a mask [B, T] of the tokens that count."""

    def __init__(self, model, window, positions):
        super().__init__()
        self.model = model
        self.window = window
        self.positions = positions

    def forward(self, input_ids, attention_mask, *rest):
        position_ids, past = (rest[0], rest[1:]) if self.positions else (None, rest)
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        total, new = attention_mask.shape[1], input_ids.shape[1]
        columns = torch.arange(total)[None]  # [1, T]
        queries = torch.arange(total - new, total)[:, None]  # [S, 1]
        if position_ids is None:
            position_ids = queries[:, 0][None]
        seen = columns <= queries
        if self.window is not None:
            seen = seen & (columns > queries - self.window)
        seen = seen[None] & (attention_mask[:, None, :] > 0)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]  # [B, 1, S, T]
        output = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        return output.logits, *(part for layer in output.past_key_values.layers for part in (layer.keys, layer.values))


def save_like_optimum(source: Path, folder: Path, window: int | None = None, positions: bool = True) -> Path:
    """Write a folder with model.onnx and the settings of a model."""
    folder.mkdir()
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    config = model.config
    heads, size = getattr(config, "num_key_value_heads", None) or config.num_attention_heads, 16
    if config.model_type == "gpt2":
        heads = config.n_head
    caches = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
    names = ["input_ids", "attention_mask", *(["position_ids"] if positions else [])]
    ids = torch.ones((2, 3), dtype=torch.int64)
    steps = [ids, torch.ones((2, 8), dtype=torch.int64), *([ids] if positions else [])]
    axes = {name: {0: "batch", 1: "sequence"} for name in (*names, "logits")}
    axes["attention_mask"] = {0: "batch", 1: "total"}
    axes |= {f"past_key_values.{name}": {0: "batch", 2: "past"} for name in caches}
    axes |= {f"present.{name}": {0: "batch", 2: "total"} for name in caches}
    with torch.no_grad(), quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Step(model, window, positions),
            (*steps, *(torch.zeros(2, heads, 5, size) for _ in caches)),
            str(folder / "model.onnx"),
            dynamo=False,
            dynamic_axes=axes,
            input_names=[*names, *(f"past_key_values.{name}" for name in caches)],
            output_names=["logits", *(f"present.{name}" for name in caches)],
            opset_version=18,
        )
    for name in SETTINGS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return folder


def merge_branches(graph: Path, output: Path) -> None:
    """Let a graph ask whether there is a past, as merged graphs of older exporters do: a wrong answer gives NaN."""
    model = ir.load(graph)
    tape = ir.tape.Tape()
    branch = ir.val("use_cache_branch", dtype=ir.DataType.BOOL, shape=["one"])
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    length = tape.op("Shape", [past], {"start": 2, "end": 3})
    zero, nan = (
        tape.initializer(ir.tensor([0], name="zero")),
        tape.initializer(ir.tensor([np.float32("nan")], name="nan")),
    )
    right = tape.op("Equal", [tape.op("Greater", [length, zero]), branch])
    logits = model.graph.outputs[0]
    logits.name = "honest"
    told = tape.op("Where", [right, logits, nan], output=ir.val("logits", dtype=logits.dtype, shape=logits.shape))
    model.graph.extend(tape.nodes)
    for value in tape.initializers:
        model.graph.register_initializer(value)
    model.graph.inputs.append(branch)
    model.graph.outputs[0] = told
    ir.save(model, output)


@dataclass(slots=True)
class FakeGrowing:
    """A graph in numpy whose caches grow; `logits_of` says what its logits are.

    It gets wrong what `flaws` says: "past" forgets the past, "extends" hides the first token from several new ones on
    top of a past, "ragged" takes the padding of shorter rows for tokens.
    """

    flaws: frozenset[str] = frozenset()
    last_only: bool = False
    free: int | None = None
    layers: Layers = PLAIN
    steps: list[tuple[int, int]] = field(default_factory=list)
    """Rows and tokens of each row, of every run."""
    window_slack: bool = True

    @property
    def inputs(self):
        return (
            TensorSpec("input_ids", "int64", ("batch", "sequence")),
            TensorSpec("attention_mask", "int64", ("batch", "past + sequence")),
            TensorSpec("position_ids", "int64", ("batch", "sequence")),
            *self._caches("past_key_values", "past"),
        )

    @property
    def outputs(self):
        shape = ("batch", 1 if self.last_only else "sequence", VOCABULARY)
        return (TensorSpec("logits", "float32", shape), *self._caches("present", "past + sequence"))

    def _caches(self, prefix, axis):
        return tuple(
            TensorSpec(f"{prefix}.{name}", "float32", ("batch", cache.kv_heads, axis, size))
            for name, cache, size in self.layers.parts
        )

    def allocate(self, shape, dtype):
        raise AssertionError("growing caches lie in host memory")

    def free_memory(self):
        return self.free

    def run(self, feeds, results):
        assert set(feeds) == {spec.name for spec in self.inputs}
        assert set(results) == {spec.name for spec in self.outputs}
        ids, mask = feeds["input_ids"], feeds["attention_mask"].astype(bool)
        rows, length = ids.shape
        past = mask.shape[1] - length
        self.steps.append((rows, length))
        assert all(feeds[spec.name].dtype == np.dtype(spec.dtype) for spec in self.inputs)
        assert (np.diff(mask.astype(int)) >= 0).all() and mask[:, past:].all(), "a row ends where the new tokens begin"
        for row in range(rows):
            self._row(feeds, results, row, tuple(ids[row].tolist()), mask[row, :past])
        return {}

    def _row(self, feeds, results, row, tokens, seen):
        count, length = int(seen.sum()), len(tokens)
        assert (feeds["position_ids"][row] == count + np.arange(length)).all(), "wrong positions"
        if "ragged" in self.flaws:
            seen = np.ones_like(seen)
        if "past" in self.flaws:
            seen = np.zeros_like(seen)
        whole = []
        for name, _, _ in self.layers.parts:
            given, bound = feeds[f"past_key_values.{name}"][row], results[f"present.{name}"][row]  # [K, P, D]
            assert given.shape[1] == len(seen)
            new = np.broadcast_to(
                remains(name, tokens, count)[None, :, None], (len(given), length, given.shape[2])
            )  # [K, S, D]
            bound[...] = np.concatenate([given, new], axis=1)
            whole.append(bound[:, [*np.flatnonzero(seen), *range(len(seen), len(seen) + length)]])
        for position in range(length):
            end = int(seen.sum()) + position + 1
            begin = 1 if "extends" in self.flaws and count and length > 1 else 0
            logits = hashed([np.ascontiguousarray(content[:, begin:end]) for content in whole])
            if not self.last_only:
                results["logits"][row, position] = logits
            elif position == length - 1:
                results["logits"][row, 0] = logits

    def close(self):
        pass


class FakeShared:
    """A graph in numpy whose caches are updated in place, with an attention mask in place of lengths."""

    def __init__(self, layers=PLAIN, last_only=False):
        self.inner = FakeSession(layers=layers)
        self.last_only = last_only
        self.window_slack = True
        self.allocate, self.copy, self.free_memory = self.inner.allocate, self.inner.copy, self.inner.free_memory

    @property
    def inputs(self):
        known = {spec.name: spec for spec in self.inner.inputs}
        mask = TensorSpec("attention_mask", "int32", ("batch", "total"))
        return (known["input_ids"], mask, known["position_ids"], *(known[name] for name in known if "past_" in name))

    @property
    def outputs(self):
        shape = ("batch", 1 if self.last_only else "sequence", VOCABULARY)
        return (TensorSpec("logits", "float32", shape), *self.inner.outputs[1:])

    def bind(self, feeds, results):
        return _SharedBinding(self, feeds, results)

    def close(self):
        self.inner.close()


@dataclass(slots=True)
class _SharedBinding:
    session: FakeShared
    pasts: dict
    presents: dict

    def run(self, feeds, results):
        ids, mask = feeds["input_ids"], feeds["attention_mask"]
        rows, length = ids.shape
        lengths = mask.sum(1)
        assert mask.dtype == np.int32 and (mask == (np.arange(mask.shape[1]) < lengths[:, None])).all()
        assert mask.shape[1] == lengths.max()
        step = {
            "input_ids": ids,
            "position_ids": feeds["position_ids"],
            "logits_indices": np.arange(rows * length),
            "seqlens_k": (lengths - 1).astype(np.int32),
            "total_sequence_length": np.array(mask.shape[1], np.int32),
        }
        logits = np.empty((rows * length, VOCABULARY), np.float32)
        self.session.inner.run({**step, **self.pasts}, {"logits": logits, **self.presents})
        logits = logits.reshape(rows, length, VOCABULARY)
        results["logits"][...] = logits[:, -1:] if self.session.last_only else logits
