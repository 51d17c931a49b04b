"""Runs a chat template: messages in, text out.

Promises that whatever the template says against the messages reaches the caller. Knows no ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from serve_app.chat.errors import PromptError, TokenizerError

TemplateMessage = Mapping[str, object]
"""What a template sees of one message: `role`, `content` and, when given, `name`."""


def render(template: str, messages: Sequence[TemplateMessage], special_tokens: Mapping[str, str]) -> str:
    """The text of the prompt up to where the assistant's answer begins.

    `special_tokens` are the variables a template expects, e.g. `bos_token`. Rendered in transformers' sandbox, without
    its tokenizer: that one is changed by every call and so can't be shared between threads. Raises `PromptError` with
    the template's own words when it refuses the messages, `TokenizerError` when it is no template at all.
    """
    arguments: dict[str, Any] = {"chat_template": template, "add_generation_prompt": True, **special_tokens}
    try:
        texts: Any = render_jinja_template([[dict(message) for message in messages]], **arguments)[0]
    except TemplateSyntaxError as error:
        raise TokenizerError(f"The chat template is not valid Jinja (line {error.lineno}): {error.message}") from error
    except TemplateError as error:
        reason = error.message or type(error).__name__
        raise PromptError(f"The model's chat template refuses these messages: {reason}", param="messages") from error
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:  # Python's own, from the template's code
        raise PromptError(f"The model's chat template fails on these messages: {error}", param="messages") from error
    return str(texts[0])


def try_render(template: str, messages: Sequence[TemplateMessage], special_tokens: Mapping[str, str]) -> str:
    """What a trial shows, to learn about a template: nothing when it refuses the trial, which is an answer too.

    Raises `TokenizerError` when it is no template at all.
    """
    try:
        return render(template, messages, special_tokens)
    except PromptError:
        return ""
