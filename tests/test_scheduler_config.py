"""scheduler_config.json: what published models have, what is refused, and the change to another scheduler."""

from __future__ import annotations

import json
import warnings

import diffusers
import numpy as np
import pytest
from diffusers_trajectories import SD, ours, relative, theirs, theirs_of
from fmedge_runtimes.errors import BundleError, BundleFormatError, RequestError
from fmedge_runtimes.schedulers import (
    BY_NAME,
    SCHEDULERS,
    open_scheduler,
    parse_config,
    read_config,
    switch,
    table_of,
    with_table,
)

diffusers.logging.set_verbosity_error()

# As the scheduler_config.json of published models have them.
STABLE_DIFFUSION_15 = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **SD, "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
STABLE_DIFFUSION_21 = {
    "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", **SD, "clip_sample": False,
    "num_train_timesteps": 1000, "prediction_type": "v_prediction", "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
STABLE_DIFFUSION_XL = {
    "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", **SD, "clip_sample": False,
    "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
}  # fmt: skip
STABLE_DIFFUSION_3 = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.29.0.dev0", "num_train_timesteps": 1000,
    "shift": 3.0,
}  # fmt: skip
FLUX = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.30.0.dev0", "base_image_seq_len": 256,
    "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0,
    "use_dynamic_shifting": True,
}  # fmt: skip
SANA = {
    "_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.32.0.dev0", "algorithm_type": "dpmsolver++",
    "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001, "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False, "final_sigmas_type": "zero", "flow_shift": 3.0, "lambda_min_clipped": -float("inf"),
    "lower_order_final": True, "num_train_timesteps": 1000, "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False, "sample_max_value": 1.0, "solver_order": 2, "solver_type": "midpoint",
    "steps_offset": 0, "thresholding": False, "timestep_spacing": "linspace", "trained_betas": None,
    "use_beta_sigmas": False, "use_exponential_sigmas": False, "use_flow_sigmas": True, "use_karras_sigmas": False,
    "use_lu_lambdas": False, "variance_type": None,
}  # fmt: skip
DEEPFLOYD_IF = {
    "_class_name": "DDPMScheduler", "_diffusers_version": "0.16.0.dev0", "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "clip_sample": True, "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.95, "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "sample_max_value": 1.5, "thresholding": True, "trained_betas": None, "variance_type": "learned_range",
}  # fmt: skip
KANDINSKY_PRIOR = {
    "_class_name": "UnCLIPScheduler", "_diffusers_version": "0.17.0.dev0", "clip_sample": True,
    "clip_sample_range": 5.0, "num_train_timesteps": 1000, "prediction_type": "sample",
    "variance_type": "fixed_small_log",
}  # fmt: skip
PUBLISHED = [
    STABLE_DIFFUSION_15, STABLE_DIFFUSION_21, STABLE_DIFFUSION_XL, STABLE_DIFFUSION_3, FLUX, SANA, DEEPFLOYD_IF,
    KANDINSKY_PRIOR,
]  # fmt: skip


def write(folder, values, table=None):
    (folder / "scheduler_config.json").write_text(json.dumps(values))
    if table is not None:
        np.save(folder / "alphas_cumprod.npy", table)
    return folder


@pytest.mark.parametrize("values", PUBLISHED, ids=lambda values: values["_class_name"])
def test_published_configs_are_read(values, tmp_path):
    config = read_config(write(tmp_path, values))
    assert config == read_config(tmp_path / "scheduler_config.json")
    assert config.class_name == values["_class_name"]
    mu = 0.7 if values.get("use_dynamic_shifting") else None
    assert len(open_scheduler(config, 6, mu=mu).timesteps) in (6, 7)


def test_what_diffusers_saves_is_read(tmp_path):
    for name, row in SCHEDULERS.items():
        if name == "LMSDiscreteScheduler":  # needs scipy
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(diffusers, name)().save_pretrained(tmp_path)
        assert read_config(tmp_path).settings == row.settings()


REFUSED = [
    ({**STABLE_DIFFUSION_15, "sampler_boost": 2}, "unknown field sampler_boost"),
    ({**STABLE_DIFFUSION_15, "_private": 2}, "unknown field _private"),
    ({"beta_start": 0.1}, "no _class_name; supported are DDIMScheduler"),
    ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler, which is not supported; supported are DDIMScheduler"),
    ({"_class_name": ["DDIMScheduler"]}, "is not supported"),
    ({**STABLE_DIFFUSION_XL, "timestep_spacing": "even"}, "timestep_spacing 'even' is not supported: .*'linspace'"),
    ({**STABLE_DIFFUSION_XL, "use_beta_sigmas": True}, "use_beta_sigmas True is not supported"),
    ({**STABLE_DIFFUSION_XL, "beta_schedule": "exp"}, "beta_schedule 'exp' is not supported: .*'linear'"),
    ({**STABLE_DIFFUSION_XL, "beta_start": "small"}, "beta_start 'small' is not supported"),
    ({**STABLE_DIFFUSION_XL, "use_karras_sigmas": True, "use_exponential_sigmas": True}, "only one of"),
    ({**STABLE_DIFFUSION_XL, "num_train_timesteps": 0}, "num_train_timesteps 0 is not supported"),
    ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large_log"}, "variance_type 'fixed_large_log'"),
    ({"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "sample"}, "prediction_type 'sample'"),
    ({"_class_name": "UniPCMultistepScheduler", "solver_p": {}}, "solver_p"),
    ({"_class_name": "UniPCMultistepScheduler", "predict_x0": False}, "predict_x0 false needs final_sigmas_type"),
    ({"_class_name": "UniPCMultistepScheduler", "lower_order_final": False}, "lower_order_final false needs"),
    ({"_class_name": "UniPCMultistepScheduler", "shift_terminal": 0.1}, "shift_terminal needs use_flow_sigmas"),
    ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "needs final_sigmas_type"),
    ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 4}, "solver_order 4 is not supported"),
    (
        {"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 3,
         "solver_type": "heun"},
        "heun diverges",
    ),
    ({**STABLE_DIFFUSION_XL, "beta_start": 0.0}, "beta_start 0.0 is not supported"),
    ({**STABLE_DIFFUSION_XL, "trained_betas": []}, "trained_betas"),
    ({**STABLE_DIFFUSION_XL, "beta_end": float("nan")}, "beta_end nan is not supported"),
    ({**STABLE_DIFFUSION_XL, "sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min must be below sigma_max"),
    ({**FLUX, "max_image_seq_len": 256}, "base_image_seq_len must be below"),
    ({**FLUX, "max_shift": float("inf")}, "max_shift inf is not supported"),
    ({**STABLE_DIFFUSION_3, "shift_terminal": 1.0}, "shift_terminal 1.0 is not supported"),
    ({**SANA, "use_karras_sigmas": True}, "use_flow_sigmas goes without use_karras_sigmas"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "words"), REFUSED)
def test_what_is_not_understood_is_refused_by_name(values, words, tmp_path):
    with pytest.raises(BundleFormatError, match=words):
        read_config(write(tmp_path, values))


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"{", b"\xff\xfe", b"[" * 100000])
def test_a_file_that_is_no_config_is_refused(content, tmp_path):
    (tmp_path / "scheduler_config.json").write_bytes(content)
    with pytest.raises(BundleFormatError, match=r"scheduler_config\.json is not"):
        read_config(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BundleError, match="cannot read"):
        read_config(tmp_path)


def test_the_bundles_table_is_used(tmp_path):
    table = theirs_of(STABLE_DIFFUSION_XL).alphas_cumprod.numpy()
    nudged = table * np.float32(1 - 3e-7)
    config = read_config(write(tmp_path, STABLE_DIFFUSION_XL, nudged))
    assert np.array_equal(table_of(config), nudged)
    # It follows the betas to another scheduler, and is left behind by one that rescales them.
    assert np.array_equal(table_of(switch(config, "ddim")), nudged)
    rescaled = parse_config({**config.values, "_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True})
    assert switch(with_table(rescaled, table_of(rescaled)), "pndm").alphas_cumprod is None


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda table: table[:-1], "float32 .1000."),
        (lambda table: table.astype(np.float64), "float32 .1000."),
        (lambda table: np.where(np.arange(1000) == 7, np.nan, table).astype(np.float32), "not the table"),
        (lambda table: table**2, "not the table"),
        (lambda table: np.array([object()], object), "not a table"),
    ],
)
def test_a_table_that_is_not_the_configs_is_refused(spoil, words, tmp_path):
    table = theirs_of(STABLE_DIFFUSION_XL).alphas_cumprod.numpy()
    with pytest.raises(BundleFormatError, match=words):
        read_config(write(tmp_path, STABLE_DIFFUSION_XL, spoil(table)))


def test_a_table_that_is_cut_off_is_refused(tmp_path):
    write(tmp_path, STABLE_DIFFUSION_XL, np.zeros(1000, np.float32))
    path = tmp_path / "alphas_cumprod.npy"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BundleFormatError, match="not a table"):
        read_config(tmp_path)


BETA_NAMES = sorted(BY_NAME.keys() - {"flow-euler", "lms", "lms-karras"})  # LMS needs scipy in diffusers


@pytest.mark.parametrize("name", BETA_NAMES)
@pytest.mark.parametrize("values", [STABLE_DIFFUSION_15, STABLE_DIFFUSION_21, STABLE_DIFFUSION_XL])
def test_names_make_what_from_config_makes(name, values):
    row = BY_NAME[name]
    if row.class_name == values["_class_name"] and not row.fields:
        assert switch(parse_config(values), name) == parse_config(values)
        return
    expected = dict(theirs_of(values, row.class_name, **row.fields).config)
    found = switch(parse_config(values), name).settings
    for field, value in found:
        if field in ("sigma_min", "sigma_max"):
            continue
        want = expected[field]
        assert value == (tuple(want) if isinstance(want, list) else want), field


def test_a_flow_model_takes_other_solvers():
    """As diffusers documents it for them: with use_flow_sigmas, flow_prediction and the model's shift."""
    for name in ("unipc", "dpm++2m", "dpm++2m-sde", "dpm++2s"):
        config = switch(parse_config(STABLE_DIFFUSION_3), name)
        row = BY_NAME[name]
        fields = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0, **row.fields}
        expected = {"_class_name": row.class_name, **fields}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, samples, _, _ = theirs(expected, 6)
        assert relative(samples[-1], ours({**config.values, "_class_name": row.class_name}, 6)[1][-1]) <= 1e-5
    back = switch(parse_config(SANA), "flow-euler")
    assert back.settings == parse_config(STABLE_DIFFUSION_3).settings


@pytest.mark.parametrize(
    ("values", "name", "words"),
    [
        (STABLE_DIFFUSION_3, "ddim", "does not fit a model with FlowMatchEulerDiscreteScheduler; use one of dpm"),
        (STABLE_DIFFUSION_15, "flow-euler", "does not fit a model with PNDMScheduler; use one of ddim"),
        (KANDINSKY_PRIOR, "ddim", "does not fit a model with UnCLIPScheduler; leave the scheduler as it is"),
        (STABLE_DIFFUSION_15, "ddimm", "unknown scheduler ddimm; known are ddim"),
        (
            {**STABLE_DIFFUSION_21, "prediction_type": "sample"},
            "euler-a",
            "cannot take over .*prediction_type 'sample'",
        ),
    ],
)
def test_schedulers_that_do_not_fit_are_refused(values, name, words):
    with pytest.raises(RequestError, match=words):
        switch(parse_config(values), name)


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        (STABLE_DIFFUSION_15, {"steps": 0}, "steps is 0"),
        (STABLE_DIFFUSION_15, {"steps": 1001}, "1001 steps exceed the 1000 timesteps"),
        (STABLE_DIFFUSION_15, {"steps": 1000}, "timestep 1000 is outside the 1000 timesteps"),
        (STABLE_DIFFUSION_15, {"steps": 4, "strength": 0.2}, "leaves none of 4 steps; use at least 5 steps"),
        (STABLE_DIFFUSION_15, {"steps": 4, "strength": 0.0}, "strength is 0"),
        (STABLE_DIFFUSION_15, {"steps": 4, "strength": 1.5}, "strength is 1.5"),
        (STABLE_DIFFUSION_15, {"steps": 4, "eta": 0.5}, "PNDMScheduler takes no eta; it takes steps, strength"),
        (STABLE_DIFFUSION_21, {"steps": 4, "eta": -1.0}, "eta is -1"),
        (STABLE_DIFFUSION_21, {"steps": 2, "timesteps": [9, 3]}, "DDIMScheduler takes no timesteps; it takes eta"),
        (STABLE_DIFFUSION_XL, {"steps": 2, "timesteps": [9]}, "timesteps has 1 values; 2 steps need 2"),
        (STABLE_DIFFUSION_XL, {"steps": 2, "sigmas": [9.0, 3.0]}, "sigmas has 2 values; 2 steps need 3"),
        (STABLE_DIFFUSION_XL, {"steps": 2, "timesteps": [3, 9]}, "descending"),
        (STABLE_DIFFUSION_XL, {"steps": 1, "timesteps": [float("nan")]}, "finite"),
        (STABLE_DIFFUSION_XL, {"steps": 1, "timesteps": [9], "sigmas": [9.0, 0.0]}, "timesteps or sigmas"),
        ({**STABLE_DIFFUSION_XL, "use_karras_sigmas": True}, {"steps": 1, "timesteps": [9]}, "use_karras_sigmas"),
        (STABLE_DIFFUSION_3, {"steps": 2, "mu": 1.0}, "only where the config says use_dynamic_shifting"),
        (FLUX, {"steps": 2}, "needs mu"),
        (FLUX, {"steps": 2, "mu": float("inf")}, "mu is inf"),
        (
            {"_class_name": "UniPCMultistepScheduler", "timestep_spacing": "leading"},
            {"steps": 1000},
            "need 1001 timesteps",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": 99.0, "timestep_spacing": "trailing"},
            {"steps": 3},
            "leaves no timesteps",
        ),
        (SANA, {"steps": 2, "mu": 1.0}, "use_dynamic_shifting"),
        ({"_class_name": "LCMScheduler"}, {"steps": 51}, "51 steps exceed the 50"),
        ({"_class_name": "LCMScheduler"}, {"steps": 26, "respaced": True, "strength": 0.5}, "26 steps exceed the 25"),
        ({"_class_name": "LCMScheduler"}, {"steps": 2, "original_steps": 2000}, "more than the model's 1000"),
        (
            {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            {"steps": 2},
            "noise alone",
        ),
    ],
)
def test_requests_that_cannot_be_served_are_refused(values, options, words):
    with pytest.raises(RequestError, match=words):
        open_scheduler(parse_config(values), **options)


@pytest.mark.parametrize("steps", [61, 103, 499])
def test_trailing_timesteps_are_as_many_as_steps(steps):
    # Rounding makes numpy's arange, and so diffusers, one longer here.
    timesteps = open_scheduler(parse_config({**STABLE_DIFFUSION_XL, "timestep_spacing": "trailing"}), steps).timesteps
    assert len(timesteps) == steps
    assert timesteps[0] == 999
    assert timesteps[-1] >= 0
