"""The numpy schedulers against diffusers', over whole trajectories."""

from __future__ import annotations

import importlib
import inspect
import types
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers_trajectories import SD, SHAPE, NotFinite, config_of, denoise, relative, start, theirs_of, worst
from fmedge_runtimes.errors import BundleFormatError, RequestError
from fmedge_runtimes.schedulers import SCHEDULERS, mu_of, open_scheduler, parse_config, table_of
from fmedge_runtimes.schedulers.registry import FOREIGN_FIELDS
from hypothesis import assume, given, settings
from hypothesis import strategies as st

diffusers.logging.set_verbosity_error()
# Without scipy diffusers shows a stand-in for it.
LMS = importlib.import_module("diffusers.schedulers.scheduling_lms_discrete")

KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}
V, CLEAN = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
DEFAULT_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {"rescale_betas_zero_snr": True, **V, "timestep_spacing": "trailing"}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
LU = {"use_lu_lambdas": True}
RANGE = {"sigma_min": 0.1, "sigma_max": 9.0}
SPACINGS = [{"timestep_spacing": name} for name in ("leading", "linspace", "trailing")]
BETAS = {"trained_betas": [0.001 + 0.0002 * i for i in range(100)], "num_train_timesteps": 100}

COMMON = [{}, DEFAULT_BETAS, *SPACINGS, V, COSINE, BETAS, {"timestep_spacing": "leading", "steps_offset": 1}]
NOISY, NOISY_SDE = ({"algorithm_type": name, **SIGMA_MIN} for name in ("dpmsolver", "sde-dpmsolver"))
SDE = {"algorithm_type": "sde-dpmsolver++"}
HEUN, ORDER_1, ORDER_3 = {"solver_type": "heun"}, {"solver_order": 1}, {"solver_order": 3}
PREDICT_NOISE = {"predict_x0": False, **SIGMA_MIN}

# On top of Stable Diffusion's betas, unless they are set.
CONFIGS = {
    "DDIMScheduler": [
        *COMMON, CLEAN, ZERO_SNR, THRESHOLD, {"clip_sample": False}, {"clip_sample_range": 0.5},
        {"set_alpha_to_one": False, "clip_sample": False}],
    "DDPMScheduler": [
        *COMMON, CLEAN, ZERO_SNR, THRESHOLD, {"clip_sample": False}, {"beta_schedule": "sigmoid"},
        {"beta_schedule": "laplace"}, {"variance_type": "fixed_small_log"}, {"variance_type": "fixed_large"}],
    "PNDMScheduler": [{**fields, "skip_prk_steps": True} for fields in (*COMMON, {"set_alpha_to_one": True})],
    "EulerDiscreteScheduler": [
        *COMMON, CLEAN, {"prediction_type": "original_sample"}, ZERO_SNR, KARRAS, EXPONENTIAL, {**KARRAS, **RANGE},
        SIGMA_MIN, {"interpolation_type": "log_linear"}, {"timestep_type": "continuous", **V}],
    "EulerAncestralDiscreteScheduler": [*COMMON, ZERO_SNR],
    "HeunDiscreteScheduler": [
        *COMMON, CLEAN, KARRAS, EXPONENTIAL, {"clip_sample": True}, {"beta_schedule": "exp"}],
    "DPMSolverMultistepScheduler": [
        *COMMON, CLEAN, ZERO_SNR, THRESHOLD, KARRAS, EXPONENTIAL, LU, FLOW, SIGMA_MIN, HEUN, ORDER_1, ORDER_3,
        {**COSINE, **KARRAS}, {**KARRAS, **ORDER_3}, {"lower_order_final": False},
        {"euler_at_final": True, **SIGMA_MIN},
        {"lambda_min_clipped": -5.1, **COSINE}, NOISY, {**NOISY, **HEUN}, {**NOISY, **ORDER_3}, {**NOISY, **V},
        {**NOISY, **CLEAN}, {**NOISY, **THRESHOLD}, SDE, {**SDE, **HEUN}, {**SDE, **KARRAS}, {**SDE, **ORDER_3},
        {**SDE, **FLOW}, NOISY_SDE, {**NOISY_SDE, **HEUN}, {"solver_type": "logrho"},
        {"algorithm_type": "deis", **SIGMA_MIN},
        {**FLOW, **SIGMA_MIN}, {**FLOW, "prediction_type": "epsilon"}],
    "DPMSolverSinglestepScheduler": [
        {}, DEFAULT_BETAS, V, CLEAN, COSINE, BETAS, THRESHOLD, KARRAS, EXPONENTIAL, FLOW, SIGMA_MIN, HEUN, ORDER_1,
        ORDER_3,
        {**ORDER_3, **HEUN}, {"lower_order_final": True}, {**ORDER_3, "lower_order_final": True, **SIGMA_MIN},
        {"lambda_min_clipped": -5.1, **COSINE},
        NOISY, {**NOISY, **HEUN, **ORDER_3}, {**NOISY, **ORDER_3}, {**NOISY, **HEUN}, SDE, {**SDE, **HEUN},
        {**SDE, **ORDER_3}],
    "UniPCMultistepScheduler": [
        *COMMON, CLEAN, ZERO_SNR, THRESHOLD, KARRAS, EXPONENTIAL, FLOW, SIGMA_MIN, ORDER_1, ORDER_3,
        {"solver_type": "bh1", **SIGMA_MIN}, {"disable_corrector": [0, 2]}, {"lower_order_final": False, **SIGMA_MIN},
        PREDICT_NOISE, {**PREDICT_NOISE, **V}, {**PREDICT_NOISE, **CLEAN}, {**PREDICT_NOISE, **ORDER_3},
        {**FLOW, **KARRAS}, {**FLOW, "shift_terminal": 0.1}, {**FLOW, **SIGMA_MIN}, {**KARRAS, **SIGMA_MIN},
        {**KARRAS, **RANGE}, {"solver_type": "midpoint"}],
    "LCMScheduler": [
        {}, V, CLEAN, COSINE, {"beta_schedule": "linear"}, THRESHOLD, {"clip_sample": True},
        {"original_inference_steps": 100}, {"timestep_scaling": 2.0}, ZERO_SNR],
    "FlowMatchEulerDiscreteScheduler": [
        {}, {"shift": 3.0}, {"shift": 3.0, "shift_terminal": 0.02}, KARRAS, EXPONENTIAL, {"invert_sigmas": True},
        {"stochastic_sampling": True, "shift": 3.0}, {"num_train_timesteps": 200}],
    "UnCLIPScheduler": [
        {}, CLEAN, {"clip_sample": False}, {"clip_sample_range": 5.0, **CLEAN}, {"num_train_timesteps": 100}],
}  # fmt: skip


def with_betas(name, fields):
    betas = {} if name in ("FlowMatchEulerDiscreteScheduler", "UnCLIPScheduler") else SD
    return {"_class_name": name, **betas, **fields}


PLAIN = {name: with_betas(name, {}) for name in CONFIGS}
PLAIN["PNDMScheduler"]["skip_prk_steps"] = True
CASES = [pytest.param(with_betas(name, row), id=f"{name}-{row}") for name, rows in CONFIGS.items() for row in rows]


def bound_of(values):
    """1e-5 of a standard deviation, and more where rounding is amplified.

    The first level divides by the signal: 1/15 with Stable Diffusion's betas, 1/157 with the default ones, 1/4096 where
    the signal is zero. torch's own square root is not rounded correctly there.
    """
    if values.get("rescale_betas_zero_snr") and values["_class_name"].startswith("Euler"):
        return 5e-3
    if values.get("beta_schedule") == "exp":
        return 1e-3
    if values["_class_name"] == "HeunDiscreteScheduler" and values.get("prediction_type") == "sample":
        return 5e-5
    if "timestep_scaling" in values:
        return 2e-5
    return 1e-4 if DEFAULT_BETAS.items() <= values.items() else 1e-5


def check(values, steps, **options):
    sample, clean = worst(values, steps, **options)
    assert sample <= bound_of(values)
    assert clean <= 2 * bound_of(values)


@pytest.mark.parametrize("counts", [(1, 5), pytest.param((2, 20), marks=pytest.mark.medium)])
@pytest.mark.parametrize("values", CASES)
def test_trajectories(values, counts):
    for steps in counts:
        if steps == 1 and (values["_class_name"] == "UnCLIPScheduler" or "shift_terminal" in values):
            with pytest.raises(RequestError, match="at least 2 steps"):
                open_scheduler(parse_config(values), 1)
            continue
        check(values, steps)


@pytest.mark.parametrize(
    "fields", [ORDER_3, {**ORDER_3, **SIGMA_MIN}, {**ORDER_3, **SIGMA_MIN, "lower_order_final": True}]
)
@pytest.mark.parametrize("steps", [3, 4, 6, 14, 15, 16])
def test_orders_at_the_end_depend_on_the_number_of_steps(fields, steps):
    check(with_betas("DPMSolverSinglestepScheduler", fields), steps)
    check(with_betas("DPMSolverMultistepScheduler", fields), steps)


@pytest.mark.parametrize("fields", [{}, V, {"set_alpha_to_one": True}, {"timestep_spacing": "linspace"}])
@pytest.mark.parametrize("steps", [4, 5, 20])
def test_pndm_with_the_warm_up_of_runge_and_kutta(fields, steps):
    check(with_betas("PNDMScheduler", fields), steps)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_pndm_refuses_a_warm_up_that_does_not_fit(steps):
    config = parse_config(with_betas("PNDMScheduler", {}))
    with pytest.raises(RequestError, match="at least 4 steps"):
        open_scheduler(config, steps)
    with pytest.raises(RequestError, match="strength 1"):
        open_scheduler(config, 10, strength=0.5)


@pytest.fixture
def quadrature(monkeypatch):
    """scipy's integral, which diffusers' LMS needs, by Gauss and Legendre's rule: exact for its polynomials."""
    nodes, weights = np.polynomial.legendre.leggauss(8)

    def quad(function, low, high, epsrel):
        low, high = float(low), float(high)
        middle, half = (low + high) / 2, (high - low) / 2
        total = sum(weight * float(function(middle + half * node)) for node, weight in zip(nodes, weights, strict=True))
        return (total * half, 0.0)

    monkeypatch.setattr(LMS, "integrate", types.SimpleNamespace(quad=quad), raising=False)
    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", LMS.LMSDiscreteScheduler)


@pytest.mark.parametrize("fields", [*COMMON, CLEAN, KARRAS, EXPONENTIAL])
def test_lms(fields, quadrature):
    for steps in (1, 2, 9):
        check(with_betas("LMSDiscreteScheduler", fields), steps)


def test_lms_starts_an_image_at_order_1():
    # diffusers takes weights of order 4 for the one slope that is there.
    lms, euler = (
        open_scheduler(parse_config(with_betas(name, {})), 10, strength=0.5)
        for name in ("LMSDiscreteScheduler", "EulerDiscreteScheduler")
    )
    output, sample = start(1), start(2)
    first = lms.step(output, 0, sample, start).sample
    assert relative(euler.step(output, 0, sample, start).sample, first) <= 1e-6
    assert relative(euler.step(output, 1, first, start).sample, lms.step(start(3), 1, first, start).sample) > 1e-3


LEARNED = [
    ("DDPMScheduler", {"variance_type": "learned"}),
    ("DDPMScheduler", {"variance_type": "learned_range"}),
    # DeepFloyd IF's.
    ("DDPMScheduler", {"variance_type": "learned_range", **COSINE, **THRESHOLD}),
    ("UnCLIPScheduler", {"variance_type": "learned_range"}),
    ("DPMSolverMultistepScheduler", {"variance_type": "learned_range"}),
    ("DPMSolverMultistepScheduler", {"variance_type": "learned", **NOISY}),
    ("DPMSolverSinglestepScheduler", {"variance_type": "learned_range"}),
]


@pytest.mark.parametrize(("name", "fields"), LEARNED)
def test_learned_variance(name, fields):
    check(with_betas(name, fields), 5, channels=2)


@pytest.mark.parametrize(("name", "fields"), [*LEARNED[:2], LEARNED[3]])
def test_a_learned_variance_that_is_not_there_is_refused(name, fields):
    scheduler = open_scheduler(parse_config(with_betas(name, fields)), 5)
    with pytest.raises(RequestError, match="no channels for it"):
        scheduler.step(start(), 0, start(), start)


@pytest.mark.parametrize("name", sorted(PLAIN.keys() - {"UnCLIPScheduler"}))  # which no image-to-image pipeline uses
@pytest.mark.parametrize("strength", [0.3, 0.77, 0.999])
def test_images_start_at_a_strength(name, strength):
    check(PLAIN[name], 11, strength=strength, image=np.tanh(start(5)))


def test_inpainting_noises_the_image_to_each_timestep():
    image, noise = np.tanh(start(5)), start(6)
    for values in PLAIN.values():
        ours, theirs = open_scheduler(parse_config(values), 6), theirs_of(values)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.set_timesteps(6)
        for index, timestep in enumerate(theirs.timesteps):
            pair = torch.from_numpy(image), torch.from_numpy(noise)
            if hasattr(theirs, "_begin_index"):
                theirs._begin_index = index
            if "Flow" in values["_class_name"]:
                expected = theirs.scale_noise(pair[0], timestep[None], pair[1])
            else:
                expected = theirs.add_noise(*pair, timestep[None])
            assert relative(expected.numpy(), ours.add_noise(image, noise, index)) <= 2e-6


OPTIONS = [
    ("DDIMScheduler", {}, 5, {"eta": 0.6}),
    ("DDIMScheduler", {}, 5, {"eta": 1.0}),
    ("DDPMScheduler", {}, 3, {"timesteps": [900, 400, 20]}),
    ("EulerDiscreteScheduler", {}, 3, {"timesteps": [900, 400.5, 20]}),
    ("EulerDiscreteScheduler", {}, 3, {"sigmas": [14.6, 3.0, 0.7, 0.0]}),
    ("HeunDiscreteScheduler", {}, 3, {"timesteps": [900, 400, 20]}),
    ("DPMSolverMultistepScheduler", {}, 4, {"timesteps": [900, 700, 400, 20]}),
    ("DPMSolverSinglestepScheduler", {}, 3, {"timesteps": [900, 400, 20]}),
    ("LCMScheduler", {}, 3, {"timesteps": [899, 399, 19]}),
    ("LCMScheduler", {}, 3, {"original_steps": 25}),
    ("LCMScheduler", {}, 4, {"respaced": True, "strength": 0.5, "image": np.tanh(start(5))}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 3, {"sigmas": [1.0, 0.7, 0.2]}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 3, {"timesteps": [1000.0, 700.0, 200.0]}),
    ("FlowMatchEulerDiscreteScheduler", {}, 3, {"sigmas": [1.0, 0.7, 0.2], "timesteps": [1000.0, 700.0, 200.0]}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, 3, {"sigmas": [1.0, 0.7, 0.2], "mu": 0.8}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, 20,
     {"mu": 1.15, "strength": 0.6, "image": start(5)}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "time_shift_type": "linear"}, 5, {"mu": 2.0}),
    ("UniPCMultistepScheduler", FLOW, 3, {"sigmas": np.array([0.99, 0.7, 0.2])}),
    ("UniPCMultistepScheduler", {**FLOW, "use_dynamic_shifting": True}, 5, {"mu": 0.8}),
    ("UniPCMultistepScheduler", {**FLOW, "use_dynamic_shifting": True, "time_shift_type": "linear"}, 5, {"mu": 2.0}),
    ("DPMSolverMultistepScheduler", {**FLOW, "use_dynamic_shifting": True}, 5, {"mu": 0.8}),
    ("DPMSolverSinglestepScheduler", {**FLOW, "use_dynamic_shifting": True}, 5, {"mu": 0.8}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "steps", "options"), OPTIONS)
def test_options(name, fields, steps, options):
    check(with_betas(name, fields), steps, **options)


def test_the_shift_grows_with_the_image():
    flow = "FlowMatchEulerDiscreteScheduler"
    dynamic = parse_config({"_class_name": flow, "use_dynamic_shifting": True, "max_shift": 1.3}).settings
    for tokens in (64, 256, 1024, 4096):
        assert mu_of(dynamic, tokens) == pytest.approx(0.5 + (tokens - 256) / (4096 - 256) * (1.3 - 0.5))
    assert mu_of(parse_config({"_class_name": flow}).settings, 256) is None


@pytest.mark.parametrize("values", [pytest.param(values, id=name) for name, values in PLAIN.items()])
def test_rows_depend_on_nothing_else_in_the_batch_and_on_no_shape(values):
    fields = (
        [{}, {"thresholding": True}]
        if "thresholding" in SCHEDULERS[values["_class_name"]].settings.model_fields
        else [{}]
    )
    for more in fields:
        config = parse_config({**values, **more})
        whole = run(config, start())
        assert np.array_equal(run(config, start()[1:]), whole[1:])
        assert np.array_equal(run(config, start().reshape(SHAPE[0], -1)).reshape(SHAPE), whole)


def run(config, sample, steps=4):
    scheduler = open_scheduler(config, steps)
    for index, timestep in enumerate(scheduler.timesteps):
        output = denoise(scheduler.scale(sample, index), timestep)
        sample = scheduler.step(output, index, sample, lambda sample=sample: sample * np.float32(0.3)).sample
    return sample


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_configs(data):
    """Any fields together, any number of steps, any strength."""
    name = data.draw(st.sampled_from(sorted(PLAIN)))
    rows = data.draw(st.lists(st.sampled_from(CONFIGS[name]), min_size=1, max_size=3))
    steps = data.draw(st.integers(2, 30))
    strength = 1.0 if name == "UnCLIPScheduler" else data.draw(st.sampled_from([1.0, 1.0, 0.5, 0.8]))
    values = with_betas(name, {key: value for row in rows for key, value in row.items()})
    if name == "PNDMScheduler":
        values["skip_prk_steps"] = True
    assume(values.get("beta_schedule") != "exp" and not values.get("rescale_betas_zero_snr"))
    # diffusers mixes up its tables there and stops.
    assume(not (name.endswith("SinglestepScheduler") and "thresholding" in values and values.get("algorithm_type")))
    try:
        config_of(values)
    except BundleFormatError:
        assume(False)
    assume(steps <= min(values.get("num_train_timesteps", 1000), values.get("original_inference_steps", 50)))
    first = int(np.max(open_scheduler(parse_config(values), steps).timesteps))
    table = table_of(parse_config(values))
    assume(len(table) == 0 or table[min(first, len(table) - 1)] > 2e-5)  # else rounding is amplified beyond comparison
    image = np.tanh(start(5)) if strength < 1 else None
    try:
        sample, _ = worst(values, steps, strength=strength, image=image)
    except NotFinite:
        return
    assert sample <= 10 * bound_of(values)


NOT_FINITE = [
    # An empty last interval: 0 / 0.
    ("DPMSolverMultistepScheduler", {**KARRAS, **HEUN, **SIGMA_MIN, "lower_order_final": False}),
    ("UniPCMultistepScheduler", {**KARRAS, **ORDER_3, **SIGMA_MIN, "lower_order_final": False}),
    # An infinite last interval: infinity * 0.
    ("UniPCMultistepScheduler", {"solver_type": "bh1"}),
]


@pytest.mark.parametrize(("name", "fields"), NOT_FINITE)
def test_results_are_finite_where_diffusers_are_not(name, fields):
    with pytest.raises(NotFinite):
        worst(with_betas(name, fields), 20)


def test_every_field_of_diffusers_is_declared():
    for name, row in SCHEDULERS.items():
        module = importlib.import_module(getattr(diffusers, name).__module__) if "LMS" not in name else LMS
        theirs = inspect.signature(getattr(module, name).__init__).parameters
        ours = row.settings.model_fields
        assert set(theirs) - {"self"} <= set(ours), name
        # Karras's range reaches the other solvers through the fields that diffusers keeps.
        assert set(ours) - set(theirs) <= {"sigma_min", "sigma_max"}, name
        for field, parameter in theirs.items():
            if field != "self":
                expected = tuple(parameter.default) if isinstance(parameter.default, list) else parameter.default
                assert ours[field].default == expected, (name, field)


def test_fields_of_every_scheduler_for_the_same_models_are_known():
    names = {field for row in SCHEDULERS.values() for field in row.settings.model_fields}
    for item in KarrasDiffusionSchedulers:
        kind = getattr(diffusers, item.name)
        if not isinstance(kind, diffusers.utils.DummyObject):  # one that needs a package that is not here
            assert kind._get_init_keys(kind) - {"self"} <= names | FOREIGN_FIELDS, item.name
