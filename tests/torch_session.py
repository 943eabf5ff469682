"""A `Session` over a torch module, with the inputs and outputs that an exported graph of it has.

It is as strict as a graph: every input must be there, in its type. Memory that an output is bound to is filled with NaN
before anything is computed: an output that is bound where somebody still reads makes nonsense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from fmedge_runtimes.errors import BackendError
from fmedge_runtimes.session import Array, TensorSpec

Forward = Callable[..., Mapping[str, torch.Tensor]]


@dataclass
class TorchSession:
    """A function of tensors by name as a graph."""

    forward: Forward
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    window_slack: bool = True
    captures: bool = False
    closed: bool = False
    rows: list[int] = field(default_factory=list)
    """Of each run."""
    spoil: Callable[[dict[str, np.ndarray]], None] | None = None
    """Changes the outputs of a run: a graph that fails."""

    def run(self, feeds: Mapping[str, Array], results: Mapping[str, Array]) -> dict[str, Array]:
        """Run the module once."""
        if self.closed:
            raise BackendError("the session is closed; load the model again.")
        specs = {spec.name: spec for spec in self.inputs}
        assert feeds.keys() == specs.keys(), (sorted(feeds), sorted(specs))
        for name, value in feeds.items():
            assert value.dtype.name == specs[name].dtype, (name, value.dtype)
            assert value.ndim == len(specs[name].shape), (name, value.shape)
        self.rows.append(max(len(value) for value in feeds.values()))
        # Where an output is bound, the graph may write before it has read its inputs.
        before = {name: torch.from_numpy(np.array(value)) for name, value in feeds.items()}
        for value in results.values():
            value.fill(np.nan)
        with torch.no_grad():
            tensors = self.forward(**before)
        found = {name: value.float().numpy().copy() for name, value in tensors.items()}
        assert found.keys() == {spec.name for spec in self.outputs}, sorted(found)
        if self.spoil is not None:
            self.spoil(found)
        for name, value in results.items():
            assert value.shape == found[name].shape and value.dtype == found[name].dtype
            value[...] = found.pop(name)
        return found

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> object:
        """Not needed by images."""
        raise NotImplementedError

    copy = bind = read = allocate

    def free_memory(self) -> None:
        """Unknown."""

    def close(self) -> None:
        """No run from now on."""
        self.closed = True


def _specs(**shapes: Sequence[int | str]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name, "int64" if name.endswith(("ids", "mask")) and name != "time_ids" else "float32", tuple(shape))
        for name, shape in shapes.items()
    )


def text_session(module: torch.nn.Module, *, mask: bool = False) -> TorchSession:
    """A text encoder of transformers: its states, all inner ones, and its pooled embedding."""

    def forward(**feeds: torch.Tensor) -> dict[str, torch.Tensor]:
        output = module(**feeds, output_hidden_states=True)
        named = {f"hidden_states.{number}": state for number, state in enumerate(output.hidden_states)}
        if hasattr(module, "final_layer_norm"):
            named |= {f"normed_{name}": module.final_layer_norm(state) for name, state in named.items()}
        known = {name: output.get(name) for name in ("last_hidden_state", "pooler_output", "text_embeds")}
        return {**named, **{name: value for name, value in known.items() if value is not None}}

    shape = ("batch", "sequence")
    inputs = {"input_ids": shape, "attention_mask": shape} if mask else {"input_ids": shape}
    with torch.no_grad():
        example = forward(**{name: torch.ones(1, 3, dtype=torch.int64) for name in inputs})
    outputs = {name: ("batch", *["any"] * (value.ndim - 1)) for name, value in example.items()}
    return TorchSession(forward, _specs(**inputs), _specs(**outputs))


DOWN, MID = "down_block_additional_residual.{}", "mid_block_additional_residual"


def unet_session(unet: torch.nn.Module, *, residuals: int = 0) -> TorchSession:
    """A UNet2DConditionModel, which takes so many residuals at its skip connections, and one in the middle."""
    inputs: dict[str, tuple[int | str, ...]] = {
        "sample": ("batch", "channels", "height", "width"),
        "timestep": ("steps",),
        "encoder_hidden_states": ("batch", "sequence", "dim"),
    }
    if unet.config.addition_embed_type == "text_time":
        inputs |= {"text_embeds": ("batch", "dim"), "time_ids": ("batch", "ids")}
    if unet.config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = ("batch", "dim")
    names = [DOWN.format(number) for number in range(residuals)] + ([MID] if residuals else [])
    inputs |= dict.fromkeys(names, ("residuals", "channels", "height", "width"))

    def forward(
        sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **more: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        assert timestep.shape == (1,)
        condition = more.pop("timestep_cond", None)
        found = [more.pop(name) for name in names]
        output = unet(
            sample,
            timestep[0],
            encoder_hidden_states,
            timestep_cond=condition,
            added_cond_kwargs=more or None,
            down_block_additional_residuals=found[:-1] or None,
            mid_block_additional_residual=found[-1] if found else None,
        )
        return {"out_sample": output.sample}

    return TorchSession(forward, _specs(**inputs), _specs(out_sample=("batch", "channels", "height", "width")))


def controlnet_session(net: torch.nn.Module) -> TorchSession:
    """A ControlNetModel behind its embedding."""
    count = len(net.controlnet_down_blocks)
    image = ("batch", "channels", "height", "width")
    inputs: dict[str, tuple[int | str, ...]] = {
        "sample": ("batch", net.config.in_channels, "height", "width"),
        "timestep": ("steps",),
        "encoder_hidden_states": ("batch", "sequence", "dim"),
        "controlnet_embedding": image,
        "conditioning_scale": (count + 1,),
    }
    if net.config.addition_embed_type == "text_time":
        inputs |= {"text_embeds": ("batch", "dim"), "time_ids": ("batch", "ids")}

    def forward(
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        controlnet_embedding: torch.Tensor,
        conditioning_scale: torch.Tensor,
        **more: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        embed = net.controlnet_cond_embedding
        embed.forward = lambda _: controlnet_embedding
        try:
            down, mid = net(
                sample, timestep[0], encoder_hidden_states, sample, added_cond_kwargs=more or None, return_dict=False
            )
        finally:
            del embed.forward
        names = [*(DOWN.format(number) for number in range(count)), MID]
        return {name: value * scale for name, value, scale in zip(names, (*down, mid), conditioning_scale, strict=True)}

    outputs = {DOWN.format(number): image for number in range(count)} | {MID: image}
    return TorchSession(forward, _specs(**inputs), _specs(**outputs))


def embedding_session(net: torch.nn.Module) -> TorchSession:
    """The embedding of a ControlNetModel."""
    shape = ("batch", "channels", "height", "width")
    flips = net.config.controlnet_conditioning_channel_order == "bgr"
    return TorchSession(
        lambda controlnet_cond: {
            "controlnet_embedding": net.controlnet_cond_embedding(controlnet_cond.flip(1) if flips else controlnet_cond)
        },
        _specs(controlnet_cond=shape),
        _specs(controlnet_embedding=shape),
    )


def decoder_session(vae: torch.nn.Module) -> TorchSession:
    """The decoder of an autoencoder."""
    shape = ("batch", "channels", "height", "width")
    return TorchSession(
        lambda latent_sample: {"sample": vae.decode(latent_sample).sample},
        _specs(latent_sample=shape),
        _specs(sample=shape),
    )


def encoder_session(vae: torch.nn.Module) -> TorchSession:
    """The encoder of an autoencoder."""

    def forward(sample: torch.Tensor) -> dict[str, torch.Tensor]:
        output = vae.encode(sample)
        return {"latent_parameters": output.latent_dist.parameters if "latent_dist" in output else output.latents}

    shape = ("batch", "channels", "height", "width")
    return TorchSession(forward, _specs(sample=shape), _specs(latent_parameters=shape))
