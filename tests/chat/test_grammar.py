"""Grammars from what callers give: everything that matches the grammar of a schema validates against it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from constrained_replica import ConstrainedModel
from exploring import cases
from fake_replica import generation_request
from hypothesis import given, settings
from hypothesis import strategies as st
from random_schemas import schemas

from serve_app.chat.grammar import (
    GrammarTextError,
    choice_grammar,
    ebnf_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from serve_app.core import SamplingParams
from serve_app.grammar import GrammarError, Vocabulary, compile_grammar, load_vocabulary

END = 2
LIMIT = 1500
"""Tokens; the tokenizer has 600 tokens, so most characters are one."""


@pytest.fixture(scope="session")
def vocabulary(tokenizer_folder: Path) -> Vocabulary:
    return load_vocabulary(tokenizer_folder)


@pytest.fixture(scope="session")
def model(vocabulary: Vocabulary) -> ConstrainedModel:
    return ConstrainedModel(vocabulary)


def written(model: ConstrainedModel, vocabulary: Vocabulary, grammar: str, seed: int = 1) -> str | None:
    """What a random model writes; None when it has not ended after `LIMIT` tokens. Raises `GrammarError`."""
    sampling = SamplingParams(seed=seed)
    request = generation_request(
        constraint=grammar, sampling=sampling, stop_token_ids=(END,), max_new_tokens=LIMIT
    )  # fmt: skip
    matcher = model.matcher(request)
    assert matcher is not None
    ids: list[int] = []
    while not matcher.is_stopped():
        if len(ids) == LIMIT:
            return None
        token = model.token(request, matcher, len(ids))
        if token == END:
            break
        matcher.consume_token(token)
        ids.append(token)
    if matcher.is_error():
        raise GrammarError(matcher.get_error())
    return vocabulary.tokenizer.decode_bytes(ids).decode()


def matches(vocabulary: Vocabulary, grammar: str, text: str) -> bool:
    matcher = compile_grammar(vocabulary, grammar)
    ids = vocabulary.tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def test_what_ends_validates(model: ConstrainedModel, vocabulary: Vocabulary) -> None:
    """What ends validates; most schemas are taken, and their outputs mostly end.

    50 random schemas, and with `--hypothesis-profile=explore` 200 others each time.
    """
    outcomes: Counter[str] = Counter()
    examples = cases(50, exploring=200)

    @settings(max_examples=examples)
    @given(schema=schemas, seed=st.integers(0, 2**32))
    def check(schema: dict[str, Any], seed: int) -> None:
        try:
            text = written(model, vocabulary, json_schema_grammar(schema), seed)
        except (GrammarTextError, GrammarError):
            outcomes["refused"] += 1
            return
        outcomes["ended" if text is not None else "cut"] += 1
        if text is not None:
            jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)

    check()
    total = sum(outcomes.values())
    assert total >= examples
    assert outcomes["ended"] >= 0.6 * total, outcomes
    assert outcomes["cut"] <= 0.05 * total, outcomes


def test_it_is_compact_and_in_the_order_of_the_schema(vocabulary: Vocabulary) -> None:
    grammar = json_schema_grammar({"type": "object", "properties": {"b": {}, "a": {"type": "array"}}})
    for text in ('{"b":1,"a":[1,2]}', '{"b": 1, "a": [1, 2]}', "{}", '{"a": [], "c": {"d": 1}}'):
        assert matches(vocabulary, grammar, text), text
    for text in ('{ "b":1}', '{"b":  1}', '{"b" :1}', '{"a":[],"b":1}', '{"b":1}\n', '{\n"b":1}'):
        assert not matches(vocabulary, grammar, text), text


def test_no_property_has_a_second_name(vocabulary: Vocabulary) -> None:
    grammar = json_schema_grammar({"type": "object", "properties": {"a": {"type": "integer"}}})
    assert matches(vocabulary, grammar, '{"a":1,"b":"x"}')
    for text in ('{"\\u0061":"x"}', '{"a":1,"a":"x"}', '{"b":"\\ud800"}'):
        assert not matches(vocabulary, grammar, text), text


def test_unknown_formats_describe_and_known_ones_bind(vocabulary: Vocabulary) -> None:
    def of(format_: Any) -> dict[str, Any]:
        return {"type": "object", "properties": {"format": {"type": "string", "format": format_}}}

    assert matches(vocabulary, json_schema_grammar(of("password")), '{"format":"x"}')
    assert not matches(vocabulary, json_schema_grammar(of("date")), '{"format":"x"}')
    assert matches(vocabulary, json_schema_grammar({"anyOf": [of("path")]}), '{"format":"x"}')
    constant = {"const": {"format": "password"}}
    assert matches(vocabulary, json_schema_grammar(constant), '{"format":"password"}')


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"x-guidance": {}}, "x-guidance"),
        ({"minProperties": 2}, "minProperties"),
        ({"anyOf": [{"required": ["a"], "minProperties": 3}]}, "minProperties"),
        ({"const": float("nan")}, "JSON"),
    ],
)
def test_what_can_not_be_enforced_is_refused(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(GrammarTextError, match=says):
        json_schema_grammar(schema)


def test_a_schema_is_not_changed_and_equal_ones_make_equal_grammars() -> None:
    schema = {"properties": {"a": {"format": "password"}}, "items": [{"format": "x"}, True], "minProperties": 1}
    before = json.dumps(schema)
    assert json_schema_grammar(schema) == json_schema_grammar(json.loads(before))
    assert json.dumps(schema) == before


def test_true_is_any_value_and_false_is_none(vocabulary: Vocabulary) -> None:
    assert matches(vocabulary, json_schema_grammar(True), '[1, {"a": null}]')
    with pytest.raises(GrammarError):
        compile_grammar(vocabulary, json_schema_grammar(False))


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (regex_grammar(r"[a-c]{2,4}/\d"), r"[a-c]{2,4}/[0-9]"),
        (regex_grammar("^a|b$"), "a|b"),
        (regex_grammar("a\nb"), "a\nb"),
        (regex_grammar(""), ""),
        (choice_grammar(["yes", "no", 'a "b"', "é\n"]), 'yes|no|a "b"|é\n'),
        (choice_grammar([f"value {index}" for index in range(3000)]), r"value \d+"),
        (lark_grammar('start: "a" B\nB: /x+/'), "ax+"),
        (ebnf_grammar('root ::= "a" | "b"'), "a|b"),
        (ebnf_grammar('start: "a" | "b"'), "a|b"),
        (json_object_grammar(), r"\{.*\}"),
    ],
)
def test_other_grammars(model: ConstrainedModel, vocabulary: Vocabulary, grammar: str, pattern: str) -> None:
    for seed in range(5):
        text = written(model, vocabulary, grammar, seed)
        assert text is not None
        assert re.fullmatch(pattern, text, re.DOTALL), text


@pytest.mark.parametrize("name", ["<|im_end|>", "<[2]>", "<[1-5, 7]>"])
def test_a_grammar_of_a_caller_names_no_tokens(name: str) -> None:
    with pytest.raises(GrammarTextError, match="token"):
        lark_grammar(f'start: "a" {name}')
    assert lark_grammar(f'start: "{name}" /{name}/ // {name}\n# {name}')


def test_half_a_character_is_no_regular_expression() -> None:
    with pytest.raises(GrammarTextError):
        regex_grammar("\ud800")


@pytest.mark.parametrize("option", ["max_tokens=5", "temperature=0.5", 'stop="x"', "capture, max_tokens = 5"])
def test_options_that_would_change_the_sampling_are_refused(option: str) -> None:
    with pytest.raises(GrammarTextError, match="option"):
        lark_grammar(f"start: a\na[{option}]: /.*/")
    assert lark_grammar("start: a\na[lazy]: /.*b/")
