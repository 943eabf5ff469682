"""Chat templates: the text that transformers renders, the template's own words on refusal, and no way out."""

import enum
from datetime import datetime

import jinja2.sandbox
import pytest
import tokenizers
from fmedge_runtimes.chat import ChatTemplate
from fmedge_runtimes.errors import RequestError
from tokenizers import models
from transformers import PreTrainedTokenizerFast

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# In the manner of the families they are named after; each leans on another part of the environment.
TEMPLATES = {
    "chatml": """
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.reasoning_content is defined %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n' }}
        {%- endif %}
        {{- (message.content or '') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama-3": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You have access to these functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "mistral": """{%- set ns = namespace(index=0, self=1) %}
{%- for message in messages if message.role != 'system' %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + ns.self %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content|trim + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
        "{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
    ),
    # Line breaks between blocks stay unless trim_blocks takes them, indents unless lstrip_blocks does.
    "zephyr": """{% for message in messages %}
  {% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
    {% elif message['role'] == 'assistant' %}
{% generation %}
  {{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endgeneration %}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
""",
    "loop controls": """{% set names = dict(user='Human', assistant='AI') %}
{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% if loop.index > 3 %}{% break %}{% endif %}
{{ names.get(message.role, message.role) }}: {{ message.content }}{{ pad_token }}
{% endfor %}
{% if tools %}{% for tool in tools %}{{ tool | tojson }}
{{ tool | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}
{% endfor %}{% endif %}
{% if documents is none and documents is defined %}no documents{% endif %}
""",
}

TOOL = {
    "type": "function",
    "function": {
        "name": "wetter",
        "description": 'Gibt die <Temperatur> für "Zürich" & 東京 in °C \U0001f321',
        "parameters": {"type": "object", "properties": {"ort": {"type": "string"}}, "required": ["ort"]},
    },
}

CHATS = {
    "one": [{"role": "user", "content": "Hello"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi <b> & 'you'\n\n"}],
    "turns": [
        {"role": "user", "content": "naïve 日本語 \U0001f600"},
        {"role": "assistant", "content": " Yes?\n"},
        {"role": "user", "content": "{{ bos_token }}{% raw %}"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "more"},
    ],
    "reasoning": [
        {"role": "user", "content": "2 + 2"},
        {"role": "assistant", "content": "4", "thinking": "\nadd\n"},
        {"role": "user", "content": "and 3?", "name": None},
    ],
    "tools": [
        {"role": "user", "content": "Wie warm?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "wetter", "arguments": {"ort": "Zürich", "t": 1.5}}}
            ],
        },
        {"role": "tool", "content": {"grad": 21, "ok": True}},
    ],
    "not alternating": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
}


class FixedDate(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 3, 9, 8, 7, 6)


@pytest.fixture(autouse=True)
def same_time(monkeypatch):
    monkeypatch.setattr("fmedge_runtimes.chat.datetime", FixedDate)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", FixedDate)


@pytest.fixture(scope="module")
def reference():
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, "<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def outcome(render):
    try:
        return render()
    except (RequestError, jinja2.TemplateError, TypeError) as error:
        return error


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(reference, name, chat):
    for prompt in (True, False):
        for tools in (None, [], [TOOL, TOOL]):
            for variables in ({}, {"enable_thinking": False, "date_string": "1 May", "eos_token": "<end>"}):
                wanted = outcome(
                    lambda prompt=prompt, tools=tools, variables=variables: reference.apply_chat_template(
                        CHATS[chat],
                        tools,
                        chat_template=TEMPLATES[name],
                        add_generation_prompt=prompt,
                        tokenize=False,
                        **variables,
                    )
                )
                found = outcome(
                    lambda prompt=prompt, tools=tools, variables=variables: ChatTemplate(
                        TEMPLATES[name], SPECIAL
                    ).render(CHATS[chat], add_generation_prompt=prompt, tools=tools, variables=variables)
                )
                if isinstance(wanted, Exception):
                    assert isinstance(found, RequestError)
                    assert str(wanted) in str(found)
                else:
                    assert found == wanted


def test_some_chats_are_rendered_and_some_refused():
    # What the comparison above rests on: it would pass, too, if everything were refused.
    texts = {
        (name, chat): outcome(lambda name=name, chat=chat: ChatTemplate(TEMPLATES[name], SPECIAL).render(CHATS[chat]))
        for name in TEMPLATES
        for chat in CHATS
    }
    refused = {key for key, text in texts.items() if isinstance(text, Exception)}
    assert {("llama-2", "not alternating"), ("mistral", "not alternating"), ("gemma", "system")} <= refused
    assert all((name, "one") not in refused for name in TEMPLATES)
    assert texts["llama-3", "one"] == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 09 Mar 2026\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert "<think>\nadd\n</think>\n4" in texts["chatml", "reasoning"]
    assert "{{ bos_token }}{% raw %}" in texts["mistral", "turns"]


def test_a_refusal_is_in_the_words_of_the_template():
    with pytest.raises(RequestError, match=r"^the chat template refuses these messages: System role not supported$"):
        ChatTemplate(TEMPLATES["gemma"], SPECIAL).render(CHATS["system"])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ messages[7].content.strip() }}", "UndefinedError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ range(10 ** 9) | list }}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_a_failing_template_is_a_request_error(source, words):
    with pytest.raises(RequestError, match=f"the chat template fails on these messages: .*{words}"):
        ChatTemplate(source).render(CHATS["one"])


@pytest.mark.parametrize("source", ["a\n{% if %}", "a\n{{ messages[ }}", "a\n{% generation %}", "a\n{% unknown %}"])
def test_a_syntax_error_names_its_line(source):
    template = ChatTemplate(source)
    for _ in range(2):
        with pytest.raises(RequestError, match="syntax error in line 2"):
            template.render(CHATS["one"])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}{{ ''['__class__'].mro() }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ '{0.__class__.__init__}'.format(messages) }}",
        "{% set f = '{0.__class__.__mro__}'.format %}{{ f(raise_exception) }}",
        "{{ ([raise_exception]|map(attribute='__globals__')|first).keys() }}",
        "{{ '{0.__globals__}'|attr('format')(raise_exception) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__.__builtins__.open('/etc/passwd') }}",
        "{{ dict.__class__.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace.__base__.__subclasses__() }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n }}",
        "{{ namespace(__class__=1) }}",
        "{{ namespace({'_secret': 1}) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages[0].clear() }}",
        "{{ dict.update(messages[0], {'role': 'system'}) }}",
        "{% import 'os' as os %}{{ os }}",
    ],
)
def test_the_sandbox_holds(source):
    messages = [{"role": "user", "content": "Hello"}]
    try:
        text = ChatTemplate(source, SPECIAL).render(messages)
    except RequestError as error:
        text = str(error)
        reasons = ("unsafe", "undefined", "has no attribute", "underscore", "no loader")
        assert any(reason in text for reason in reasons), text
    else:
        # Jinja gives nothing for what it hides from a template, as long as nothing is done with it.
        assert text.strip("\n") in ("", "[]"), text
    assert messages == [{"role": "user", "content": "Hello"}]


class Role(enum.StrEnum):
    user = "user"

    def __str__(self):
        return "never asked"


def test_templates_see_plain_copies():
    class Loud(dict):
        def shout(self):
            return "called"

    messages = [{"role": Role.user, "content": Loud(text="Hi", numbers=(1, True, 2.5, -0.0))}]
    source = "{{ messages[0].role }} {{ messages[0].content }} {{ messages[0].content.shout is defined }}"
    assert ChatTemplate(source).render(messages) == "user {'text': 'Hi', 'numbers': (1, True, 2.5, -0.0)} False"


def test_objects_are_refused():
    with pytest.raises(RequestError, match="cannot take a object"):
        ChatTemplate("{{ messages }}").render([{"role": "user", "content": object()}])


@pytest.mark.parametrize("messages", [[], ["Hello"], [{"content": "Hello"}], [{"role": None, "content": "Hello"}]])
def test_what_is_no_chat_is_refused(messages):
    with pytest.raises(RequestError, match=r"no messages|is not a chat message"):
        ChatTemplate("{{ messages[0].content }}").render(messages)


def test_variables_do_not_replace_the_messages():
    template = ChatTemplate("{{ messages[0].content }}{{ tools }}{{ name }}", {"bos_token": "<s>"})
    text = template.render(CHATS["one"], variables={"messages": [], "tools": 1, "name": "!"})
    assert text == "HelloNone!"


def test_special_tokens_that_are_not_set_are_empty():
    assert ChatTemplate("[{{ bos_token }}{{ eos_token }}]", {"eos_token": "</s>"}).render(CHATS["one"]) == "[</s>]"
