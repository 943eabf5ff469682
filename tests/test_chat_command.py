"""`fmedge chat`: what the model is shown, what is kept, and what stops what."""

from __future__ import annotations

import json

import fmedge_runtimes.load
import pytest
from conftest import CHAT_TEMPLATE
from fake_session import FakeSession, make_bundle
from fmedge_runtimes.chat import ChatTemplate
from fmedge_runtimes.manifest import write_manifest
from fmedge_runtimes.text import TextModel
from typer.testing import CliRunner

from fmedge.cli import app

LETTERS = "{% for message in messages %}{{ message.role[0] }}{{ message.content }}{% endfor %}"
WITH_TOOLS = "{% if tools %}{% for tool in tools %}{{ tool.name }}{% endfor %}{% endif %}" + LETTERS


@pytest.fixture
def chat(tmp_path, monkeypatch):
    """Runs a chat with a fake model; gives its result and the prompts that the model was given."""
    prompts = []
    original = TextModel.stream

    def stream(self, asked, *rest, **named):
        prompts.append(self.tokenizer.decode(asked[0]))
        return original(self, asked, *rest, **named)

    monkeypatch.setattr(TextModel, "stream", stream)
    monkeypatch.setattr(fmedge_runtimes.load, "open_session", lambda *_: FakeSession())

    def run(text, *options, template=LETTERS):
        prompts.clear()
        bundle = make_bundle(tmp_path / "bundle", chat_template=template)
        write_manifest(bundle.folder, bundle.manifest)
        call = ["chat", str(bundle.folder), "--max-new-tokens", "4", *map(str, options)]
        return CliRunner().invoke(app, call, input=text), list(prompts)

    return run


def test_the_history_is_the_prompt(chat):
    done, prompts = chat("abc\ndef\n")
    first, second = done.stdout.splitlines()
    assert done.exit_code == 0
    assert prompts == ["aabc", f"aabca{first}adef"]
    assert first
    assert second
    assert "cut off after 4 tokens" in done.stderr


def test_messages_of_several_lines(chat, tmp_path):
    path = tmp_path / "saved.json"
    text = f'ab\\\ncd\n"""\ne\n\n/reset\n"""\n/save {path}\n//a\n"""\nend'
    done, prompts = chat(text)
    assert done.exit_code == 0
    said = [message["content"] for message in json.loads(path.read_text()) if message["role"] == "user"]
    assert said == ["ab\ncd", "e\n\n/reset"]
    assert len(prompts) == 4


def test_commands(chat, tmp_path):
    path = tmp_path / "saved.json"
    done, prompts = chat(
        f"abc\n/reset\n/system bcd\n/system\n/help\n\nefg\n/save {path}\n/exit\nnever\n", "--system", "fff"
    )
    assert done.exit_code == 0
    assert [prompt.count("fff") for prompt in prompts] == [1, 0]
    assert prompts[1].endswith("efg")
    assert "abc" not in prompts[1]
    assert "/reset" in done.stderr
    assert [message["role"] for message in json.loads(path.read_text())] == ["system", "user", "assistant"]
    for wrong in ("/what", "/save", f"/save {tmp_path}/no/file"):
        done, prompts = chat(wrong + "\nabc\n")
        assert done.exit_code == 1
        assert len(prompts) == 1
        assert "fmedge: " in done.stderr


def test_oldest_turns_are_dropped_with_a_notice(chat):
    done, prompts = chat("".join(letter * 60 + "\n" for letter in "bcdef"), "--system", "ggg")
    assert done.exit_code == 0
    assert "the context is full: the oldest turn is dropped" in done.stderr
    assert all(len(prompt) + 4 <= 200 for prompt in prompts)
    assert all("ggg" in prompt for prompt in prompts)
    assert "b" * 60 not in prompts[-1]
    assert "e" * 60 in prompts[-1]


def test_a_message_that_cannot_be_answered_is_as_if_never_said(chat):
    done, prompts = chat("b" * 300 + "\nabc\n")
    assert done.exit_code == 1
    assert "the prompt has" in done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "b" * 300 not in prompts[-1]


def test_an_interrupt_stops_the_reply_not_the_program(chat, monkeypatch, tmp_path):
    from fmedge_runtimes.request import Request

    original, calls = Request.__next__, []

    def interrupted(self):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Request, "__next__", interrupted)
    path = tmp_path / "saved.json"
    done, prompts = chat(f"abc\ndef\n/save {path}\n")
    assert done.exit_code == 0
    assert "(stopped)" in done.stderr
    assert len(prompts) == 2
    assert len(json.loads(path.read_text())) == 4
    assert calls[0].result()[0].finish_reason in ("cancelled", "length", "eos")


def test_tools_go_to_templates_that_take_them(chat, tmp_path):
    path = tmp_path / "tools.json"
    path.write_text('[{"name": "ghi"}]')
    done, prompts = chat("abc\n", "--tools", path, template=WITH_TOOLS)
    assert done.exit_code == 0
    assert prompts[0].startswith("ghi")
    done, prompts = chat("abc\n", "--tools", path)
    assert "has no place for tools" in str(done.exception)
    assert prompts == []
    for text in ("{", "{}", "[]", "[1]"):
        path.write_text(text)
        assert "tools.json" in str(chat("abc\n", "--tools", path, template=WITH_TOOLS)[0].exception)


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        (CHAT_TEMPLATE, False),
        (WITH_TOOLS, True),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}{% if tools is not none %}x{% endif %}", True),
        ("{# tools #}{{ 'tools' }}", False),
    ],
)
def test_which_templates_take_tools(source, takes):
    assert ChatTemplate(source).takes_tools is takes


def test_a_model_without_a_template_says_so_at_once(chat):
    assert "has no chat template" in str(chat("abc\n", template=None)[0].exception)
