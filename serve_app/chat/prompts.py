"""Turns the messages or the raw prompt of a request into ids: whatever starts a generation uses this module.

Promises ids that leave room for an answer, or a `PromptError`. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from serve_app.chat.answers import AnswerFormat, AnswerFormats
from serve_app.chat.constraints import Constraints
from serve_app.chat.conversation import ChatMessage, Unknown, parse_messages, refuse_unknown
from serve_app.chat.detokenizer import new_detokenizer
from serve_app.chat.gaps import gap_format
from serve_app.chat.json_values import count_values
from serve_app.chat.llama2 import Llama2Format
from serve_app.chat.options import DEFAULT_OPTIONS, ChatOptions, Tool
from serve_app.chat.prompt_error import PromptError, context_exceeded
from serve_app.chat.templates import ChatTemplate
from serve_app.chat.texts import tool_texts
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.config import ChatConfig

_READ_TOKENS = 16
"""Tokens at the end of a prompt that tell whether it has begun the model's reasoning."""


class ChatFormat(Protocol):
    """How one family of models writes a chat."""

    variables: frozenset[str]
    """Names that `ChatOptions.variables` may set."""
    shows_tools: bool
    """The model's template has a form of its own for tools. Else they are written as `generic_tools` does."""
    shows_reasoning: bool
    """The model's template reads the reasoning of earlier answers."""

    def encode(self, messages: Sequence[ChatMessage], options: ChatOptions = DEFAULT_OPTIONS) -> list[int]:
        """The prompt's ids, BOS included where the format has one. Raises `PromptError`."""
        ...


class PromptFormatter:
    """Turns messages and raw prompts into ids. Safe to use from any number of threads at once."""

    def __init__(self, tokenizer: ChatTokenizer, config: ChatConfig) -> None:
        """Uses the format that the config names; `auto` is `llama2` only when the template contains `<<SYS>>`.

        Raises `TokenizerError` when the model can't be served in that format or its text can't be streamed,
        `ValueError` when the tokenizer was loaded without the config's template.
        """
        new_detokenizer(tokenizer)  # raises for text that can't be streamed: now, and not at the first answer
        template = tokenizer.template
        if config.template is not None and config.template != template:
            raise ValueError("load the tokenizer with the config's template: its control tokens depend on it")
        self.tokenizer = tokenizer
        self._chat_format: ChatFormat | None = None
        """None: the model has no chat template, and chats are refused."""
        if config.format == "llama2" or (config.format == "auto" and template is not None and "<<SYS>>" in template):
            self._chat_format = Llama2Format(tokenizer, tags=config.llama2_tags)
        elif config.format == "template" or template is not None:
            self._chat_format = ChatTemplate(tokenizer, tags=config.llama2_tags)
        self._gap_format = gap_format(tokenizer)
        templates = (template or "") + (tokenizer.tool_template or "")
        self._constraints = Constraints(templates, tokenizer.added_tokens)
        self.answers = AnswerFormats(
            templates,
            tokenizer.skipped_tokens,
            shows_tools=self.shows_tools,
            declared=tokenizer.response_template,
            tool_format=config.tool_format,
            reasoning_format=config.reasoning_format,
        )

    @property
    def template_variables(self) -> frozenset[str]:
        """Variables of the chat template that callers may set."""
        return frozenset() if self._chat_format is None else self._chat_format.variables

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        options: ChatOptions = DEFAULT_OPTIONS,
        *,
        context_tokens: int | None = None,
        unknown: Unknown = refuse_unknown,
    ) -> list[int]:
        """The ids of a chat, from the request's `messages` as decoded from JSON.

        With `context_tokens`, prompts that leave no room for an answer in the context are refused, obviously too long
        ones before they are encoded. `unknown` is as in `parse_messages`. Raises `PromptError`.
        """
        if self._chat_format is None:
            raise PromptError(
                "This model has no chat template, so it can't take messages; send a prompt instead.", param="messages"
            )
        parsed = parse_messages(messages, unknown, keep_reasoning=self._chat_format.shows_reasoning)
        if options.tool_choice.mode == "none":
            options = replace(options, tools=())
        fewest = sum(map(self._fewest_message_tokens, parsed))
        _require_room(fewest, context_tokens, "messages", counted="at least ")
        fewest += sum(map(self._fewest_tool_tokens, options.tools))
        _require_room(fewest, context_tokens, "messages and tools", counted="at least ")
        if options.continue_final_message:
            _require_open_end(parsed)
        ids = self._chat_format.encode(parsed, options)
        _require_room(len(ids), context_tokens, "messages")
        return ids

    @property
    def shows_tools(self) -> bool:
        """The model's chat template has a form of its own for tools. Else they are written as `generic_tools` does."""
        return self._chat_format is not None and self._chat_format.shows_tools

    def _fewest_message_tokens(self, message: ChatMessage) -> int:
        """A lower bound. Every message costs a token at least, and templates may take more than linear time in their
        number. So does every value in a call's arguments."""
        calls = sum(max(count_values(c.arguments), self.tokenizer.fewest_tokens(c.text)) for c in message.tool_calls)
        return max(1, self.tokenizer.fewest_tokens(message.content)) + calls

    def _fewest_tool_tokens(self, tool: Tool) -> int:
        """A lower bound, unless the template leaves out parts of a schema."""
        texts = sum(map(len, tool_texts(tool))) // self.tokenizer.longest_token_chars
        return max(count_values(tool.parameters), texts)

    def answer_format(self, ids: Sequence[int], options: ChatOptions = DEFAULT_OPTIONS) -> AnswerFormat | None:
        """How the answer to the chat with these ids is read; None: it is text and nothing else."""
        if self._chat_format is None:
            return None
        return self.answers.of(self.tokenizer.shown(ids[-_READ_TOKENS:]), options)

    def constraint(self, options: ChatOptions, answer: AnswerFormat | None) -> str:
        """What the answer to a chat with these options must match; see `GenerationRequest.constraint`."""
        return self._constraints.of(options, answer)

    def render_text(
        self, prompt: str, *, parse_special: bool = False, add_bos: bool = True, context_tokens: int | None = None
    ) -> list[int]:
        """The ids of a raw prompt, with the BOS that the model's prompts normally begin with.

        Control tokens in it are text unless `parse_special`. Raises `PromptError`, also for a prompt without any id.
        """
        _require_room(self.tokenizer.fewest_tokens(prompt), context_tokens, "prompt", counted="at least ")
        ids = self.tokenizer.encode_text(prompt, add_bos=add_bos, parse_special=parse_special)
        if not ids:
            raise PromptError("The prompt is empty.", param="prompt")
        _require_room(len(ids), context_tokens, "prompt")
        return ids

    def render_gap(
        self, prefix: str, suffix: str, *, parse_special: bool = False, context_tokens: int | None = None
    ) -> tuple[list[int], tuple[int, ...]]:
        """The ids of a prompt whose answer belongs between two texts, and the ids that end such an answer.

        The texts are read as in `render_text`. Raises `PromptError`, also for a model without tokens for that.
        """
        if self._gap_format is None:
            message = "This model has no tokens for the text after a gap (fill-in-the-middle); leave suffix out."
            raise PromptError(message, param="suffix", code="unsupported_parameter")
        fewest = self.tokenizer.fewest_tokens(prefix) + self.tokenizer.fewest_tokens(suffix)
        _require_room(fewest, context_tokens, "prompt", counted="at least ")
        ids = self._gap_format.encode(prefix, suffix, parse_special=parse_special)
        _require_room(len(ids), context_tokens, "prompt")
        return ids, self._gap_format.ends


def _require_open_end(messages: Sequence[ChatMessage]) -> None:
    """Raise `PromptError` unless the last message is one that the assistant has begun."""
    where, last = f"messages[{len(messages) - 1}]", messages[-1]
    if last.role != "assistant":
        raise PromptError("continue_final_message needs an assistant's message at the end.", param=where)
    if last.tool_calls:
        message = "The last message has tool calls: there is nothing to continue."
        raise PromptError(message, param=f"{where}.tool_calls")
    if not last.content.strip():
        raise PromptError("The last message is empty: there is nothing to continue.", param=f"{where}.content")


def _require_room(tokens: int, context_tokens: int | None, param: str, counted: str = "") -> None:
    if context_tokens is not None and tokens >= context_tokens:
        raise context_exceeded(context_tokens, tokens, param, counted=counted)
