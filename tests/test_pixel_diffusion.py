"""The pipeline of trained folders against a plain loop over diffusers' modules and scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PRXTransformer2DModel, SD3Transformer2DModel
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.errors import BundleError, RequestError
from image_models import LENGTH, Opened, clip_tokenizer, generator, lively, text_config
from part_sessions import open_pipeline
from transformers import CLIPTextModel

# diffusers' own, of numpy and of what it will drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPTS = ["a red cat", "dog 42!", "a red cat", ""]
SEEDS = (7, 8, 2**33 + 5, 0)
NEGATIVES = ("bad", None, "", "red")
FLOW = {"use_flow_sigmas": True, "flow_shift": 1.0}
SCHEDULERS = {
    "sample": {**FLOW, "prediction_type": "sample"},
    "velocity": {**FLOW, "prediction_type": "flow_prediction", "solver_order": 1},
    "epsilon": {
        "beta_schedule": "squaredcos_cap_v2",
        "timestep_spacing": "trailing",
        "prediction_type": "epsilon",
        "thresholding": True,
    },
}


class PixelDiffusionPipeline(DiffusionPipeline):
    """The parts of a trained folder, and its loop."""

    def __init__(self, transformer: Any, text_encoder: Any, tokenizer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )

    @torch.no_grad()
    def made(self, prompt: str, negative: str, seed: int, steps: int, guidance: float, size: tuple[int, int]) -> Any:
        texts = [negative, prompt] if guidance != 1 else [prompt]
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids
        text = self.text_encoder(ids)
        x = torch.randn(1, 3, *size, generator=generator(seed)) * self.scheduler.init_noise_sigma
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            sd3 = isinstance(self.transformer, SD3Transformer2DModel)
            y = self.transformer(
                self.scheduler.scale_model_input(x, t).repeat(len(texts), 1, 1, 1),
                timestep=t.float().expand(len(texts)),
                encoder_hidden_states=text.last_hidden_state,
                **({"pooled_projections": text.pooler_output} if sd3 else {}),
            ).sample
            if guidance != 1:
                y = y[:1] + guidance * (y[1:] - y[:1])
            x = self.scheduler.step(y, t, x).prev_sample
        return x[0].numpy()


def sd3() -> SD3Transformer2DModel:
    """Places from a table, and the pooled embedding of the text."""
    return SD3Transformer2DModel(
        sample_size=32,
        patch_size=8,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=5,
    )


def prx() -> PRXTransformer2DModel:
    """Rotary places, and the text's states alone: what `fmedge train image` writes."""
    return PRXTransformer2DModel(
        in_channels=3,
        patch_size=8,
        context_in_dim=32,
        hidden_size=32,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
        theta=10,
        time_factor=1.0,
        mlp_ratio=2.5,
    )


TRANSFORMERS = {"sd3": sd3, "prx": prx}


def opened(folder: Path, transformer: str = "prx", **scheduler: Any) -> Opened:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    pipeline = PixelDiffusionPipeline(
        lively(TRANSFORMERS[transformer]()),
        lively(CLIPTextModel(text_config(tokenizer))),
        tokenizer,
        diffusers.DPMSolverMultistepScheduler(**scheduler),
    )
    # As diffusers writes the name of a class that comes with its folder.
    return open_pipeline(pipeline, folder, _class_name=["pipeline", PixelDiffusionPipeline.__name__])


def check(found: Opened, options: Diffusion, prompts: list[str], size: tuple[int, int] = (32, 32)) -> None:
    for made in found.model().generate(prompts, options):
        negative = made.settings.negative or ""
        given = made.prompt, negative, made.seed, options.steps, options.guidance, size
        expected = found.pipeline.made(*given)
        assert np.abs(made.latents - expected).max() <= 1e-4 * expected.std()
        levels = np.rint(np.clip(np.moveaxis(expected, 0, -1) / 2 + 0.5, 0, 1) * 255)
        assert np.abs(np.asarray(made.image, int) - levels).max() <= 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("transformer", TRANSFORMERS)
def test_like_diffusers(tmp_path: Path, scheduler: str, guidance: float, transformer: str) -> None:
    options = Diffusion(steps=4, guidance=guidance, seed=SEEDS, negative=NEGATIVES, height=32, width=32)
    check(opened(tmp_path, transformer, **SCHEDULERS[scheduler]), options, PROMPTS)


@pytest.mark.parametrize("transformer", TRANSFORMERS)
def test_other_size_and_alone(tmp_path: Path, transformer: str) -> None:
    found = opened(tmp_path, transformer, **SCHEDULERS["sample"])
    check(found, Diffusion(steps=3, guidance=2.0, seed=1, height=24, width=40), PROMPTS[:1], (24, 40))


def test_another_scheduler(tmp_path: Path) -> None:
    """Chosen by name, and diffusers' own of the same fields."""
    found = opened(tmp_path, **SCHEDULERS["velocity"])
    found.pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(found.pipeline.scheduler.config)
    options = Diffusion(steps=4, guidance=2.0, seed=(1, 2), height=32, width=32, scheduler="unipc")
    check(found, options, PROMPTS[:2])


def test_previews_are_the_predicted_images(tmp_path: Path) -> None:
    model = opened(tmp_path, **SCHEDULERS["sample"]).model()
    options = Diffusion(steps=4, guidance=1.0, seed=1, height=32, width=32, preview_every=1)
    updates = [update for update in model.stream("a red cat", options) if update.previews]
    assert [update.previews[0].size for update in updates] == [(32, 32)] * 4
    (made,) = model.generate("a red cat", options)
    assert np.array_equal(np.asarray(updates[-1].previews[0]), np.asarray(made.image))


@pytest.mark.parametrize(
    ("prompt", "options", "problem"),
    [
        ("a" * (LENGTH - 1), {}, f"has {LENGTH - 1} tokens, and this model reads {LENGTH - 2}"),
        ("a", {"negative": "a" * 40, "guidance": 3.0}, "has 40 tokens"),
        ("a", {"height": 36}, "multiples of 8"),
        ("a", {"height": 48}, "sides end at 40"),
        ("a", {"clip_skip": 1}, "clip_skip"),
    ],
)
def test_refused(tmp_path: Path, prompt: str, options: dict[str, Any], problem: str) -> None:
    model = opened(tmp_path, "sd3", **SCHEDULERS["sample"]).model()
    with pytest.raises(RequestError, match=problem):
        model.generate(prompt, Diffusion(**{"steps": 2, "height": 32, "width": 32, **options}))


@pytest.mark.parametrize("name", [["pipeline", "OtherPipeline"], [], None, [{}]])
def test_other_classes_are_refused(tmp_path: Path, name: Any) -> None:
    found = opened(tmp_path, **SCHEDULERS["sample"])
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(BundleError, match=r"does not run|names no _class_name"):
        found.model()
