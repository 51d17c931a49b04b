"""llama.cpp's grammars, read and matched."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from line_count import lines_run
from llguidance import LLMatcher
from small_tokenizers import byte_level_backend

from serve_app.chat.gbnf import GbnfError, gbnf_to_lark, is_lark
from serve_app.grammar import Vocabulary, compile_grammar, make_vocabulary

JSON = r"""
# llama.cpp's grammars/json.gbnf
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws

string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws

# Optional space: by convention, applied in this grammar after literal chars when allowed
ws ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return make_vocabulary(json.loads(byte_level_backend().to_str()))


def matches(vocabulary: Vocabulary, grammar: str, text: str) -> bool:
    matcher = compile_grammar(vocabulary, LLMatcher.grammar_from_lark(gbnf_to_lark(grammar)))
    ids = vocabulary.tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("grammar", "yes", "no"),
    [
        (JSON, ['{"a": [1, 2.5e3, {"b":"\\u00e9\\n"}],\n  "c":true}', "{}"], ['{"a" 1}', "[]", '{"a": tru}']),
        ('root ::= "a" | \nb ::= "x"', ["a", ""], ["x"]),
        ('root ::= "é\\u00e9\\x41\\U0001F642" .', ["ééA🙂\n"], ["ééA🙂", "e"]),
        ("root ::= [^\\]a-c-]+", ["xyz", "\n"], ["a", "]", "-", ""]),
        ("root ::= [a-]+", ["a-a"], ["b"]),
        ('root ::= a-b\na-b ::= "x"{2,3}', ["xx", "xxx"], ["x", "xxxx"]),
        ('root ::= "x"{2} "y"{1,} "z"{0,1}', ["xxy", "xxyyz"], ["xy", "xxz"]),
        ('root ::= ("a" | "b")+', ["abab"], ["", "c"]),
        ('root ::= A\nA ::= B "x" | "y"\nB ::= A', ["y", "yxx"], ["x"]),
        ('root ::= Foo foo\nFoo ::= "1"\nfoo ::= "2"', ["12"], ["21", "11"]),
        ('root ::= [+*/&&~~^"\\\\]+', ['"/&~^\\+*'], ["a"]),
        ('root ::= "/" "\\\\" "\\""', ['/\\"'], ["/"]),
        ('root::="a"#end', ["a"], ["b"]),
    ],
)
def test_it_is_the_same_language(vocabulary: Vocabulary, grammar: str, yes: list[str], no: list[str]) -> None:
    assert not is_lark(grammar)
    assert [matches(vocabulary, grammar, text) for text in yes + no] == [True] * len(yes) + [False] * len(no)


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        ("", "root is missing"),
        ('a ::= "x"', "root is missing"),
        ("root ::= x", "rule x is missing"),
        ('root = "a"', "a rule is expected in line 1"),
        ('root ::= "a"\nroot ::= "b"', "defined twice in line 2"),
        ('root ::= "a', "can't be read in line 1"),
        ("root ::= [b", "can't be read"),
        ("root ::= []", "empty"),
        ("root ::= [^]", "empty"),
        ("root ::= *", "repeats nothing"),
        ('root ::= "a"**', "repeats nothing"),
        ('root ::= "\\q"', "escape \\q is unknown in line 1"),
        ('root ::= "\\ud800"', "no character"),
        ("root ::= <[5]>", "can't be read"),
    ],
)
def test_what_is_no_grammar_says_where(grammar: str, says: str) -> None:
    with pytest.raises(GbnfError) as refused:
        gbnf_to_lark(grammar)
    assert says in str(refused.value)


def test_rules_without_recursion_are_terminals() -> None:
    lark = gbnf_to_lark('root ::= a b\na ::= "x" c\nc ::= [0-9]+\nb ::= "(" b ")" | a')
    assert lark.split("\n") == ["start: T1 r3", 'T1: "x" T2', "T2: /[0-9]+/", 'r3: "(" r3 ")" | T1']


@pytest.mark.parametrize("lark", ['start: "a"', '%llguidance {}\nx: "a"', '// a\n  start : "a"', "start[lazy]: /a/"])
def test_larks_own_syntax_is_told_apart(lark: str) -> None:
    assert is_lark(lark)


@pytest.mark.parametrize(
    "part",
    ['a{} ::= "x" a{} | [a-z]+\n', "( ", "\n", '"', "[a", "#", "a ::= b\n", "\\", "{1,", " \t"],
)
def test_the_work_grows_with_the_length_alone(part: str) -> None:
    def lines(size: int) -> int:
        repeated = "".join(part.replace("{}", str(index)) for index in range(size // len(part)))
        text = f"root ::= {repeated}"

        def read() -> None:
            is_lark(text)
            with suppress(GbnfError):
                gbnf_to_lark(text)

        return lines_run(read)

    assert lines(20_000) < 2.2 * lines(10_000) + 100
