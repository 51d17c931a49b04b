"""Meta's Llama-2 chat format, to the id.

Promises what `chat_completion` of Meta's reference does (github.com/meta-llama/llama, llama/generation.py): BOS and EOS
are ids and never text, and each finished pair of turns is encoded apart. Knows no Jinja.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from serve_app.chat.conversation import ChatMessage
from serve_app.chat.generic_tools import GENERIC_MARKERS, written_out
from serve_app.chat.options import DEFAULT_OPTIONS, ChatOptions
from serve_app.chat.prompt_error import PromptError
from serve_app.chat.template_style import TemplateStyle
from serve_app.chat.texts import uses_tools
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.chat.tokenizer_error import TokenizerError
from serve_app.chat.tool_turns import arranged
from serve_app.chat.turn_markers import TurnMarkers

_BEGIN_INST, _END_INST = "[INST]", "[/INST]"
_BEGIN_SYSTEM, _END_SYSTEM = "<<SYS>>\n", "\n<</SYS>>\n\n"
TAGS = (_BEGIN_INST, _END_INST, "<<SYS>>", "<</SYS>>")

_STYLE = TemplateStyle()
"""The format knows nothing of tools."""

_GOLDEN_TEXT = "[INST] Hi [/INST]"
_GOLDEN_IDS = [1, 518, 25580, 29962, 6324, 518, 29914, 25580, 29962]
_LLAMA_TOKENS = {1: "<s>", 2: "</s>", 518: "▁[", 25580: "INST", 6324: "▁Hi", 29962: "]", 29914: "/"}
"""A vocabulary with these tokens is Llama's (of Llama-2 and its relatives: Code Llama, Vicuna, TinyLlama)."""


class Llama2Format:
    """Encodes chats for Llama-2. Safe to use from any number of threads at once."""

    def __init__(self, tokenizer: ChatTokenizer, *, tags: Literal["reject", "escape"] = "reject") -> None:
        """`tags`: what to do with the format's tags in user and system text.

        They are ordinary subwords, so no tokenizer can keep them from being read as turns: refuse them (Meta's rule),
        or break them with a zero-width joiner. Raises `TokenizerError` without BOS and EOS, or when a Llama tokenizer
        doesn't give Llama-2's ids.
        """
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise TokenizerError("Llama-2's chat format needs a tokenizer with a BOS and an EOS token.")
        self._tokenizer = tokenizer
        owner = "the Llama-2 chat format"
        self._markers = TurnMarkers(TAGS, tokenizer, policy=tags, owner=owner)
        self._with_tools = TurnMarkers((*TAGS, *GENERIC_MARKERS), tokenizer, policy=tags, owner=owner)
        self._bos = tokenizer.bos_token_id
        self._eos = tokenizer.eos_token_id
        check_golden_ids(tokenizer)

    variables: frozenset[str] = frozenset()
    """Empty, since this format has no template."""
    shows_tools = False
    shows_reasoning = False

    def encode(self, messages: Sequence[ChatMessage], options: ChatOptions = DEFAULT_OPTIONS) -> list[int]:
        """The prompt's ids. Raises `PromptError` for turns out of order or for a tag under `reject`."""
        markers = self._with_tools if uses_tools(messages, options) else self._markers
        guarded, options = markers.guarded_chat(messages, options)
        written, _ = written_out(arranged(guarded, one_call=False), options.tools, _STYLE)
        turns = _turns(written, open_answer=options.continue_final_message)
        opened = f" {turns.pop()}" if options.continue_final_message else ""
        ids: list[int] = []
        for user, answer in zip(turns[:-1:2], turns[1::2], strict=True):
            ids += self._encode(f"{_BEGIN_INST} {user} {_END_INST} {answer} ")
            ids.append(self._eos)
        return ids + self._encode(f"{_BEGIN_INST} {turns[-1]} {_END_INST}{opened}")

    def _encode(self, text: str) -> list[int]:
        return [self._bos, *self._tokenizer.encode_text(text, add_bos=False, parse_special=False)]


def check_golden_ids(tokenizer: ChatTokenizer) -> None:
    """Raise `TokenizerError` when a tokenizer with Llama's vocabulary doesn't encode as Meta's does.

    Some converted tokenizers get the first space wrong. Any other vocabulary has no golden ids and passes.
    """
    if any(tokenizer.token_at(token_id) != token for token_id, token in _LLAMA_TOKENS.items()):
        return
    ids = [_GOLDEN_IDS[0], *tokenizer.encode_text(_GOLDEN_TEXT, add_bos=False, parse_special=False)]
    if ids != _GOLDEN_IDS:
        raise TokenizerError(
            f"This tokenizer has Llama's vocabulary but encodes {_GOLDEN_TEXT!r} as {ids}, where Llama-2's own gives "
            f"{_GOLDEN_IDS}: it was converted wrongly. Use the model's original tokenizer files."
        )


def _turns(messages: Sequence[ChatMessage], *, open_answer: bool) -> list[str]:
    """The stripped texts of user, assistant, user, ... with the system text folded into the first. The last text is a
    user's, or with `open_answer` the assistant's.

    Stripped after folding, as Meta does: the system text keeps its own spaces.
    """
    system = ""
    if messages and messages[0].role in ("system", "developer"):
        system = f"{_BEGIN_SYSTEM}{messages[0].content}{_END_SYSTEM}"
        messages = messages[1:]
    expected = ("user", "assistant")
    in_turn = all(message.role == expected[index % 2] for index, message in enumerate(messages))
    if not messages or len(messages) % 2 == open_answer or not in_turn:
        raise PromptError(
            "Llama-2 takes an optional system message first, then user and assistant in turn, and a user message last "
            "(the assistant's with continue_final_message).",
            param="messages",
        )
    first, *rest = messages
    return [(system + first.content).strip(), *(message.content.strip() for message in rest)]
