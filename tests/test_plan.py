"""What a bundle takes and what fits is said before it is loaded, and is what it takes then."""

import fmedge_runtimes.load
import pytest
from fake_session import CONTEXT, HYBRID, PLAIN, WINDOWED, FakeSession, make_bundle, row_bytes, text_facts
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.manifest import write_manifest
from fmedge_runtimes.plan import MOST_SLOTS, plan
from fmedge_runtimes.row_cache import RowCache
from fmedge_runtimes.sampling import Sampling
from hypothesis import given, settings
from hypothesis import strategies as st

LAYERS = {"plain": PLAIN, "windowed": WINDOWED, "hybrid": HYBRID}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return {name: make_bundle(folder / name, layers=layers) for name, layers in LAYERS.items()}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("slots", "context"), [(1, 1), (3, 64), (3, 65), (2, CONTEXT)])
def test_the_cache_takes_what_was_said(bundles, name, slots, context):
    found = plan(bundles[name], slots, context)
    session = FakeSession(layers=LAYERS[name])
    cache = RowCache(session, text_facts(LAYERS[name]))
    cache.reserve(slots, context)
    assert found.cache + found.states == cache.nbytes(cache.rows, cache.capacity) == session.allocated
    assert (found.states > 0) == (name != "plain")
    assert found.weights == bundles[name].nbytes
    assert found.total == found.weights + found.working + found.cache + found.states
    assert (found.memory, found.largest_context, found.largest_slots, found.fits) == (None, None, None, True)


def test_the_whole_context_unless_less_is_asked_for(bundles):
    assert plan(bundles["plain"], 2) == plan(bundles["plain"], 2, CONTEXT)
    assert plan(bundles["plain"], 2).cache == row_bytes(2 * CONTEXT)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(LAYERS)),
    slots=st.integers(1, 20),
    context=st.integers(1, CONTEXT),
    memory=st.integers(0, 400_000),
)
def test_what_is_said_to_fit_fits_and_no_more_does(bundles, name, slots, context, memory):
    bundle = bundles[name]
    found = plan(bundle, slots, context, memory)
    assert found.fits == (found.total <= memory)
    if found.largest_context:
        assert plan(bundle, slots, found.largest_context, memory).fits
    if found.largest_context < CONTEXT:
        more = min(CONTEXT, (found.largest_context // 64 + 1) * 64)
        assert not plan(bundle, slots, more, memory).fits
    if found.largest_slots:
        assert plan(bundle, found.largest_slots, context, memory).fits
    if found.largest_slots < MOST_SLOTS:
        assert not plan(bundle, found.largest_slots + 1, context, memory).fits
    assert found.fits == (found.largest_slots >= slots)


@pytest.mark.parametrize(("slots", "context"), [(0, 1), (MOST_SLOTS + 1, 1), (1, 0), (1, CONTEXT + 1)])
def test_what_cannot_be_is_refused(bundles, slots, context):
    with pytest.raises(RequestError, match="cannot be"):
        plan(bundles["plain"], slots, context)


def test_the_estimate_knows_wide_layers_from_narrow_ones(tmp_path):
    # The shape of SmolLM2-135M: measured 28 MiB beside the cache for a prompt of 2048 tokens in fp32, and in int4.
    from fake_session import Layers, cache_facts

    layers = Layers(tuple(cache_facts(layer, 3, 64, 64) for layer in range(30)))
    bundle = make_bundle(tmp_path / "bundle", layers=layers, context=8192, vocabulary=49152)
    for precision, nbytes in (("none", 540_130_382), ("int4", 95_804_191), ("int8", 137_551_891)):
        files = {name: facts.model_copy(update={"bytes": 0}) for name, facts in bundle.manifest.files.items()}
        files["decoder.onnx"] = files["decoder.onnx"].model_copy(update={"bytes": nbytes})
        manifest = bundle.manifest.model_copy(update={"precision": precision, "files": files})
        found = plan(type(bundle)(bundle.folder, manifest), 1, 2048)
        assert found.working == pytest.approx(28 << 20, rel=0.2)
        assert found.cache == 90 << 20


def test_a_model_keeps_to_the_memory_that_it_was_given(bundles, monkeypatch):
    bundle = bundles["plain"]
    write_manifest(bundle.folder, bundle.manifest)
    session = FakeSession()
    monkeypatch.setattr(fmedge_runtimes.load, "open_session", lambda *_: session)
    few = plan(bundle, 3, 128)
    with fmedge_runtimes.load.load(bundle.folder, memory=few.total + row_bytes(128), max_batch=8) as model:
        done = model.generate([[number, 1] for number in range(8)], Sampling(100, ignore_eos=True))
    assert {len(completion.tokens) for completion in done} == {100}
    # Not all at once, and never more than there is beside weights and working memory.
    assert 1 < max(rows for rows, _ in session.steps) < 8
    assert session.peak <= few.total + row_bytes(128) - few.weights - few.working
    with pytest.raises(RequestError, match=r"needs 0 MiB for one short row, .* memory allows 0 MiB; allow more"):
        fmedge_runtimes.load.load(bundle.folder, memory=bundle.nbytes)
