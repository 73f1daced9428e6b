"""Chat templates: programs in Jinja that come with a model and turn messages into one prompt.

A template is code of a stranger. It runs in the immutable sandbox of Jinja, sees plain JSON values
only, and has the helpers that templates of published models expect (those of transformers):
`raise_exception`, `strftime_now`, `tojson` without escapes, `break` and `continue`, and
`{% generation %}`, which marks what a model wrote and prints its body. The sandbox keeps a template
from files and from Python; it limits neither its time nor its memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from pympa.checkpoint.foreign import refused
from pympa.errors import RefusedError
from pympa.text.escape import shown

Message = Mapping[str, Any]
"""A message: a "role", a "content", and what else the template of a model knows."""
_DEFAULT, _WITH_TOOLS = "default", "tool_use"
_LONGEST_TEMPLATE = 1 << 20  # characters; published templates have up to 30,000


class ChatTemplates:
    """The chat templates of a model: one, or several by name.

    Args:
        templates: the templates by name.
        variables: the special tokens that a template may name, as in `bos_token`.
        where: the name of the file or directory for messages.

    Raises:
        RefusedError: a template is too long.
    """

    def __init__(
        self, templates: Mapping[str, str], variables: Mapping[str, str], where: str
    ) -> None:
        self._templates = dict(templates)
        self._variables = dict(variables)
        self._where = f"{where}: chat template"
        for text in self._templates.values():
            if len(text) > _LONGEST_TEMPLATE:
                raise RefusedError(
                    f"{self._where}: expected at most {_LONGEST_TEMPLATE:,} characters; got "
                    f"{len(text):,}"
                )

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """Return the prompt for a conversation.

        Args:
            messages: the messages in order; a key whose value is None counts as missing.
            variables: what else the template may read, as in `add_generation_prompt=True` or
                `tools=[...]`: JSON values.

        Raises:
            RefusedError: the model has no template, the template refuses these messages or is
                broken, or a value is not one of JSON.
        """
        text = self._chosen(variables.get("tools") is not None)
        with refused(f"{self._where}: expected messages that it accepts"):
            conversation = [_message(_plain(message)) for message in messages]
            if not conversation:
                raise ValueError("no message")
            values = {name: _plain(value) for name, value in variables.items()}
            values = {"tools": None, "documents": None, "add_generation_prompt": False} | values
            template = _environment().from_string(text)
            return template.render({**self._variables, **values, "messages": conversation})

    def _chosen(self, has_tools: bool) -> str:
        """Return the template for a conversation with or without tools."""
        for name in (_WITH_TOOLS, _DEFAULT) if has_tools else (_DEFAULT,):
            if name in self._templates:
                return self._templates[name]
        names = ", ".join(map(shown, self._templates)) or "none"
        raise RefusedError(
            f"{self._where}: expected one named {_DEFAULT}; got {names}; the model may be one that "
            "continues text: give it a prompt instead of messages"
        )


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %}`: its body is printed like any other."""

    tags = {"generation"}  # noqa: RUF012 (a list of tags is how extensions declare them)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Return the body as a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """The mutable object of templates, on which no name of Python's own can be set."""

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _namespace,
        "dict": _dict,
    }
    return environment


def _namespace(*args: Any, **kwargs: Any) -> _Namespace:
    """Return a namespace with attributes from pairs and names, as `dict` takes them."""
    attributes = dict(*args, **kwargs)
    for name in attributes:
        _refuse_private(str(name))
    return _Namespace(attributes)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the attribute {name} of a namespace")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """Return a dict, without the class that has more to offer."""
    return dict(*args, **kwargs)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without escapes for HTML, which Jinja's own filter adds."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _message(value: Any) -> dict[str, Any]:
    """Return a message without the keys whose value is None."""
    if not isinstance(value, dict):
        raise TypeError("a message that is not a mapping")
    return {name: part for name, part in value.items() if part is not None}


def _plain(value: Any) -> Any:
    """Return a copy of a JSON value; other objects may have methods that a template could call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    raise TypeError(f"a value of the type {type(value).__name__}, which is not one of JSON")
