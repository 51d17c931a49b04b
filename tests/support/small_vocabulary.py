"""A vocabulary that the tiny models can have: 128 ids, of which the last two have no token, and random schemas."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache
from typing import Any

from hypothesis import strategies as st
from llguidance import LLMatcher
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from serve_app.grammar import Vocabulary, make_vocabulary

EOS = 1
_SPECIAL = ["<bos>", "<eos>"]
_MERGED = [
    '{"', '":', '",', '"}', '},', ':[', '["', '"]', "],", ":{", '":"', '","', "tr", "ue", "true", "al", "se", "alse",
    "false", "nu", "ll", "null", "00", "10", "ab", "abc", "na", "me",
]  # fmt: skip


@cache
def small_tokenizer() -> Tokenizer:
    """Printable ASCII, a newline, and some pairs: 126 tokens."""
    names = [*_SPECIAL, *map(chr, range(33, 127)), "Ġ", "Ċ", *_MERGED]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [
        next((name[:cut], name[cut:]) for cut in range(1, len(name)) if {name[:cut], name[cut:]} <= vocabulary.keys())
        for name in _MERGED
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name) for name in _SPECIAL])
    return tokenizer


@cache
def small_vocabulary() -> Vocabulary:
    return make_vocabulary(json.loads(small_tokenizer().to_str()))


def loaded() -> Future[Vocabulary]:
    """It, as an engine takes it."""
    future: Future[Vocabulary] = Future()
    future.set_result(small_vocabulary())
    return future


def ids_of(text: str) -> list[int]:
    ids: list[int] = small_tokenizer().encode(text).ids
    return ids


def text_of(ids: Sequence[int]) -> str:
    text: str = small_tokenizer().decode(list(ids))
    return text


def grammar_of(schema: dict[str, Any]) -> str:
    """Without white space, which a random model would never end."""
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


def _ranged(kind: str, low: str, high: str) -> Callable[[int, int], dict[str, Any]]:
    return lambda least, more: {"type": kind, low: least, high: least + more}


_values = st.sampled_from(["abc", "name", "abd", "", "null", 'a"b', 1, 10, 2.5, True, None])
_scalars = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(_ranged("integer", "minimum", "maximum"), st.integers(-99, 99), st.integers(0, 999)),
    st.builds(_ranged("string", "minLength", "maxLength"), st.integers(0, 2), st.integers(0, 3)),
    st.just({"type": "string", "pattern": "^[a-c]{1,3}[0-9]?$"}),
    st.builds(lambda values: {"enum": values}, st.lists(_values, min_size=1, max_size=4, unique_by=repr)),
)
_names = st.sampled_from(["a", "ab", "abc", "name", "null", 'q"', "x y"])


def _objects(values: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], optional: int) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties)[optional:],
            "additionalProperties": False,
        }

    return st.builds(build, st.dictionaries(_names, values, max_size=3), st.integers(0, 2))


def _compounds(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.builds(
        lambda items, sizes: {"items": items, **sizes},
        inner,
        st.builds(_ranged("array", "minItems", "maxItems"), st.integers(0, 1), st.integers(0, 2)),
    )
    return st.one_of(_objects(inner), arrays, st.lists(inner, min_size=2, max_size=3).map(lambda some: {"anyOf": some}))


schemas = st.recursive(_scalars, _compounds, max_leaves=5)
"""Schemas whose values end soon, of what JSON Schema's users write."""
