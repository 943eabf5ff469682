"""The diffusers pipeline of trained folders, which hold a copy of this file as pipeline.py.

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe("a small red circle in the left").images[0]

It denoises pixels: there is no VAE. Its parts are classes of diffusers and transformers, and it hands each output of
the transformer to the scheduler as it is; the scheduler's configuration says what the transformer predicts. This file
imports nothing of fmedge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, PRXTransformer2DModel, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTokenizer


class PixelDiffusionPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers is untyped
    """Text to image in pixel space. What a call leaves out is as the folder's model_index.json says."""

    model_cpu_offload_seq = "text_encoder->transformer"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: PRXTransformer2DModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: SchedulerMixin,
        default_sample_size: int = 32,  # diffusers takes parameters without a default for parts.
        default_steps: int = 10,
        default_guidance: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.default_sample_size, self.default_steps = default_sample_size, default_steps  # save_pretrained reads them.
        self.default_guidance = default_guidance
        self.register_to_config(
            default_sample_size=default_sample_size, default_steps=default_steps, default_guidance=default_guidance
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    def encode_prompt(self, prompt: list[str]) -> torch.Tensor:
        """Embed prompts, padded or cut to the tokenizer's length: [B, L, D]."""
        ids = self.tokenizer(
            prompt,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        embedded: torch.Tensor = self.text_encoder(ids.to(self._execution_device)).last_hidden_state
        return embedded

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
        | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make images; the arguments are those of diffusers' other pipelines. Latents are noisy pixels."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negative = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(negative) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts and {len(negative)} negative prompts")
        height = self.config.default_sample_size if height is None else height
        width = self.config.default_sample_size if width is None else width
        patch = self.transformer.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"height and width must be multiples of {patch}, not {height} and {width}")
        guidance = self.config.default_guidance if guidance_scale is None else guidance_scale
        steps = self.config.default_steps if num_inference_steps is None else num_inference_steps

        texts = [*negative, *prompts] if guidance != 1 else prompts
        embedded = self.encode_prompt(texts).repeat_interleave(num_images_per_prompt, dim=0)  # [B or 2 B, L, D]
        shape = (len(prompts) * num_images_per_prompt, self.transformer.config.in_channels, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=embedded.dtype)
            latents = latents * self.scheduler.init_noise_sigma
        latents = latents.to(self._execution_device)

        self.scheduler.set_timesteps(steps, device=self._execution_device)
        for index, time in enumerate(self.progress_bar(self.scheduler.timesteps)):
            rows = self.scheduler.scale_model_input(latents, time)  # [B, C, H, W]
            if guidance != 1:
                rows = torch.cat([rows, rows])
            output = self.transformer(rows, time.to(embedded.dtype).expand(len(rows)), embedded, return_dict=False)[0]
            if guidance != 1:
                without, following = output.chunk(2)
                output = without + guidance * (following - without)
            latents = self.scheduler.step(output, time, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, index, time, {"latents": latents}).get("latents", latents)
        images = latents if output_type == "latent" else self.image_processor.postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
