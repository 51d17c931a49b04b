"""Turns messages into ids through the model's own Hugging Face chat template, so that text stays text.

Promises the ids of transformers' `apply_chat_template` for ordinary messages, and that no message adds a control token
or a turn marker to those the template writes. Knows no HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

from serve_app.chat.conversation import ChatMessage
from serve_app.chat.generic_tools import GENERIC_MARKERS, written_out
from serve_app.chat.harmless import Disarmed
from serve_app.chat.marks import Marks, alternatives, unused_marks
from serve_app.chat.options import DEFAULT_OPTIONS, ChatOptions, Tool
from serve_app.chat.prompt_error import PromptError
from serve_app.chat.rendering import own_variables, render, try_render
from serve_app.chat.template_style import PROBE_TOOL, TemplateStyle, find_style, template_message, template_tool
from serve_app.chat.texts import chat_texts, uses_tools, with_message_texts, with_tool_texts
from serve_app.chat.tokenizer import ChatTokenizer, Piece
from serve_app.chat.tokenizer_error import TokenizerError
from serve_app.chat.tool_turns import arranged
from serve_app.chat.turn_markers import SENTINEL, TurnMarkers, find_tool_markers, find_turn_markers

logger = logging.getLogger(__name__)


class _Defence(NamedTuple):
    """Against turn markers in texts."""

    markers: TurnMarkers
    disarmed: Disarmed


class ChatTemplate:
    """A chat template with the tokenizer it belongs to. Safe to use from any number of threads at once.

    Three defences, since a template is a program that may do anything with a text:

    1. Control tokens in message texts are fenced by marks before the template runs, and what comes out between two
       marks is encoded as text. (transformers' `sanitize_control_tokens` does the same; its form needs a tokenizer
       that threads can't share, so `ChatTokenizer` has two.)
    2. What is not a whole control token in one text can still become one: fields that join ("<|im_" before "end|>"), a
       template that changes case or cuts. So the control ids of the prompt must be those of the same messages made
       harmless; else the request is refused.
    3. Turn markers that are ordinary text are refused or broken in user and system texts (see `turn_markers`), and the
       prompt must have as many of them as the prompt of the same messages made harmless. The assistant's texts are
       taken as they are.

    Reasoning models' templates cut `<think>...</think>` out of earlier answers, by string operations that marks would
    disturb. So in the assistant's words non-special control tokens are left alone at first, and fenced only when that
    fails the comparison.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, *, tags: Literal["reject", "escape"] = "reject", with_tools: bool = False
    ) -> None:
        """`tags`: what to do with turn markers in user and system text. `with_tools`: use the tokenizer's template for
        chats with tools.

        Raises `TokenizerError` when the tokenizer has no template or the template ignores what messages say.
        """
        template = tokenizer.tool_template if with_tools else tokenizer.template
        if template is None:
            raise TokenizerError("This tokenizer has no chat template.")
        self._tokenizer = tokenizer
        self._template = template
        self._probed_with = (PROBE_TOOL,) if with_tools else ()
        self._knows_developer = "developer" in self._template
        self._style = find_style(self._try, parts=self._needs_parts())
        self.shows_tools = self._style.shows_tools
        """The template has a form of its own for tools. Else they are written as `generic_tools` does."""
        self.shows_reasoning = self._style.shows_reasoning
        """The template reads the reasoning of earlier answers."""
        controls = tokenizer.control_tokens
        self._without_controls = Disarmed(controls)
        self._fences = {
            lenient: alternatives(controls & tokenizer.skipped_tokens if lenient else controls)
            for lenient in (False, True)
        }
        markers = find_turn_markers(self._show, controls)
        self._of_turns = self._defence(markers, tags)
        self._of_tools = self._defence(dict.fromkeys((*markers, *self._tool_markers())), tags)
        self.variables = own_variables(self._template) - tokenizer.special_tokens.keys()
        """Names that `ChatOptions.variables` may set."""
        self._with_tools = None
        if tokenizer.tool_template is not None and not with_tools:
            self._with_tools = ChatTemplate(tokenizer, tags=tags, with_tools=True)
            self._with_tools.variables = self.variables = self.variables | self._with_tools.variables
            self.shows_tools = self._with_tools.shows_tools
        if markers:
            logger.info("turn markers of the chat template that are ordinary text: %s", " ".join(markers))

    def encode(self, messages: Sequence[ChatMessage], options: ChatOptions = DEFAULT_OPTIONS) -> list[int]:
        """The prompt's ids, by default up to where the assistant's answer begins.

        Raises `PromptError` when the template refuses the messages or when a text would add a control token or a turn
        marker, and for variables that are not the template's own.
        """
        if options.tools and self._with_tools is not None:
            return self._with_tools.encode(messages, options)
        if foreign := options.variables.keys() - self.variables:
            raise PromptError(f"This model's chat template has no variable {min(foreign)!r}.")
        if not self._knows_developer:
            messages = [replace(m, role="system") if m.role == "developer" else m for m in messages]
        defence = self._of_tools if uses_tools(messages, options) else self._of_turns
        messages, options = defence.markers.guarded_chat(messages, options)
        messages = arranged(messages, one_call=self._style.one_call)
        self._check_markers(messages, options, defence)
        harmless = [self._without_controls.message(message) for message in messages]
        harmless_options = self._without_controls.options(options)
        if (harmless, harmless_options) == (messages, options):
            return self._encode(messages, options, lenient=True)
        expected = self._controls(self._encode(harmless, harmless_options, lenient=True))
        for lenient in (True, False):
            ids = self._encode(messages, options, lenient=lenient)
            if self._controls(ids) == expected:
                return ids
        raise PromptError(
            "The messages contain text that would join into a control token of this model.", param="messages"
        )

    def _check_markers(self, messages: Sequence[ChatMessage], options: ChatOptions, defence: _Defence) -> None:
        """Raises `PromptError` when the template makes a turn marker of any text but the assistant's."""
        harmless = [m if m.role == "assistant" else defence.disarmed.message(m) for m in messages]
        harmless_options = defence.disarmed.options(options)
        if (harmless, harmless_options) == (messages, options):
            return
        count = defence.markers.count
        if count(self._text(messages, options)) != count(self._text(harmless, harmless_options)):
            markers = ", ".join(defence.markers.markers)
            message = f"The messages contain text that would join into a turn marker of this model ({markers})."
            raise PromptError(message, param="messages")

    def _text(self, messages: Sequence[ChatMessage], options: ChatOptions) -> str:
        return "".join(piece.text for piece in self._pieces(messages, options, lenient=True))

    def _encode(self, messages: Sequence[ChatMessage], options: ChatOptions, *, lenient: bool) -> list[int]:
        return self._tokenizer.encode_pieces(self._pieces(messages, options, lenient=lenient))

    def _pieces(self, messages: Sequence[ChatMessage], options: ChatOptions, *, lenient: bool) -> list[Piece]:
        """The rendered prompt. `lenient`: leave `<think>` in the assistant's texts for the template to cut or keep."""
        marks = unused_marks(chat_texts(messages, options))
        fenced = [self._fenced(message, marks, lenient=lenient) for message in messages]
        fence = partial(marks.fenced, tokens=self._fences[False])
        tools = [with_tool_texts(tool, fence) for tool in options.tools]
        if options.continue_final_message:
            fenced[-1] = replace(fenced[-1], content=f"{fenced[-1].content}{marks.cut} ")
        text = marks.plain(self._render(fenced, tools, self._style, options))
        if options.continue_final_message:
            text = marks.open_end(text)
        return marks.split(text, self._tokenizer.control_tokens)

    def _render(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool], style: TemplateStyle, options: ChatOptions
    ) -> str:
        messages, tools = written_out(messages, tools, style)
        seen = [template_message(message, style) for message in messages]
        return render(
            self._template, seen, self._tokenizer.special_tokens, options, [template_tool(tool) for tool in tools]
        )

    def _fenced(self, message: ChatMessage, marks: Marks, *, lenient: bool) -> ChatMessage:
        """The message with marks around its control tokens."""
        fence = partial(marks.fenced, tokens=self._fences[False])
        content = partial(marks.fenced, tokens=self._fences[lenient and message.role == "assistant"])
        return with_message_texts(message, fence, content)

    def _try(self, messages: Sequence[ChatMessage], tools: Sequence[Tool], style: TemplateStyle) -> str:
        """The text of a trial; "" when the template refuses it."""
        seen = [template_message(message, style) for message in messages]
        shown = [template_tool(tool) for tool in tools or self._probed_with]
        return try_render(self._template, seen, self._tokenizer.special_tokens, shown)

    def _show(self, messages: Sequence[ChatMessage]) -> str:
        return self._try(messages, (), self._style)

    def _needs_parts(self) -> bool:
        """Templates of some multimodal models read only lists of parts, and drop a plain string without a word."""
        probe = [ChatMessage("user", SENTINEL)]
        for parts in (False, True):
            if SENTINEL in self._try(probe, (), TemplateStyle(parts=parts)):
                return parts
        raise TokenizerError("The chat template does not show what a user message says.")

    def _tool_markers(self) -> tuple[str, ...]:
        """The markers around tool calls and results, the template's and those of what it leaves to us."""
        style = self._style
        ours = () if style.shows_tools and style.shows_calls and style.shows_results else GENERIC_MARKERS
        return (*find_tool_markers(self._show, self._tokenizer.control_tokens), *ours)

    def _defence(self, markers: Iterable[str], tags: Literal["reject", "escape"]) -> _Defence:
        turn_markers = TurnMarkers(markers, self._tokenizer, policy=tags, owner="this model's chat template")
        return _Defence(turn_markers, Disarmed(turn_markers.markers))

    def _controls(self, ids: list[int]) -> list[int]:
        control_ids = self._tokenizer.control_ids
        return [token_id for token_id in ids if token_id in control_ids]
