"""Grammars of outputs: the vocabulary that they are compiled for, and compilation within limits (llguidance).

An ingress checks a request's grammar here and a model replica compiles it, with the same vocabulary and the same
limits. Knows no request, no sequence and no wire format.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_GRAMMAR_BYTES = 2**18
"""Of a grammar's text. OpenAI's limit for the strings of a schema is 120,000 characters."""
LIMITS = LLParserLimits(
    max_grammar_size=10_000,
    max_lexer_states=20_000,
    step_lexer_fuel=100_000,
    step_max_items=4_000,
    verbose_errors=False,  # else errors hold the output so far
)
"""Of one grammar. With llguidance's own limits a schema of 5,000 optional properties takes 4 s to compile; with 10,000
symbols 1,000 take 0.15 s (2 cores). With its 50,000 items a step, a mask of `e: e e | /[a-z ]/ | ""` takes up to 2.5 s;
ordinary grammars need fewer than 3,000 (50 tokens of 17 grammars). Its 200,000 units of fuel a step for the lexer last
27 ms. The states of the lexer are shared by all copies of a matcher."""

NO_EXTENSION = "no token that the grammar allows may come next"
"""Why an output can't go on, or begin, where no mask has a bit."""
_NICENESS = 10
"""Of the threads that load and compile."""
_ACCEPT_TOKEN = "<|the output may end here|>"


class GrammarError(Exception):
    """A grammar that can't be used. The message is one sentence for the caller, without a full stop."""


class VocabularyError(Exception):
    """No grammar can be used with this tokenizer. The message is one sentence for the caller, without a full stop."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The bytes of a model's tokens, in llguidance's form. Nothing in it changes, so threads share it freely."""

    tokenizer: LLTokenizer
    accept_id: int
    """An id that no model has, above all of the tokenizer's: where a mask allows it, the output may end. It stands for
    all ids that end an output, which differ from request to request; a grammar never allows those by itself."""

    @property
    def mask_words(self) -> int:
        """32-bit words of a mask: one bit for each id up to `accept_id`."""
        return self.accept_id // 32 + 1


def load_vocabulary(folder: Path, *, trust_remote_code: bool = False) -> Vocabulary:
    """The vocabulary of the tokenizer in `folder`; takes 0.5 s for 49,152 tokens and 4 s for 262,145 (2 cores).

    Raises `VocabularyError`.
    """
    try:
        return make_vocabulary(_description(folder, trust_remote_code))
    except Exception as error:  # what a broken file raises depends on how it is broken
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise VocabularyError(f"this model's tokenizer can't be used with a grammar: {reason}") from error


def start_loading(folder: Path, *, trust_remote_code: bool = False) -> Future[Vocabulary]:
    """`load_vocabulary` on a thread of its own, beside what else a process loads at its start."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="vocabulary", initializer=yield_to_others)
    try:
        return thread.submit(load_vocabulary, folder, trust_remote_code=trust_remote_code)
    finally:
        thread.shutdown(wait=False)  # it ends when it has loaded


def make_vocabulary(description: dict[str, Any]) -> Vocabulary:
    """The vocabulary of a tokenizer that is described as in tokenizer.json."""
    model = description["model"]["vocab"]
    ids = model.values() if isinstance(model, dict) else range(len(model))  # a list for Unigram
    accept_id = max(*ids, *(token["id"] for token in description["added_tokens"]), -1) + 1
    accept = {
        "id": accept_id,
        "content": _ACCEPT_TOKEN,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    added = [*description["added_tokens"], accept]
    text = json.dumps({**description, "added_tokens": added, "truncation": None, "padding": None})
    return Vocabulary(LLTokenizer(text, n_vocab=accept_id + 1, eos_token=accept_id), accept_id)


def compile_grammar(vocabulary: Vocabulary, grammar: str) -> LLMatcher:
    """A matcher at the beginning of an output, to be copied for each sequence.

    Takes 1 ms for a small schema, and drops Python's global lock meanwhile. The limits do not hold for every grammar:
    one that nobody has tried belongs into `grammar_sandbox` first.
    Raises `GrammarError`.
    """
    if len(grammar) > MAX_GRAMMAR_BYTES or len(grammar.encode(errors="replace")) > MAX_GRAMMAR_BYTES:
        raise GrammarError(f"the grammar is longer than {MAX_GRAMMAR_BYTES} bytes")
    try:
        matcher = LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=LIMITS)
    except ValueError as error:  # text that is not valid Unicode
        raise GrammarError(f"the grammar can't be read: {error}") from error
    mask = b"" if matcher.is_error() else matcher.compute_bitmask()  # it may fail, too; copies find its work done
    if matcher.is_error():
        raise GrammarError(f"the grammar can't be used: {matcher_error(matcher)}")
    if not any(mask):
        raise GrammarError(f"the grammar can't be used: {NO_EXTENSION}")
    return matcher


def yield_to_others() -> None:
    """Lower this thread's priority, where the system has priorities of threads (Linux).

    On a CPU the model computes on all cores, and each of its steps waits for the slowest of them.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def matcher_error(matcher: LLMatcher) -> str:
    """Why a matcher is in its state of error, in one line."""
    lines = [line.strip() for line in matcher.get_error().splitlines()]
    first = next((line for line in lines if line and line != "<non-verbose/>"), "unknown error")
    if first == "NoExtensionBias":
        return NO_EXTENSION
    # A regex that can't be read is shown over several lines; the last one says what is wrong.
    reason = next((line for line in lines[1:] if line.startswith("error: ")), "")
    return f"{first} {reason.removeprefix('error: ')}" if reason else first


def _description(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """A tokenizer as in tokenizer.json. Only a folder without that file is loaded by transformers.

    Loading by transformers takes 2.4 s and 200 MB for the demo model's tokenizer; reading the file 0.2 s and 30 MB.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    from transformers import AutoTokenizer  # takes seconds, and few models need it

    loaded = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, use_fast=True, trust_remote_code=trust_remote_code
    )
    return json.loads(loaded.backend_tokenizer.to_str())  # type: ignore[no-any-return]
