"""Tiny random pipelines of diffusers, and image models that run the same modules through our runtime."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from fmedge_runtimes.bundle import ImageBundle, list_files
from fmedge_runtimes.image import ImageModel
from fmedge_runtimes.manifest import (
    FORMAT,
    GraphFacts,
    ImageFacts,
    ImageGolden,
    ImageManifest,
    SourceFacts,
    write_manifest,
)
from fmedge_runtimes.parts import MemoryMode, Parts
from torch_session import (
    TorchSession,
    controlnet_session,
    decoder_session,
    embedding_session,
    encoder_session,
    text_session,
    unet_session,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LENGTH = 16
"""Tokens of a window: short, so that long prompts are."""
SIDE = 32
"""Pixels of an image."""
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def clip_tokenizer(pad: str = "<|endoftext|>", length: int = LENGTH) -> CLIPTokenizer:
    """Byte-level BPE of single characters and a few merges, in CLIP's form."""
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    vocabulary = {token: number for number, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=length)


def text_config(tokenizer: CLIPTokenizer, width: int = 32, **changes: Any) -> CLIPTextConfig:
    """The smallest encoder for a tokenizer."""
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 37,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "projection_dim": 24,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**{**sizes, **changes})


def lively(module: torch.nn.Module) -> torch.nn.Module:
    """A random module whose output depends on all of its inputs as much as a trained one's does."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and "attn2" in name:
            parameter.data.mul_(3.0)
        elif parameter.ndim == 1:
            # Norms that do nothing and biases of zero would hide what is done with them.
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def unet(**changes: Any) -> UNet2DConditionModel:
    """A UNet of two levels."""
    sizes: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "sample_size": SIDE // 2,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }
    return lively(UNet2DConditionModel(**{**sizes, **changes}))


def autoencoder(**changes: Any) -> AutoencoderKL:
    """An autoencoder of two levels: 2 pixels for each latent."""
    sizes: dict[str, Any] = {
        "block_out_channels": [8, 16],
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": SIDE,
    }
    return lively(AutoencoderKL(**{**sizes, **changes}))


def stable_diffusion(scheduler: Any = None, seed: int = 0, **changes: Any) -> DiffusionPipeline:
    """Stable Diffusion; `changes` are the UNet's."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    scheduler = scheduler or DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return quiet(
        diffusers.StableDiffusionPipeline(
            unet=unet(**changes),
            scheduler=scheduler,
            vae=autoencoder(),
            text_encoder=lively(CLIPTextModel(text_config(tokenizer))),
            tokenizer=tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def stable_diffusion_xl(scheduler: Any = None, seed: int = 0, **changes: Any) -> DiffusionPipeline:
    """Stable Diffusion XL; `changes` are the pipeline's."""
    torch.manual_seed(seed)
    first, second = clip_tokenizer(), clip_tokenizer(pad="!")
    denoiser = unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 24,
        cross_attention_dim=32 + 48,
    )
    return quiet(
        diffusers.StableDiffusionXLPipeline(
            unet=denoiser,
            scheduler=scheduler
            or diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
            vae=autoencoder(),
            text_encoder=lively(CLIPTextModel(text_config(first))),
            text_encoder_2=lively(CLIPTextModelWithProjection(text_config(second, width=48))),
            tokenizer=first,
            tokenizer_2=second,
            add_watermarker=False,
            **changes,
        )
    )


def controlnet(denoiser: Any, seed: int = 1, **changes: Any) -> Any:
    """A ControlNet for a UNet, whose residuals are not zero as those of a fresh one are."""
    torch.manual_seed(seed)
    made = lively(ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=(8, 16), **changes))
    for name, parameter in made.named_parameters():
        if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out")):
            parameter.data.normal_(0, 0.3)
    return made


def quiet(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Without a progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass
class Opened:
    """A pipeline of diffusers, its bundle, and the sessions that were opened."""

    pipeline: DiffusionPipeline
    folder: Path
    makers: dict[str, Any]
    sessions: dict[str, TorchSession] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)

    def open(self, name: str) -> TorchSession:
        """Open a part, anew."""
        self.opened.append(name)
        self.sessions[name] = self.makers[name]()
        return self.sessions[name]

    def model(self, mode: MemoryMode = "keep", **options: Any) -> ImageModel:
        """An image model over it."""
        manifest = image_manifest(self.pipeline, list(self.makers))
        parts = Parts(self.folder, frozenset(self.makers), self.open, mode)
        return ImageModel(ImageBundle(self.folder, manifest), parts, **options)


def write_folder(pipeline: DiffusionPipeline, folder: Path, name: str | None = None) -> Opened:
    """Write the files of a bundle, without graphs; `name` is another class of diffusers for the same parts."""
    folder.mkdir(parents=True, exist_ok=True)
    index = dict(pipeline.config)
    index["_class_name"] = name or type(pipeline).__name__
    (folder / "model_index.json").write_text(json.dumps(index, default=str))
    makers: dict[str, Any] = {}
    control = pipeline.components.get("controlnet")
    nets = list(getattr(control, "nets", [] if control is None else [control]))
    for part, module in pipeline.components.items():
        if module is None:
            continue
        if part.startswith(("tokenizer", "scheduler")):
            module.save_pretrained(folder / part)
        elif part == "vae":
            for half in ("vae_decoder", "vae_encoder"):
                module.save_config(folder / half)
            makers["vae_decoder"] = lambda module=module: decoder_session(module)
            makers["vae_encoder"] = lambda module=module: encoder_session(module)
        elif part == "unet":
            module.save_config(folder / part)
            residuals = 0 if not nets else len(nets[0].controlnet_down_blocks)
            makers[part] = lambda module=module, residuals=residuals: unet_session(module, residuals=residuals)
        elif part == "controlnet":
            for number, net in enumerate(nets):
                name = f"controlnet_{number}" if number else part
                for graph, make in ((name, controlnet_session), (f"{name}_embedding", embedding_session)):
                    net.save_config(folder / graph)
                    makers[graph] = lambda net=net, make=make: make(net)
        elif part.startswith("text_encoder"):
            module.config.save_pretrained(folder / part)
            makers[part] = lambda module=module: text_session(module)
    return Opened(pipeline, folder, makers)


def complete(opened: Opened, golden: tuple[ImageGolden, ...] = ()) -> ImageBundle:
    """Make the folder a bundle that opens: with a manifest, and files where graphs would be."""
    for part in opened.makers:
        (opened.folder / part / "model.onnx").write_bytes(part.encode() * 1000)
    plain = image_manifest(opened.pipeline, list(opened.makers))
    manifest = plain.model_copy(update={"files": list_files(opened.folder), "golden": golden})
    write_manifest(opened.folder, manifest)
    return ImageBundle(opened.folder, manifest)


def image_manifest(pipeline: DiffusionPipeline, parts: list[str]) -> ImageManifest:
    """A manifest that names no files."""
    return ImageManifest(
        format=FORMAT,
        kind="image",
        source=SourceFacts(id="tiny", revision=None, architecture=type(pipeline).__name__, licence=None),
        target="cpu",
        precision="fp32",
        block_size=None,
        graphs={part: GraphFacts(file=f"{part}/model.onnx", inputs=(), outputs=()) for part in parts},
        image=ImageFacts(pipeline=type(pipeline).__name__, height=SIDE, width=SIDE, steps=4, guidance=7.5),
        golden=(),
        evidence=(),
        forced=False,
        files={},
        made_by={},
    )


def generator(seed: int) -> torch.Generator:
    """What a seed means to diffusers."""
    return torch.Generator("cpu").manual_seed(seed)


def latents_of(pipeline: DiffusionPipeline, *args: Any, seed: int, **options: Any) -> np.ndarray:
    """diffusers' latents [C, h, w] for one prompt."""
    made = pipeline(*args, generator=generator(seed), output_type="latent", **options)
    return made.images[0].numpy()


def pixels_of(pipeline: DiffusionPipeline, latents: np.ndarray) -> np.ndarray:
    """diffusers' image [H, W, 3] of latents [C, h, w], as levels; for autoencoders that have a factor alone."""
    with torch.no_grad():
        values = torch.from_numpy(latents)[None] / pipeline.vae.config.scaling_factor
        decoded = pipeline.vae.decode(values).sample
    return np.asarray(pipeline.image_processor.postprocess(decoded, output_type="pil")[0])
