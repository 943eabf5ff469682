"""An image model in use: batches, seeds, memory modes, threads, and everything that can go wrong."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.errors import BackendError, BundleError, GenerationCancelledError, RequestError
from fmedge_runtimes.image import ImageModel
from fmedge_runtimes.image_plan import plan_image
from fmedge_runtimes.parts import Parts
from image_models import SIDE, Opened, latents_of, stable_diffusion, stable_diffusion_xl, write_folder
from PIL import Image

QUICK = Diffusion(steps=2, guidance=4.0, seed=1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A scheduler that draws at every step: what is drawn for whom shows."""
    scheduler = EulerAncestralDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return write_folder(stable_diffusion(scheduler), tmp_path_factory.mktemp("sd"))


@pytest.fixture
def model(opened: Opened) -> ImageModel:
    opened.opened.clear()
    opened.sessions.clear()
    return opened.model()


def close_to(ours: Any, others: Any) -> bool:
    return bool(np.abs(ours.latents - others.latents).max() <= 1e-5 * others.latents.std())


LONG = "a very long prompt, about cats and dogs and what they do all day long"
MIXED = ["a red cat", LONG, "a red cat", "x (y:1.4) z", "dog", ""]


@pytest.mark.parametrize("options", [{"max_batch": 1}, {"max_batch": 2}, {"max_batch": 6}, {"mode": "sequential"}])
def test_an_image_is_the_same_in_any_batch(opened: Opened, model: ImageModel, options: dict[str, Any]) -> None:
    together = opened.model(**options).generate(MIXED, Diffusion(steps=3, guidance=4.0, seed=(1, 2, 3, 4, 5, 6)))
    assert [made.prompt for made in together] == MIXED
    for number, made in enumerate(together):
        alone = model.generate(MIXED[number], Diffusion(steps=3, guidance=4.0, seed=number + 1))[0]
        assert close_to(made, alone)
        assert (made.seed, made.prompt_index, made.index) == (number + 1, number, 0)


def test_seeds_count_up_and_are_drawn_if_none_is_given(model: ImageModel) -> None:
    made = model.generate(["a", "b"], Diffusion(steps=1, guidance=1.0, seed=5, n=3))
    assert [(image.prompt, image.seed, image.index) for image in made] == [
        (prompt, 5 + index, index) for prompt in "ab" for index in range(3)
    ]
    drawn = model.generate(["a", "a"], Diffusion(steps=1, guidance=1.0))
    assert drawn[0].seed != drawn[1].seed
    again = model.generate("a", Diffusion(steps=1, guidance=1.0, seed=drawn[1].seed))[0]
    assert close_to(again, drawn[1])
    assert model.generate([], QUICK) == []


def test_guidance_doubles_the_batch_and_none_does_not(opened: Opened, model: ImageModel) -> None:
    for guidance, rows in ((1.0, 3), (0.0, 3), (1.5, 6)):
        before = len(opened.sessions["unet"].rows) if "unet" in opened.sessions else 0
        made = model.generate(["a", "b", "c"], Diffusion(steps=2, guidance=guidance, seed=1))
        assert opened.sessions["unet"].rows[before:] == [rows, rows]
        assert made[0].stats.evaluations == 2
        assert made[0].stats.batch == 3


def test_equal_prompts_are_encoded_once(opened: Opened, model: ImageModel) -> None:
    model.generate(["cat"] * 3 + ["dog"], Diffusion(steps=1, guidance=4.0, seed=1, negative="cat"))
    # Of the prompts two differ, and all have one negative.
    assert opened.sessions["text_encoder"].rows == [2, 1]


def test_guidance_in_two_calls_where_memory_is_short(opened: Opened, model: ImageModel) -> None:
    bundle = model.bundle
    one, two = (plan_image(bundle, guided=guided).total("keep") for guided in (False, True))
    assert one < two
    short = opened.model(memory=(one + two) // 2)
    made = short.generate(["a", "b"], QUICK)
    assert set(opened.sessions["unet"].rows) == {1}
    assert len(opened.sessions["unet"].rows) == 2 * 2 * 2
    for ours, others in zip(made, model.generate(["a", "b"], QUICK), strict=True):
        assert close_to(ours, others)
    three = plan_image(bundle, batch=3, guided=True).total("keep")
    opened.model(memory=three).generate(["a"] * 4, QUICK)
    assert opened.sessions["unet"].rows == [6, 6, 2, 2]
    with pytest.raises(RequestError, match=f"{SIDE}x{SIDE} takes about .* memory allows"):
        opened.model(memory=one - 1)


def test_sequential_holds_one_part_at_a_time(opened: Opened) -> None:
    opened.opened.clear()
    model = opened.model("sequential", max_batch=1)
    alive: list[int] = []
    original = opened.open

    def counted(name: str) -> Any:
        session = original(name)
        alive.append(sum(not other.closed for other in opened.sessions.values()))
        return session

    model._parts._open = counted
    opened.sessions.clear()
    made = model.generate(["a", "b", "c"], QUICK)
    assert opened.opened == ["text_encoder", "unet", "vae_decoder"]
    assert alive == [1, 1, 1]
    assert all(session.closed for session in opened.sessions.values())
    assert len(made) == 3


def test_a_scheduler_by_name(opened: Opened, model: ImageModel) -> None:
    options = Diffusion(steps=4, guidance=4.0, seed=3, scheduler="dpm++2m-karras")
    made = model.generate("a red cat", options)[0]
    theirs = stable_diffusion(opened.pipeline.scheduler)
    theirs.scheduler = DPMSolverMultistepScheduler.from_config(theirs.scheduler.config, use_karras_sigmas=True)
    expected = latents_of(
        theirs, "a red cat", seed=3, num_inference_steps=4, guidance_scale=4.0, height=SIDE, width=SIDE
    )
    assert np.abs(made.latents - expected).max() <= 1e-4 * expected.std()
    assert made.settings.scheduler == "dpm++2m-karras"


def test_updates_and_previews(model: ImageModel) -> None:
    updates = list(model.stream(["a", "b"], Diffusion(steps=4, guidance=1.0, seed=1, preview_every=2)))
    assert [(update.stage, update.done, update.total) for update in updates if update.stage == "denoise"] == [
        ("denoise", step, 4) for step in (1, 2, 3, 4)
    ]
    shown = [update.previews for update in updates if update.previews]
    assert [len(previews) for previews in shown] == [2, 2]
    finished = updates[-1].finished
    assert [image.prompt for image in finished] == ["a", "b"]
    assert {preview.size for preview in shown[-1]} == {(SIDE // 2, SIDE // 2)}


def test_previews_have_the_colours_of_the_image(opened: Opened) -> None:
    """For a decoder that makes each pixel's colour of its latent, a preview is the image, but smaller."""
    colours = torch.tensor([[0.3, -0.2, 0.1, 0.0], [0.1, 0.2, -0.3, 0.1], [0.0, 0.1, 0.1, -0.4]])

    def decode(latent_sample: torch.Tensor) -> dict[str, torch.Tensor]:
        image = torch.einsum("oc,bchw->bohw", colours, latent_sample) * opened.pipeline.vae.config.scaling_factor + 0.1
        return {"sample": image.repeat_interleave(2, 2).repeat_interleave(2, 3)}

    model = opened.model()
    model._parts.load()
    opened.sessions["vae_decoder"].forward = decode
    *_, last, decoded, end = model.stream("a", Diffusion(steps=2, guidance=1.0, seed=1, preview_every=1))
    small = np.asarray(end.finished[0].image)[::2, ::2].astype(int)
    assert decoded.stage == "decode"
    assert np.abs(np.asarray(last.previews[0], int) - small).max() <= 1
    assert small.std() > 10


def test_cancelled_from_another_thread(opened: Opened, model: ImageModel) -> None:
    cancel = threading.Event()

    def stop_at_the_second_step(update: Any) -> None:
        if (update.stage, update.done) == ("denoise", 2):
            threading.Thread(target=cancel.set).start()
            assert cancel.wait(10)

    with pytest.raises(GenerationCancelledError, match="cancelled"):
        model.generate("a", Diffusion(steps=20, guidance=1.0, seed=1), cancel=cancel, progress=stop_at_the_second_step)
    assert len(opened.sessions["unet"].rows) == 2
    assert len(model.generate("a", QUICK)) == 1


def test_threads_take_turns(opened: Opened, model: ImageModel) -> None:
    prompts = ["a", "bb", "ccc"]
    alone = [model.generate(prompt, QUICK)[0] for prompt in prompts]
    opened.sessions["unet"].rows.clear()
    found: dict[str, Any] = {}
    threads = [
        threading.Thread(target=lambda prompt=prompt: found.update({prompt: model.generate(prompt, QUICK)[0]}))
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(close_to(found[prompt], image) for prompt, image in zip(prompts, alone, strict=True))
    first = model.stream("a", QUICK)
    next(first)
    with pytest.raises(RequestError, match="a stream of this model is unfinished"):
        model.generate("b", QUICK)
    waiting = threading.Event()
    waiting.set()
    refused: list[Exception] = []

    def cancelled() -> None:
        try:
            model.generate("b", QUICK, cancel=waiting)
        except GenerationCancelledError as error:
            refused.append(error)

    thread = threading.Thread(target=cancelled)
    thread.start()
    thread.join()
    assert refused
    first.close()
    assert model.generate("b", QUICK)


def test_coroutines(opened: Opened, model: ImageModel) -> None:
    async def run() -> None:
        both = await asyncio.gather(model.agenerate("a", QUICK), model.agenerate(["b", "c"], QUICK))
        assert [len(images) for images in both] == [1, 2]
        opened.sessions["unet"].rows.clear()
        task = asyncio.create_task(model.agenerate("a", Diffusion(steps=500, guidance=1.0, seed=1)))
        while len(opened.sessions["unet"].rows) < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(opened.sessions["unet"].rows) < 500
        assert await model.agenerate("a", QUICK)

    asyncio.run(run())


def test_a_closed_model_says_so(opened: Opened, model: ImageModel) -> None:
    stream = model.stream("a", Diffusion(steps=5, guidance=1.0, seed=1))
    for update in stream:
        if update.stage == "denoise":
            model.close()
            break
    with pytest.raises(RequestError, match="is closed; load it again"):
        next(stream)
    with pytest.raises(RequestError, match="is closed; load it again"):
        model.generate("a", QUICK)
    assert all(session.closed for session in opened.sessions.values())


def not_finite(values: dict[str, np.ndarray]) -> None:
    for value in values.values():
        value.reshape(-1)[3] = np.inf


def constant(values: dict[str, np.ndarray]) -> None:
    for value in values.values():
        value.fill(0.25)


NOT_FINITE = "gave 1 of .* values that are not finite"


@pytest.mark.parametrize(
    ("part", "spoil", "words", "after"),
    [
        ("text_encoder", not_finite, f"text_encoder {NOT_FINITE}", 0),
        # The first call of a denoiser, and the later ones, whose output is bound.
        ("unet", not_finite, f"unet {NOT_FINITE}", 0),
        ("unet", not_finite, f"unet {NOT_FINITE}", 1),
        ("vae_decoder", not_finite, f"vae_decoder {NOT_FINITE}", 0),
        ("vae_encoder", not_finite, f"vae_encoder {NOT_FINITE}", 0),
        ("vae_decoder", constant, "vae_decoder gave an image of one colour", 0),
    ],
)
def test_no_image_of_nothing(
    opened: Opened, part: str, spoil: Callable[[dict[str, np.ndarray]], None], words: str, after: int
) -> None:
    model = opened.model()
    model._parts.load()
    session = opened.sessions[part]
    session.spoil = lambda values: spoil(values) if len(session.rows) > after else None
    with pytest.raises(BackendError, match=words):
        model.generate("a", Diffusion(steps=3, guidance=4.0, seed=1, image=Image.new("RGB", (SIDE, SIDE), "red")))


def test_latents_of_one_value_are_the_denoisers_fault(opened: Opened) -> None:
    model = opened.model()
    model._parts.load()
    session = opened.sessions["unet"]
    session.spoil = lambda values: values["out_sample"].fill(1e30)
    with pytest.raises(BackendError, match="unet gave one value everywhere"):
        model.generate("a", Diffusion(steps=1, guidance=1.0, seed=1, scheduler="ddim"))


def test_memory_that_a_graph_sees_is_nobody_elses(opened: Opened) -> None:
    """A graph that wrote where the latents lie would make wrong images without a word; here it spoils its inputs."""
    for guidance in (1.0, 4.0):
        options = Diffusion(steps=3, guidance=guidance, seed=1, scheduler="pndm")
        plain = opened.model().generate("a", options)[0]
        model = opened.model()
        model._parts.load()
        session = opened.sessions["unet"]
        run, held = session.run, []

        def spoiling(feeds: Any, results: Any, run: Any = run, held: Any = held) -> Any:
            for array in held:
                array.fill(np.nan)
            found = run(feeds, results)
            for name in ("sample", "timestep"):
                feeds[name].fill(np.nan)
            # What it gave is its own again at the next run.
            held[:] = [*results.values(), *found.values()]
            return found

        session.run = spoiling
        assert np.array_equal(model.generate("a", options)[0].latents, plain.latents)


PICTURE = Image.new("RGB", (SIDE, SIDE), "red")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "Diffusion.steps is 0; it must be at least 1"),
        ({"steps": True}, "Diffusion.steps is True"),
        ({"steps": 2000}, "2000 steps exceed the 1000 timesteps"),
        ({"guidance": -1.0}, "Diffusion.guidance is -1.0; it must be from 0"),
        ({"guidance": float("nan")}, "Diffusion.guidance is nan"),
        ({"seed": -1}, "Diffusion.seed is -1; it must be from 0"),
        ({"seed": (1, 2)}, "Diffusion.seed has 2 values for 1 prompts"),
        ({"negative": ["a", "b"]}, "Diffusion.negative has 2 values for 1 prompts"),
        ({"negative": 3}, "Diffusion.negative is 3; it must be a text"),
        ({"n": 0}, "Diffusion.n is 0; it must be from 1"),
        ({"height": 33}, "32x33 is no size for .* sides must be multiples of 2; the nearest is 32x32"),
        ({"height": 31, "width": 1}, "the nearest is 2x32"),
        ({"height": 0}, "Diffusion.height is 0; it must be at least 1"),
        ({"width": 2**20, "height": 2**20}, "1048576x1048576 has more than"),
        ({"scheduler": "magic"}, "unknown scheduler magic; known are .*euler"),
        ({"scheduler": "flow-euler"}, "the scheduler flow-euler does not fit"),
        ({"strength": 0.5}, "Diffusion.strength is 0.5 without image"),
        ({"strength": 1.5, "image": PICTURE}, "Diffusion.strength is 1.5; it must be above 0"),
        ({"strength": 0.1, "image": PICTURE}, "strength 0.1 leaves none of 2 steps"),
        ({"mask": PICTURE}, "Diffusion.mask is given without image"),
        ({"image": "nowhere.png"}, "Diffusion.image: there is no file nowhere.png"),
        ({"image": __file__}, "Diffusion.image: .*test_image_model.py is no image that can be read"),
        ({"image": 5}, "Diffusion.image is 5; it must be a file, or an image of Pillow"),
        ({"clip_skip": 4}, "Diffusion.clip_skip is 4, and text_encoder has 4 layers"),
        ({"clip_skip": -1}, "Diffusion.clip_skip is -1"),
        ({"guidance_rescale": 2.0}, "Diffusion.guidance_rescale is 2.0"),
        ({"tiny_vae": True}, "has no tiny_vae_decoder; leave it out"),
        ({"weights": 1}, "Diffusion.weights is 1; it must be true or false"),
        ({"preview_every": -1}, "Diffusion.preview_every is -1"),
    ],
)
def test_wrong_requests_are_refused_before_anything_runs(opened: Opened, options: dict[str, Any], words: str) -> None:
    opened.sessions.clear()
    model = opened.model()
    with pytest.raises(RequestError, match=words):
        model.generate("a", Diffusion(**{"steps": 2, "guidance": 1.0, "seed": 1, **options}))
    assert not opened.sessions
    assert not model._lock.locked()


def test_prompts_must_be_texts(model: ImageModel) -> None:
    with pytest.raises(RequestError, match="a prompt is 3; it must be a text"):
        model.generate([3], QUICK)


def test_an_unet_that_sees_a_mask_wants_one(tmp_path: Path) -> None:
    model = write_folder(stable_diffusion(in_channels=9), tmp_path).model()
    with pytest.raises(RequestError, match="its UNet wants an image and a mask"):
        model.generate("a", QUICK)


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: changed(folder / "model_index.json", _class_name="MagicPipeline"), "is a MagicPipeline, which"),
        (lambda folder: (folder / "model_index.json").write_text("[1]"), "model_index.json holds no JSON object"),
        (lambda folder: (folder / "model_index.json").write_text("{}"), "model_index.json names no _class_name"),
        (lambda folder: (folder / "unet/config.json").write_text("{"), "unet/config.json is not JSON"),
        (lambda folder: (folder / "unet/config.json").unlink(), "cannot read .*unet/config.json"),
        (lambda folder: changed(folder / "unet/config.json", in_channels="four"), "in_channels is 'four' and must be"),
        (lambda folder: changed(folder / "vae_decoder/config.json", scaling_factor=[]), "scaling_factor is .. and"),
        (lambda folder: changed(folder / "vae_decoder/config.json", scaling_factor=0), "scaling_factor is 0"),
        (
            lambda folder: changed(folder / "vae_decoder/config.json", block_out_channels=[]),
            "block_out_channels is .. and",
        ),
        (lambda folder: (folder / "tokenizer/tokenizer.json").write_text("{}"), "cannot be read as a tokenizer"),
        (lambda folder: changed(folder / "scheduler/scheduler_config.json", _class_name="Fast"), "is for Fast, which"),
        (lambda folder: changed(folder / "scheduler/scheduler_config.json", beta_schedule="x"), "beta_schedule 'x' is"),
    ],
)
def test_damaged_bundles_say_what_is_wrong(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    opened = write_folder(stable_diffusion(), tmp_path)
    damage(tmp_path)
    with pytest.raises(BundleError, match=words):
        opened.model().generate("a", QUICK)
    assert not opened.sessions


@pytest.mark.parametrize("part", ["unet", "vae_decoder", "text_encoder", "text_encoder_2"])
def test_a_missing_part_is_named(tmp_path: Path, part: str) -> None:
    opened = write_folder(stable_diffusion_xl(), tmp_path)
    del opened.makers[part]
    with pytest.raises(BundleError, match=f"has no {part}, which its pipeline needs"):
        opened.model()


def test_no_encoder_for_images(tmp_path: Path) -> None:
    opened = write_folder(stable_diffusion(), tmp_path)
    del opened.makers["vae_encoder"]
    with pytest.raises(BundleError, match="has no vae_encoder"):
        opened.model().generate("a", Diffusion(steps=2, image=PICTURE))


def test_a_graph_of_another_pipeline_is_named(opened: Opened, tmp_path: Path) -> None:
    xl = write_folder(stable_diffusion_xl(), tmp_path)
    model = xl.model()
    model._parts._open = lambda name: opened.open("unet") if name == "unet" else xl.open(name)
    with pytest.raises(BackendError, match="the graph of unet takes no text_embeds"):
        model.generate("a", QUICK)
    model._parts._open = lambda name: xl.open("vae_decoder" if name == "unet" else name)
    model._parts._kept.clear()
    with pytest.raises(BackendError, match="the graph of unet takes no sample, other than the pipeline does"):
        model.generate("a", QUICK)
    with pytest.raises(RequestError, match="there is no memory mode fast"):
        Parts(tmp_path, frozenset(), xl.open, "fast")
