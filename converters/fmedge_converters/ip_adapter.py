"""An IP-Adapter: images beside the prompt, by a second attention in every cross-attention of a UNet (Ye et al. 2023,
arXiv 2308.06721).

Its file holds a projection, which makes a few tokens of what an image encoder says, and two matrices an attention.
The projection goes into the image encoder's graph, the matrices into the UNet's, which takes the tokens and a scale;
diffusers' own loader builds both.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers.models.embeddings import ImageProjection
from fmedge_runtimes.errors import SourceError
from safetensors import SafetensorError, safe_open

from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.parts.part import Call, Input, Tensors
from fmedge_converters.weight import Weight

UNET, ENCODER = "unet", "image_encoder"
FACTS = "ip_adapter.json"
TOKENS, NO_TOKENS, SCALE = "ip_hidden_states", "negative_ip_hidden_states", "ip_adapter_scale"
PROJECTION = "ip_projection"
"""The layers that the image encoder gets."""
OF_FACES = "perceiver_resampler.proj_in.weight"
OF_IMAGES = ("proj.weight", "proj.3.weight", "latents")
"""What is in projections of what a detector of faces says, and of what an image encoder says: one of these."""


class IpAdapter:
    """An IP-Adapter on its way into a UNet and an image encoder; a `part_build.Adapter`."""

    def __init__(self, file: Path, unet: Any, encoder: Any, *, allow_pickle: bool) -> None:  # noqa: ANN401 - two modules
        """`unet` and `encoder` are the modules that it is for, whose weights do not matter.

        Raises SourceError: it is damaged, no IP-Adapter, one for faces, or made for other modules.
        """
        self.file = file
        self._state = _read(file, allow_pickle=allow_pickle)
        self._names = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
        self._scale = _Scale()
        self._check(unet)
        try:
            with quiet_libraries():
                projection = unet._convert_ip_adapter_image_proj_to_diffusers(
                    dict(self._state["image_proj"]), low_cpu_mem_usage=False
                )
        except Exception as error:  # whatever an unknown form makes diffusers raise
            raise SourceError(f"{file}: diffusers does not know the form of its image_proj: {error}") from error
        self._projection = projection.float().eval()
        self._pools = isinstance(projection, ImageProjection)
        """Whether it reads the embedding of the whole image, and not the states of its pieces."""
        self.tokens = self._count(encoder)
        self.width = int(unet.config.cross_attention_dim)

    def _check(self, unet: Any) -> None:  # noqa: ANN401 - any UNet
        found = self._state["ip_adapter"]
        for number, name in enumerate(self._names):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            wanted = (attention.to_k.out_features, unet.config.cross_attention_dim)
            for end in ("to_k_ip", "to_v_ip"):
                key = f"{2 * number + 1}.{end}.weight"
                shape = tuple(found[key].shape) if key in found else None
                if shape != wanted:
                    raise SourceError(
                        f"{self.file} is an IP-Adapter for another model: {key} has shape {shape and list(shape)}, and "
                        f"the UNet's {name.removesuffix('.processor')} needs {list(wanted)}."
                    )
        if len(found) != 2 * len(self._names):
            raise SourceError(
                f"{self.file} is an IP-Adapter for another model: it has {len(found) // 2} attentions, the UNet "
                f"{len(self._names)}."
            )

    def _count(self, encoder: Any) -> int:  # noqa: ANN401 - an image encoder
        """Tokens that are made of an image. Raises SourceError for another encoder than that of the adapter."""
        config = encoder.config
        pieces = (config.image_size // config.patch_size) ** 2 + 1
        shape = (1, config.projection_dim) if self._pools else (1, pieces, config.hidden_size)
        try:
            with torch.no_grad():
                return int(self._projection(torch.zeros(shape)).shape[1])
        except RuntimeError as error:
            raise SourceError(
                f"{self.file} was made for another image encoder than this one, which gives {list(shape)} ({error})."
            ) from error

    def write_facts(self, output: Path) -> None:
        """Write what a runtime must know beside the graphs."""
        facts = {"tokens": self.tokens, "width": self.width}
        (output / ENCODER).mkdir(exist_ok=True)
        (output / ENCODER / FACTS).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")

    def applied(self, part: str, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """The weights of the UNet with the adapter's, and of the image encoder with the projection's."""
        more: dict[str, torch.Tensor] = {}
        if part == UNET:
            for number, name in enumerate(self._names):
                for end in ("to_k_ip", "to_v_ip"):
                    more[f"{name}.{end}.0.weight"] = self._state["ip_adapter"][f"{2 * number + 1}.{end}.weight"]
        elif part == ENCODER:
            more = {f"{PROJECTION}.{name}": value for name, value in self._projection.state_dict().items()}
        return {**weights, **{name: _weight(value) for name, value in more.items()}}

    def attach(self, part: str, module: Any) -> None:  # noqa: ANN401 - any module
        """Give a UNet the attentions, an image encoder the projection, on the device where they are."""
        if part == UNET:
            device = module.device
            with quiet_libraries():
                module._load_ip_adapter_weights([copy.deepcopy(self._state)], low_cpu_mem_usage=False)
            module.to(device)
            for name in self._names:
                module.get_submodule(name).scale = [self._scale]
        elif part == ENCODER:
            module.add_module(PROJECTION, copy.deepcopy(self._projection).to(next(module.parameters()).device))

    def merge(self, part: str, module: Any) -> None:  # noqa: ANN401 - any module
        """The same for a module that is the reference."""
        self.attach(part, module)

    def check_used(self, part: str, parameters: Iterable[str]) -> None:
        """The attentions are there whenever the module is called."""

    def call(self, part: str, call: Call) -> Call:
        """The UNet takes the tokens and the scale; the image encoder gives the tokens, and those of no image where they
        are always the same."""
        if part == UNET:
            tokens = Input(TOKENS, ("batch", self.tokens, self.width))
            scale = Input(SCALE, (1,), largest=1.0)

            def denoise(model: Any, given: Tensors) -> dict[str, torch.Tensor]:  # noqa: ANN401 - any UNet
                others: dict[str, Any] = {name: value for name, value in given.items() if name not in (TOKENS, SCALE)}
                others["encoder_hidden_states"] = (given["encoder_hidden_states"], [given[TOKENS]])
                with self._scale.of(given[SCALE]), patch.object(model, "encoder_hid_proj", None):
                    return call.run(model, others)

            return replace(call, inputs=(*call.inputs, tokens, scale), run=denoise)
        if part == ENCODER:
            return replace(call, run=self._encode)
        return call

    def _encode(self, model: Any, given: Tensors) -> dict[str, torch.Tensor]:  # noqa: ANN401 - an image encoder
        output = model(given["pixel_values"], output_hidden_states=not self._pools)
        projection = getattr(model, PROJECTION)
        if not self._pools:
            return {TOKENS: projection(output.hidden_states[-2])}
        embeds = output.image_embeds
        return {TOKENS: projection(embeds), NO_TOKENS: projection(torch.zeros_like(embeds))}


class _Scale:
    """The scale of an attention, which diffusers multiplies with and asks whether it is 0: an input never is."""

    def __init__(self) -> None:
        self._value: torch.Tensor | float = 1.0

    @contextmanager
    def of(self, value: torch.Tensor) -> Iterator[None]:
        """Be this, for a while."""
        self._value = value
        try:
            yield
        finally:
            self._value = 1.0

    def __mul__(self, other: torch.Tensor) -> torch.Tensor:
        return other * self._value

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]  # unhashable, as tensors are


def _weight(value: torch.Tensor) -> Weight:
    array = value.detach().float().numpy().astype(np.float32)
    return Weight(array.shape, array.dtype, lambda start, stop: array[start:stop])


def _read(file: Path, *, allow_pickle: bool) -> dict[str, dict[str, torch.Tensor]]:
    """The file's two tables. Raises SourceError."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                flat = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
            found = {
                table: {key.removeprefix(f"{table}."): value for key, value in flat.items() if key.startswith(table)}
                for table in ("image_proj", "ip_adapter")
            }
        elif not allow_pickle:
            raise SourceError(f"{file} is a pickle; read it with --allow-pickle, or give a .safetensors file.")
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except SourceError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError, KeyError) as error:
        raise SourceError(f"{file} is damaged, or holds no weights ({error}); copy it again.") from error
    except Exception as error:  # what a pickle can raise
        raise SourceError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(found.get(table) for table in ("image_proj", "ip_adapter")):
        raise SourceError(f"{file} is no IP-Adapter: it lacks image_proj or ip_adapter.")
    projection = found["image_proj"]
    faces = OF_FACES in projection or not any(key in projection for key in OF_IMAGES)
    if faces or any("lora" in key for key in found["ip_adapter"]):
        raise SourceError(
            f"{file} is an IP-Adapter FaceID, which wants the embeddings of a detector of faces; it is not supported."
        )
    return {
        table: {key: value.float() for key, value in found[table].items()} for table in ("image_proj", "ip_adapter")
    }
