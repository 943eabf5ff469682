"""Whole trajectories of a scheduler, ours and diffusers', over the same fixed model and the same noise."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import numpy as np
import torch
from fmedge_runtimes.schedulers import open_scheduler, parse_config, with_table

SHAPE = (2, 3, 8, 8)

TABLE_FIELDS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
# As Stable Diffusion's scheduler_config.json has them.
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def denoise(sample, timestep, channels=1):
    """A fixed nonlinear model of the sample and the timestep, float32 [B, channels * C, ...]."""
    late = np.float32(float(timestep) / 1000)
    sample = sample.astype(np.float32)
    output = np.tanh(sample * (np.float32(0.4) + late)) + np.float32(0.2) * np.sin(3 * sample + late)
    # A learned variance is from -1 to 1, and positive for variance_type learned.
    return np.concatenate([output, np.abs(np.tanh(sample))], axis=1) if channels == 2 else output


def generators(seed=3):
    return [torch.Generator().manual_seed(seed + row) for row in range(SHAPE[0])]


def draw_from(rows):
    return lambda: torch.cat([torch.randn((1, *SHAPE[1:]), generator=row) for row in rows]).numpy()


def start(seed=11):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).numpy()


def theirs_of(values: dict[str, Any], class_name: str | None = None, **fields):
    """diffusers' scheduler for a config; of another class where one is named, and with other fields."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers under a newer numpy
        return getattr(diffusers, class_name or values["_class_name"]).from_config(values, **fields)


def their_timesteps(scheduler, steps, strength, options):
    """As diffusers' pipelines: set, then leave out what the strength leaves out."""
    given = {name: value for name, value in options.items() if name not in ("eta", "respaced")}
    if "original_steps" in given:
        given["original_inference_steps"] = given.pop("original_steps")
    if options.get("respaced"):
        scheduler.set_timesteps(steps, strength=strength, **given)
        return scheduler.timesteps
    if "timesteps" in given or "sigmas" in given:
        scheduler.set_timesteps(**given)
    else:
        scheduler.set_timesteps(steps, **given)
    kept = min(steps * strength, steps)
    kept = kept if "Flow" in type(scheduler).__name__ else int(kept)
    first = int(max(steps - kept, 0)) * getattr(scheduler, "order", 1)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return scheduler.timesteps[first:]


def theirs(values, steps, *, channels=1, strength=1.0, image=None, **options):
    """(timesteps, samples, clean samples, the generators) of diffusers' scheduler."""
    scheduler = theirs_of(values)
    timesteps = their_timesteps(scheduler, steps, strength, options)
    rows = generators()
    sample = torch.from_numpy(start())
    if image is None:
        sample = sample * getattr(scheduler, "init_noise_sigma", 1.0)
    else:
        add = getattr(scheduler, "add_noise", None) or (lambda a, n, t: scheduler.scale_noise(a, t, n))
        sample = add(torch.from_numpy(image), sample, timesteps[:1].repeat(len(image)))
    more: dict[str, Any] = {}
    step = scheduler.step
    if "generator" in step.__code__.co_varnames[: step.__code__.co_argcount]:
        more["generator"] = rows
    if "eta" in options:
        more["eta"] = options["eta"]
    samples, clean = [sample.numpy().copy()], []
    for index, timestep in enumerate(timesteps):
        scaled = sample if "Flow" in type(scheduler).__name__ else scheduler.scale_model_input(sample, timestep)
        output = torch.from_numpy(denoise(scaled.numpy(), timestep, channels))
        if values["_class_name"] == "UnCLIPScheduler":
            more["prev_timestep"] = timesteps[index + 1] if index + 1 < len(timesteps) else None
        done = step(output, timestep, sample, **more)
        sample = done.prev_sample
        found = getattr(done, "pred_original_sample", None)
        clean.append(getattr(done, "denoised", None) if found is None else found)
        samples.append(sample.numpy().copy())
    return timesteps.numpy(), samples, clean, rows


def config_of(values):
    """As a bundle has it: with torch's table."""
    config = parse_config(values)
    if "rescale_betas_zero_snr" not in values:
        return config
    # The scheduler whose table has its zero still; the others replace it.
    betas = {name: getattr(config.settings, name) for name in TABLE_FIELDS}
    return with_table(config, theirs_of({"_class_name": "DDPMScheduler", **betas}).alphas_cumprod.numpy())


def ours(values, steps, *, channels=1, strength=1.0, image=None, **options):
    """The same of ours."""
    scheduler = open_scheduler(config_of(values), steps, strength=strength, **options)
    rows = generators()
    draw = draw_from(rows)
    noise = start()
    sample = noise * np.float32(scheduler.init_noise_sigma) if image is None else scheduler.add_noise(image, noise, 0)
    samples, clean = [sample.copy()], []
    for index, timestep in enumerate(scheduler.timesteps):
        output = denoise(scheduler.scale(sample, index), timestep, channels)
        before, given = sample.copy(), output.copy()
        done = scheduler.step(output, index, sample, draw)
        assert np.array_equal(before, sample) and np.array_equal(given, output)
        sample = done.sample
        assert sample.dtype == np.float32 and done.denoised.dtype == np.float32
        samples.append(sample.copy())
        clean.append(done.denoised)
    return scheduler.timesteps, samples, clean, rows


class NotFinite(Exception):
    """diffusers' own result is not finite, while ours is."""


def worst(values, steps, **options):
    """Compare everything; the largest differences of a sample, and of a clean one, in their standard deviations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers under a newer numpy
        timesteps, samples, clean, rows = theirs(values, steps, **options)
    found, our_samples, our_clean, our_rows = ours(values, steps, **options)
    assert found.dtype == timesteps.dtype and found.shape == timesteps.shape
    if timesteps.dtype == np.int64:
        assert np.array_equal(found, timesteps), (found, timesteps)
    else:
        # torch's square root of a table is not rounded correctly, so interpolated timesteps differ in the last bits.
        assert np.allclose(found, timesteps, rtol=5e-7, atol=1e-6), (found, timesteps)
    for row, our_row in zip(rows, our_rows, strict=True):
        assert torch.equal(row.get_state(), our_row.get_state()), "other number of draws"
    assert np.isfinite(our_samples[-1]).all()
    if not np.isfinite(samples[-1]).all():
        raise NotFinite
    differences = [relative(one, other) for one, other in zip(samples, our_samples, strict=True)]
    cleans = [relative(one.numpy(), other) for one, other in zip(clean, our_clean, strict=True) if one is not None]
    return max(differences), max(cleans, default=0.0)


def relative(one, other):
    return float(np.abs(one - other).max() / one.std())
