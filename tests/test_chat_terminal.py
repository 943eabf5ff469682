"""`fmedge chat` in a terminal of its own: typed keys in, a screen out, interrupts as a person sends them."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time

import pytest
from fake_session import make_bundle
from fmedge_runtimes.manifest import write_manifest

pytestmark = [pytest.mark.medium, pytest.mark.skipif(sys.platform == "win32", reason="there are no such terminals")]

PATIENCE = 60
PROGRAM = """
import fcntl, signal, sys, termios, time
import fmedge_runtimes.load
from fake_session import FakeSession
from fmedge.cli import main

fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C in this terminal is for this program
signal.signal(signal.SIGINT, signal.default_int_handler)  # what shells start behind their back ignores it

class Slow(FakeSession):
    def run(self, feeds, results):
        time.sleep(0.05)
        super().run(feeds, results)

fmedge_runtimes.load.open_session = lambda *_: Slow()
sys.argv[0] = "fmedge"
main()
"""
TEMPLATE = "{% for message in messages %}{{ message.role[0] }}{{ message.content }}{% endfor %}"
CTRL_C, CTRL_D, BACKSPACE, UP = "\x03", "\x04", "\x7f", "\x1b[A"


class Screen:
    """A program behind a terminal."""

    def __init__(self, *arguments):
        import pty

        self._keyboard, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, arguments)],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "INPUTRC": "/dev/null", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        os.close(terminal)
        self._shown = ""

    def type(self, keys):
        os.write(self._keyboard, keys.encode())

    def interrupt_behind(self, keys):
        """Type, and interrupt when the line editor waits again: just before, Python sees it at the next key only."""
        self.type(keys)
        self.wait_for(keys)
        time.sleep(0.5)
        self.type(CTRL_C)

    def wait_for(self, text):
        """Everything from the last such call up to this text."""
        while text not in self._shown:
            self._read(text)
        before, found, self._shown = self._shown.partition(text)
        return before + found

    def wait_for_more(self):
        """Until there is anything that no call has given yet."""
        while not self._shown:
            self._read("anything")

    def _read(self, wanted):
        ready, _, _ = select.select([self._keyboard], [], [], PATIENCE)
        assert ready, f"{wanted!r} did not appear in {self._shown!r}"
        try:
            self._shown += os.read(self._keyboard, 4096).decode()
        except OSError:
            pytest.fail(f"the program ended with {self._shown!r}")

    def end(self):
        os.close(self._keyboard)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def screen(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", chat_template=TEMPLATE)
    text = bundle.manifest.text.model_copy(update={"eos_token_ids": ()})
    write_manifest(bundle.folder, bundle.manifest.model_copy(update={"text": text}))
    shown = Screen("chat", bundle.folder, "--max-new-tokens", "20")
    yield shown
    shown.end()


def test_a_conversation(screen, tmp_path):
    path = tmp_path / "saved.json"
    screen.wait_for("/exit leaves.")
    screen.wait_for(">>> ")
    screen.type("abx" + BACKSPACE + "c\r")
    screen.wait_for("c\r\n")
    started = time.monotonic()
    screen.wait_for("cut off after 20 tokens")
    assert time.monotonic() - started > 0.5, "the reply was not shown as it came"
    screen.wait_for(">>> ")

    # An interrupt stops the reply, and leaves the program.
    screen.type("def\r")
    screen.wait_for("def\r\n")
    screen.wait_for_more()
    screen.type(CTRL_C)
    stopped = screen.wait_for("(stopped)")
    screen.wait_for(">>> ")
    assert screen.process.poll() is None

    # At the prompt there is nothing to stop, and what was typed is dropped.
    screen.interrupt_behind("zzz")
    screen.wait_for("(/exit or the end of input leaves)")
    screen.wait_for(">>> ")

    # Keys of the line editor: the last message again; a message of several lines.
    screen.type(UP + "\r")
    screen.wait_for("def\r\n")
    screen.wait_for("cut off")
    screen.wait_for(">>> ")
    screen.type('"""\r')
    screen.wait_for("... ")
    screen.type("a\rb\r" + '"""\r')
    screen.wait_for("cut off")
    screen.wait_for(">>> ")

    screen.type("/help\r")
    screen.wait_for("Ctrl-C stops the reply.")
    screen.wait_for(">>> ")
    screen.type(f"/save {path}\r")
    screen.wait_for("8 messages saved")
    messages = json.loads(path.read_text())
    assert [message["content"] for message in messages[::2]] == ["abc", "def", "def", "a\nb"]
    assert 0 < len(messages[3]["content"]) < len(messages[1]["content"])
    assert stopped.startswith(messages[3]["content"])
    screen.wait_for(">>> ")

    screen.type(CTRL_D)
    assert screen.process.wait(PATIENCE) == 0


def test_an_interrupt_while_a_message_of_several_lines_is_typed_drops_it(screen):
    screen.wait_for(">>> ")
    screen.type('"""\r')
    screen.wait_for("... ")
    screen.interrupt_behind("never")
    screen.wait_for("(/exit or the end of input leaves)")
    screen.wait_for(">>> ")
    screen.type("/exit\r")
    assert screen.process.wait(PATIENCE) == 0
