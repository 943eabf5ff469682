"""The bundle: what is written is read back, and every kind of damage has a message of its own."""

import json
from pathlib import Path

import jsonschema
import pytest
from fake_session import make_bundle
from fmedge_runtimes.bundle import Bundle, check_files, list_files, open_bundle, sha256_of
from fmedge_runtimes.errors import BundleDamagedError, BundleError, BundleFormatError
from fmedge_runtimes.manifest import (
    FORMAT,
    MANIFEST,
    MANIFESTS,
    CacheFacts,
    Evidence,
    FileFacts,
    Golden,
    GoldenStep,
    GraphFacts,
    SamplingFacts,
    SourceFacts,
    StateFacts,
    TensorFacts,
    TextFacts,
    TextManifest,
    read_manifest,
    write_manifest,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

SCHEMA = Path(__file__).parent.parent / "docs" / "bundle.schema.json"
FILES = ("decoder.onnx", "tokenizer.json", "chat_template.jinja", "weights/part 1.bin")


@pytest.fixture
def folder(tmp_path):
    """A whole bundle, with a file in a folder of its own."""
    bundle = make_bundle(tmp_path / "bundle", chat_template="{{ messages }}")
    (bundle.folder / "weights").mkdir()
    (bundle.folder / "weights" / "part 1.bin").write_bytes(bytes(range(256)))
    graph = GraphFacts(
        file="decoder.onnx",
        inputs=(TensorFacts(name="input_ids", dtype="int64", shape=("batch", "sequence")),),
        outputs=(TensorFacts(name="logits", dtype="float32", shape=("logits", 24)),),
    )
    changes = {
        "files": list_files(bundle.folder),
        "graphs": {"decoder": graph},
        "evidence": (Evidence(name="full", what="against PyTorch", passed=True, figures={"tokens": 9, "kl": 0.5}),),
        "golden": (Golden(prompt=(1, 2), steps=(GoldenStep(token=3, margin=0.25),), near_tie=0.1),),
    }
    write_manifest(bundle.folder, bundle.manifest.model_copy(update=changes))
    return bundle.folder


def change(folder, path, value):
    """Write the manifest with one value replaced; `path` leads to it through keys and places."""
    content = json.loads((folder / MANIFEST).read_text("utf-8"))
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    (folder / MANIFEST).write_text(json.dumps(content), "utf-8")


def test_a_bundle_opens(folder):
    bundle = open_bundle(folder)
    assert tuple(sorted(bundle.manifest.files)) == tuple(sorted(FILES))
    assert bundle.nbytes == sum((folder / name).stat().st_size for name in FILES)
    assert bundle.file("weights/part 1.bin").read_bytes() == bytes(range(256))
    assert bundle.manifest.files["weights/part 1.bin"] == FileFacts(
        bytes=256, sha256="40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880"
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, -1])
def test_a_flipped_bit_is_damage(folder, name, place):
    content = bytearray((folder / name).read_bytes())
    content[place] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BundleDamagedError, match=r"right size but other content \(SHA-256 differs\)") as caught:
        open_bundle(folder)
    assert str(folder / name) in str(caught.value)
    # Sizes alone do not show it.
    assert open_bundle(folder, checksums=False).folder == folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("checksums", [True, False])
def test_another_size_is_damage(folder, name, checksums):
    content = (folder / name).read_bytes()
    for other in (content[:-1], content + b"\0", b""):
        (folder / name).write_bytes(other)
        with pytest.raises(BundleDamagedError, match=f"has {len(other)} bytes instead of {len(content)}") as caught:
            open_bundle(folder, checksums=checksums)
        assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("checksums", [True, False])
def test_a_missing_file_is_damage(folder, name, checksums):
    (folder / name).unlink()
    with pytest.raises(BundleDamagedError, match="is missing") as caught:
        open_bundle(folder, checksums=checksums)
    assert str(folder / name) in str(caught.value)
    (folder / name).mkdir()
    with pytest.raises(BundleDamagedError, match="is missing"):
        open_bundle(folder, checksums=checksums)


@pytest.mark.parametrize("checksums", [True, False])
def test_a_link_that_leaves_the_folder_is_refused(folder, tmp_path, checksums):
    (folder / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BundleDamagedError, match="a link that leaves the bundle's folder; do not trust"):
        open_bundle(folder, checksums=checksums)


def test_a_folder_that_is_a_link_leaves_too(folder, tmp_path):
    (folder / "weights").rename(tmp_path / "weights")
    (folder / "weights").symlink_to(tmp_path / "weights")
    with pytest.raises(BundleDamagedError, match="a link that leaves"):
        open_bundle(folder)


def test_links_within_the_folder_and_to_it_are_fine(folder, tmp_path):
    (folder / "tokenizer.json").rename(folder / "weights" / "real.json")
    (folder / "tokenizer.json").symlink_to("weights/real.json")
    (tmp_path / "link").symlink_to(folder)
    assert open_bundle(tmp_path / "link").folder == tmp_path / "link"


BAD_NAMES = ["/etc/passwd", "../secret", "a/../../b", "..", "a\\b", "..\\b", "C:/b", "", ".", "//host/b"]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("field", ["files", "graph", "tokenizer", "chat_template"])
def test_names_that_leave_the_folder_are_refused(folder, name, field):
    if field == "files":
        change(folder, ["files", name], {"bytes": 1, "sha256": "0" * 64})
    elif field == "graph":
        change(folder, ["graphs", "decoder", "file"], name)
    else:
        change(folder, ["text", field], name)
    with pytest.raises(BundleFormatError, match="leaves the bundle's folder; do not trust this bundle") as caught:
        read_manifest(folder)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("path", [["graphs", "decoder", "file"], ["text", "tokenizer"], ["text", "chat_template"]])
def test_a_file_that_is_used_must_be_listed(folder, path):
    # Otherwise its bytes would not be checked.
    (folder / "other").write_bytes(b"")
    change(folder, path, "other")
    with pytest.raises(BundleFormatError, match="other is used but not listed under files"):
        read_manifest(folder)


def test_there_must_be_a_decoder(folder):
    change(folder, ["graphs"], {})
    with pytest.raises(BundleFormatError, match="needs a graph named decoder"):
        read_manifest(folder)


def test_a_newer_format_is_named_whatever_else_it_holds(folder):
    (folder / MANIFEST).write_text('{"format": 2, "video": {}}', "utf-8")
    with pytest.raises(BundleFormatError, match=f"has format 2, this fmedge reads up to {FORMAT}; update fmedge"):
        read_manifest(folder)


@pytest.mark.parametrize("found", [0, -1, "1", None, [1]])
def test_a_format_that_never_was_is_refused(folder, found):
    change(folder, ["format"], found)
    with pytest.raises(BundleFormatError, match="format: Input should be 1"):
        read_manifest(folder)


# Every record of a manifest, and one of its keys.
RECORDS = [
    ([], "target"),
    (["source"], "id"),
    (["graphs", "decoder"], "file"),
    (["graphs", "decoder", "inputs", 0], "shape"),
    (["text"], "context"),
    (["text", "caches", 0], "window"),
    (["text", "sampling"], None),
    (["evidence", 0], "passed"),
    (["golden", 0], "near_tie"),
    (["golden", 0, "steps", 0], "margin"),
    (["files", "decoder.onnx"], "sha256"),
]


@pytest.mark.parametrize(("path", "key"), RECORDS)
def test_unknown_and_missing_keys_are_refused_at_every_level(folder, path, key):
    whole = (folder / MANIFEST).read_text("utf-8")
    change(folder, [*path, "surprise"], 1)
    with pytest.raises(BundleFormatError) as caught:
        read_manifest(folder)
    where = ".".join(map(str, [*path, "surprise"]))
    assert f"{folder / MANIFEST}: {where}: unknown key (1 in all)" in str(caught.value)
    if key is not None:
        content = json.loads(whole)
        record = content
        for step in path:
            record = record[step]
        del record[key]
        (folder / MANIFEST).write_text(json.dumps(content), "utf-8")
        with pytest.raises(BundleFormatError) as caught:
            read_manifest(folder)
        assert f"{'.'.join(map(str, [*path, key]))}: Field required" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["kind"], "images", "expected tags: 'text', 'image'"),
        (["forced"], 1, "valid boolean"),
        (["text", "context"], "200", "valid integer"),
        (["text", "context"], 200.0, "valid integer"),
        (["text", "context"], 0, "greater than 0"),
        (["text", "vocabulary"], True, "valid integer"),
        (["text", "eos_token_ids"], 5, "valid array"),
        (["text", "eos_token_ids"], [-1], "greater than or equal to 0"),
        (["text", "cache_dtype"], "bfloat16", "'float32' or 'float16'"),
        (["text", "special_tokens"], {"bos_token": 1}, "valid string"),
        (["text", "caches", 0], None, "an object"),
        (["files", "decoder.onnx", "sha256"], "0" * 63, "should match pattern"),
        (["files", "decoder.onnx", "sha256"], "G" * 64, "should match pattern"),
        (["files", "decoder.onnx", "bytes"], -1, "greater than or equal to 0"),
        (["golden", 0, "steps", 0, "margin"], "0.5", "valid number"),
        (["source", "id"], "\ud800", "JSON"),
    ],
)
def test_wrong_values_are_named(folder, path, value, words):
    change(folder, path, value)
    with pytest.raises(BundleFormatError) as caught:
        read_manifest(folder)
    assert str(folder / MANIFEST) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"', "{}"])
def test_json_that_is_no_manifest_is_refused(folder, content):
    (folder / MANIFEST).write_text(content, "utf-8")
    with pytest.raises(BundleFormatError, match=r"kind: "):
        read_manifest(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"{'format': 1}", b"[" * 100_000, b'{"format": ' + b"9" * 5000 + b"}"]
)
def test_what_is_not_json_is_refused(folder, content):
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(BundleFormatError, match="is not JSON"):
        read_manifest(folder)


def test_folders_that_are_no_bundles_say_so(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for name in ("file", "nothing"):
        with pytest.raises(BundleError, match=f"{name} is not a folder; give the folder"):
            open_bundle(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"empty is not a bundle: it has no fmedge\.json"):
        open_bundle(tmp_path / "empty")


def test_progress_ends_at_all_bytes(folder):
    bundle = Bundle(folder, read_manifest(folder))
    seen = []
    check_files(bundle, checksums=True, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == len(FILES)
    assert seen == sorted(seen)
    assert seen[-1] == (bundle.nbytes, bundle.nbytes)


words = st.text(st.characters(codec="utf-8"), max_size=8)
positive = st.integers(1, 2**63)
number = st.floats(allow_nan=False)
tensors = st.lists(
    st.builds(
        TensorFacts, name=words, dtype=words, shape=st.lists(st.integers(0, 2**40) | words, max_size=4).map(tuple)
    ),
    max_size=3,
).map(tuple)
file_facts = st.builds(
    FileFacts, bytes=st.integers(0, 2**63), sha256=st.text("0123456789abcdef", min_size=64, max_size=64)
)
manifests = st.builds(
    TextManifest,
    format=st.just(FORMAT),
    kind=st.just("text"),
    source=st.builds(SourceFacts, id=words, revision=st.none() | words, architecture=words, licence=st.none() | words),
    target=words,
    precision=words,
    block_size=st.none() | positive,
    graphs=st.builds(
        lambda inputs, outputs: {"decoder": GraphFacts(file="decoder.onnx", inputs=inputs, outputs=outputs)},
        tensors,
        tensors,
    ),
    text=st.builds(
        TextFacts,
        context=positive,
        vocabulary=positive,
        cache_dtype=st.sampled_from(["float32", "float16"]),
        caches=st.lists(
            st.builds(
                CacheFacts,
                layer=st.integers(0, 99),
                kv_heads=positive,
                key_dim=positive,
                value_dim=positive,
                window=st.none() | positive,
                rolling=st.booleans(),
            ),
            max_size=3,
        ).map(tuple),
        states=st.lists(
            st.builds(
                StateFacts,
                name=words,
                shape=st.lists(positive, max_size=3).map(tuple),
                dtype=st.sampled_from(["float32", "float16"]),
                in_place=st.booleans(),
            ),
            max_size=3,
        ).map(tuple),
        eos_token_ids=st.lists(st.integers(0, 2**31), max_size=3).map(tuple),
        special_tokens=st.dictionaries(words, words, max_size=3),
        tokenizer=st.sampled_from([None, "tokenizer.json"]),
        chat_template=st.none(),
        sampling=st.builds(SamplingFacts, temperature=number, top_k=st.integers(0, 100), top_p=number, min_p=number),
    ),
    evidence=st.lists(
        st.builds(
            Evidence,
            name=st.sampled_from(["graph", "full"]),
            what=words,
            passed=st.booleans(),
            figures=st.dictionaries(words, number | st.integers() | words | st.booleans(), max_size=3),
        ),
        max_size=2,
    ).map(tuple),
    golden=st.lists(
        st.builds(
            Golden,
            prompt=st.lists(st.integers(0, 2**31), max_size=3).map(tuple),
            steps=st.lists(st.builds(GoldenStep, token=st.integers(0, 2**31), margin=number), max_size=3).map(tuple),
            near_tie=number,
        ),
        max_size=2,
    ).map(tuple),
    forced=st.booleans(),
    files=file_facts.map(lambda facts: {"decoder.onnx": facts, "tokenizer.json": facts, "a/ü.bin": facts}),
    made_by=st.dictionaries(words, words, max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(manifests)
def test_a_manifest_is_read_as_it_was_written(tmp_path_factory, manifest):
    folder = tmp_path_factory.getbasetemp() / "roundtrip"
    folder.mkdir(exist_ok=True)
    write_manifest(folder, manifest)
    found = read_manifest(folder)
    assert found == manifest
    # 1, 1.0 and True are equal; a figure must come back as what it was.
    for before, after in zip(manifest.evidence, found.evidence, strict=True):
        assert {name: type(value) for name, value in before.figures.items()} == {
            name: type(value) for name, value in after.figures.items()
        }


def test_a_figure_that_is_not_a_number_can_be_read_back(folder):
    manifest = read_manifest(folder)
    broken = Evidence(name="full", what="overflow", passed=False, figures={"kl": float("nan")})
    write_manifest(folder, manifest.model_copy(update={"evidence": (broken,), "forced": True}))
    assert str(read_manifest(folder).evidence[0].figures["kl"]) == "nan"


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=3000))
@example(b"")
def test_the_checksum_is_sha256(tmp_path_factory, content):
    import hashlib

    path = tmp_path_factory.getbasetemp() / "content"
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()


def test_the_manifest_itself_is_not_listed(folder):
    assert MANIFEST not in list_files(folder)
    assert list_files(folder) == read_manifest(folder).files


def test_the_schema_in_the_documentation_is_current():
    made = json.dumps(MANIFESTS.json_schema(), indent=1) + "\n"
    assert SCHEMA.read_text("utf-8") == made, "write docs/bundle.schema.json anew from MANIFESTS.json_schema()"


def test_a_manifest_follows_the_schema(folder):
    schema = json.loads(SCHEMA.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    content = json.loads((folder / MANIFEST).read_text("utf-8"))
    jsonschema.validate(content, schema)
    content["text"]["surprise"] = 1
    with pytest.raises(jsonschema.ValidationError):  # of either kind, so that the message names one of many reasons
        jsonschema.validate(content, schema)
