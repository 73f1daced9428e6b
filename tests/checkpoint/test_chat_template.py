"""Templates render what transformers renders, and can neither reach out nor raise a traceback."""

from __future__ import annotations

import pytest

from pympa.checkpoint.chat_template import ChatTemplates
from pympa.checkpoint.gguf_splits import SPLITS
from pympa.errors import RefusedError
from support.opened_files import load_tokenizer
from support.vocabularies import byte_level, write_directory

USER = {"role": "user", "content": "What is 2 < 3 & 'é'?"}
CHATS = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, {"role": "assistant", "content": "True.", "tool_calls": None}, USER],
]
TURNS = """
{%- for message in messages %}
    {%- if loop.index0 > 40 %}{% break %}{% endif %}
    {{- '<|turn|>' + message['role'] + '\\n' }}
    {%- if message.role == 'assistant' %}
        {% generation %}{{ message.content | trim }}{% endgeneration %}
    {%- else %}
    {{ message.content }}
    {%- endif %}
    {{- eos_token }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}
"""
STATE = """
{% set ns = namespace(count=0, last=none) %}{% for m in messages %}
{% set ns.count = ns.count + 1 %}{% set ns.last = m %}
{% if m.tool_calls is defined %}CALLS{% endif %}
{% endfor %}{{ ns.count }} {{ ns.last | tojson }} {{ dict(a=1, b='<é>') | tojson(indent=2) }}
{{ bos_token }}{{ pad_token }}{{ tools }}{{ strftime_now('%Y') | length }}{{ range(3) | list }}
"""
ALTERNATE = """{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}fine"""


@pytest.fixture(scope="module")
def made():
    return byte_level([*SPLITS["gpt-2"].expressions])


def rendered(text: str, messages=CHATS[0], **variables) -> str:
    return ChatTemplates({"default": text}, {}, "m").render(messages, **variables)


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("template", [TURNS, STATE])
def test_what_transformers_renders(tmp_path, made, template, as_file):
    transformers = pytest.importorskip("transformers", reason="transformers is the second opinion")
    write_directory(tmp_path, made, chat_template="other" if as_file else template)
    if as_file:
        (tmp_path / "chat_template.jinja").write_text(template)
    other = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    for chat in CHATS:
        for ask in (True, False):
            expected = other.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)
            assert ours.chat(chat, add_generation_prompt=ask) == expected
            ids = other.apply_chat_template(chat, add_generation_prompt=ask, return_dict=False)
            assert ours.encode(expected, special=False) == ids


def test_the_template_for_tools(tmp_path, made):
    templates = [{"name": "default", "template": "plain"},
                 {"name": "tool_use", "template": "{{ tools[0].name }}"}]  # fmt: skip
    tokenizer = load_tokenizer(write_directory(tmp_path, made, chat_template=templates))
    assert tokenizer.chat(CHATS[0]) == "plain"
    assert tokenizer.chat(CHATS[0], tools=[{"name": "clock"}]) == "clock"


def test_a_model_without_template(tmp_path, made):
    tokenizer = load_tokenizer(write_directory(tmp_path, made))
    with pytest.raises(RefusedError, match="give it a prompt instead"):
        tokenizer.chat(CHATS[0])


def test_a_template_may_refuse_messages():
    assert rendered(ALTERNATE) == "fine"
    with pytest.raises(RefusedError, match="got: Roles must alternate"):
        rendered(ALTERNATE, [USER, USER])


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ namespace(__x=1).__x.__class__ }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ range(10000000) }}",
        "{% include '/etc/passwd' %}",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ undefined_thing.x }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ '9' * (10 ** 15) }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 300 + "{% endif %}" * 300,
    ],
)
def test_a_hostile_or_broken_template_is_refused(text):
    with pytest.raises(RefusedError) as refused:
        rendered(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["{{ raise_exception.__globals__ }}", "{{ messages.__class__ }}"])
def test_names_of_python_are_undefined(text):
    assert rendered(text) == ""


@pytest.mark.parametrize("messages", [[], ["text"], [{"content": object()}], [{"content": b"x"}]])
def test_messages_are_json(messages):
    with pytest.raises(RefusedError, match="expected messages"):
        rendered("x", messages)


def test_a_template_that_is_too_long():
    with pytest.raises(RefusedError, match="expected at most"):
        rendered("x" * ((1 << 20) + 1))
