"""Runs a chat template: messages in, text out.

Promises that the caller gets the template's own words when it refuses the messages. Knows no ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serve_app.chat.options import DEFAULT_OPTIONS, ChatOptions
from serve_app.chat.prompt_error import PromptError
from serve_app.chat.tokenizer_error import TokenizerError
from serve_app.transformers_internals import render_template

TemplateMessage = Mapping[str, object]
"""What a template sees of one message: `role`, `content` and what else it has (`template_style.template_message`)."""


_OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
_RENDERERS = frozenset({"conversations", "chat_template", "return_assistant_tokens_mask"})
"""Arguments of transformers' `render_jinja_template` that are not variables of the template."""
_GLOBALS = frozenset(DEFAULT_NAMESPACE) | {"raise_exception", "strftime_now"}
"""Functions that Jinja and transformers give to every template."""


def own_variables(template: str) -> frozenset[str]:
    """The variables that a template leaves to its callers: all that it reads and neither sets nor gets from us.

    Raises `TokenizerError` when it is no template at all.
    """
    environment = ImmutableSandboxedEnvironment(extensions=[_GenerationTag, loopcontrols])
    try:
        names = find_undeclared_variables(environment.parse(template))
    except TemplateSyntaxError as error:
        raise _no_template(error) from error
    return frozenset(name for name in names - _OURS - _RENDERERS - _GLOBALS if not name.endswith("_token"))


class _GenerationTag(Extension):
    """`{% generation %}`, by which templates mark what the assistant says; transformers' own can't be imported."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> list[Node]:
        """The statements inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(
    template: str,
    messages: Sequence[TemplateMessage],
    special_tokens: Mapping[str, str],
    options: ChatOptions = DEFAULT_OPTIONS,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text of the prompt, by default up to where the assistant's answer begins.

    `special_tokens` are the variables a template expects, e.g. `bos_token`. With `continue_final_message` the caller
    cuts the text where the last message ends. The template runs in transformers' sandbox, but without transformers'
    tokenizer, which every call changes, so that threads can't share it. Raises `PromptError` with the template's own
    words when it refuses the messages, `TokenizerError` when it is no template at all.
    """
    variables: dict[str, object] = {
        **options.variables,
        "add_generation_prompt": options.add_generation_prompt,
        "tools": list(tools) or None,
        **special_tokens,
    }
    try:
        return render_template(template, messages, variables)
    except TemplateSyntaxError as error:
        raise _no_template(error) from error
    except TemplateError as error:
        reason = error.message or type(error).__name__
        raise PromptError(f"The model's chat template refuses these messages: {reason}", param="messages") from error
    except (TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:  # in the template's code
        raise PromptError(f"The model's chat template fails on these messages: {error}", param="messages") from error


def try_render(
    template: str,
    messages: Sequence[TemplateMessage],
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text that a template makes of trial messages; "" when it refuses them.

    Raises `TokenizerError` when it is no template at all.
    """
    try:
        return render(template, messages, special_tokens, tools=tools)
    except PromptError:
        return ""


def _no_template(error: TemplateSyntaxError) -> TokenizerError:
    return TokenizerError(f"The chat template is not valid Jinja (line {error.lineno}): {error.message}")
