"""A process that tries grammars, each in a fork of its own: `python -m serve_app.grammar_sandbox FOLDER`.

llguidance runs out of its stack on some grammars (a chain of 1,000 `$ref`, 4,000 rules), which ends its process, and
takes 22 s and 600 MB for some others (`multipleOf: 1234567`). Its own limits prevent neither. Here the kernel ends the
fork that tries such a grammar, and this process says why. What passes has been compiled with a small part of the stack
that an ordinary thread has, so a model replica can compile it without harm. Then some outputs are tried: other
grammars are compiled quickly and reach llguidance's limits after some tokens.

Promises an answer to every grammar, one after the other. Knows no request.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import struct
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from llguidance import LLMatcher

from serve_app.grammar import (
    NO_EXTENSION,
    GrammarError,
    Vocabulary,
    VocabularyError,
    compile_grammar,
    load_vocabulary,
    matcher_error,
)

CPU_LIMIT_S = 1.0
"""CPU time for one grammar. 1,000 properties take 0.15 s."""
TOO_SLOW = f"it takes more than {CPU_LIMIT_S:g} s of CPU time to compile and to try"
MEMORY_LIMIT_BYTES = 2**29
"""Memory for one grammar."""
STACK_BYTES = 2**20
"""An eighth of the usual stack of a thread. 100 nested objects fit."""
NICENESS = 5
WALKS = 6
WALK_TOKENS = 32
MEAN_LIMIT_S = 0.005
"""Of CPU time for a mask. For the demo's vocabulary, masks of ordinary grammars take 0.02 to 0.3 ms."""
IS, OUT_OF_TIME, NOT_TRIED = "=", "+", "!"
"""How a reply begins: the verdict follows, or nothing, or the reason."""

_SIZE = struct.Struct(">I")
_DEATHS: Mapping[int, str] = {
    signal.SIGSEGV: "it is nested too deeply",
    signal.SIGBUS: "it is nested too deeply",
    signal.SIGABRT: f"it takes more than {MEMORY_LIMIT_BYTES >> 20} MB of memory to compile",
}


class OutOfTime(Exception):
    """The limit of CPU time has ended the try."""


class NotTried(Exception):
    """The grammar could not be tried, for a reason that is not in it. The message is a part of a sentence."""


def write_message(stream: BinaryIO, text: str) -> None:
    """Write a text as one message."""
    content = text.encode(errors="surrogatepass")
    stream.write(_SIZE.pack(len(content)) + content)
    stream.flush()


def read_message(stream: BinaryIO) -> str | None:
    """The next message; None where the stream ends."""
    head = stream.read(_SIZE.size)
    if len(head) < _SIZE.size:
        return None
    content = stream.read(_SIZE.unpack(head)[0])
    return content.decode(errors="surrogatepass")


def try_grammar(vocabulary: Vocabulary, grammar: str) -> str:
    """What is wrong with a grammar; "" when it can be used."""
    try:
        matcher = compile_grammar(vocabulary, grammar)
    except GrammarError as error:
        return str(error)
    return later_fault(vocabulary, matcher)


def later_fault(vocabulary: Vocabulary, matcher: LLMatcher) -> str:
    """Why a grammar that can be compiled would fail in the middle of an output, as far as a few outputs show it; or "".

    The outputs are random, but the same each time: some of any tokens, some of short ones, which are read in the most
    ways, some of long ones, and some that repeat a token where they may.
    """
    start, masks = time.thread_time(), 0
    for seed in range(WALKS):
        chance, walked, last = random.Random(seed), matcher.deep_copy(), -1
        for length in range(WALK_TOKENS):
            mask = walked.compute_bitmask()
            masks += 1
            if walked.is_error():
                if (reason := matcher_error(walked)) == NO_EXTENSION:
                    break  # another output need not come there
                return f"the grammar can't be used: after {length} tokens of an output: {reason}"
            if (mean_s := (time.thread_time() - start) / masks) > MEAN_LIMIT_S and masks >= WALK_TOKENS // 2:
                return (
                    "the grammar can't be used: it is too ambiguous; to find what may come next takes "
                    f"{1000 * mean_s:.1f} ms on average, and may take {1000 * MEAN_LIMIT_S:g} ms"
                )
            if (last := _choice(vocabulary, mask, chance, seed, last)) < 0:
                break
            walked.consume_token(last)
    return ""


def _choice(vocabulary: Vocabulary, mask: bytes, chance: random.Random, seed: int, last: int) -> int:
    """One of the ids of a mask; -1 if there is none."""
    if seed % 4 == 3 and last >= 0 and mask[last // 8] >> last % 8 & 1:
        return last
    ids = [_random_id(mask, chance) for _ in range(8 if seed % 4 else 1)]
    ids = [token_id for token_id in ids if token_id not in (-1, vocabulary.accept_id)]
    if not ids:
        return -1
    sizes = {token_id: len(vocabulary.tokenizer.decode_bytes([token_id])) for token_id in ids}
    return max(ids, key=sizes.__getitem__) if seed % 4 == 2 else min(ids, key=sizes.__getitem__)


def _random_id(mask: bytes, chance: random.Random) -> int:
    """An id of a mask, not all equally likely; -1 if it has none."""
    place = chance.randrange(len(mask))
    around = mask[place:] + mask[:place]
    rest = around.lstrip(b"\0")
    if not rest:
        return -1
    octet = rest[0]
    bit = chance.choice([bit for bit in range(8) if octet >> bit & 1])
    return (place + len(around) - len(rest)) % len(mask) * 8 + bit


def try_in_fork(vocabulary: Vocabulary, grammar: str, cpu_limit_s: float = CPU_LIMIT_S) -> str:
    """As `try_grammar`, within limits of time, memory and stack. Raises `OutOfTime` and `NotTried`."""
    reader, writer = os.pipe()
    try:
        child = os.fork()
    except OSError as error:
        os.close(reader)
        os.close(writer)
        raise NotTried(f"no process can be started for it: {error}") from error
    if child == 0:
        try:
            os.close(reader)
            _limit(cpu_limit_s)
            said = _on_small_stack(vocabulary, grammar)
            with open(writer, "wb") as pipe:
                write_message(pipe, said)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        verdict = read_message(pipe)
    _, status = os.waitpid(child, 0)
    if verdict is not None:
        return verdict
    death = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if death == signal.SIGPROF:
        raise OutOfTime
    if death not in _DEATHS:  # such as SIGKILL, when the machine has no memory left
        raise NotTried(f"the process that tried it was ended by signal {death}" if death else "the process ended")
    return _DEATHS[death]


def _limit(cpu_limit_s: float) -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)  # counts in the kernel: it ends Rust code, too
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.is_file():
        in_use = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_LIMIT_BYTES,) * 2)


def _on_small_stack(vocabulary: Vocabulary, grammar: str) -> str:
    said: list[str] = []

    def work() -> None:
        try:
            said.append(try_grammar(vocabulary, grammar))
        except BaseException as error:  # noqa: BLE001 - a panic of Rust code is no Exception
            said.append(f"it can't be compiled: {type(error).__name__}")

    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return said[0]


def main(folder: str, trust_remote_code: str) -> None:
    """Say "" once the vocabulary is loaded, or why it can't be; then answer each request until the input ends.

    A request is a limit of CPU time in seconds, a newline and a grammar.
    """
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the replies
    os.nice(NICENESS)
    try:
        vocabulary = load_vocabulary(Path(folder), trust_remote_code=trust_remote_code == "1")
    except VocabularyError as error:
        write_message(replies, str(error))
        return
    write_message(replies, "")
    while (request := read_message(requests)) is not None:
        cpu_limit_s, _, grammar = request.partition("\n")
        try:
            reply = IS + try_in_fork(vocabulary, grammar, float(cpu_limit_s))
        except OutOfTime:
            reply = OUT_OF_TIME
        except NotTried as error:
            reply = f"{NOT_TRIED}{error}"
        write_message(replies, reply)


if __name__ == "__main__":
    main(*sys.argv[1:])
