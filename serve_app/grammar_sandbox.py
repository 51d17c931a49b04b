"""A process that tries grammars, each in a fork of its own: `python -m serve_app.grammar_sandbox FOLDER`.

llguidance runs out of its stack on some grammars (a chain of 1,000 `$ref`, 4,000 rules), which ends its process, and
takes 22 s and 600 MB for some others (`multipleOf: 1234567`). Its own limits prevent neither. Here the kernel ends the
fork that tries such a grammar, and this process says why. What passes has been compiled with a small part of the stack
that an ordinary thread has, so a model replica can compile it without harm.

Promises an answer to every grammar, one after the other. Knows no request.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from serve_app.grammar import GrammarError, Vocabulary, VocabularyError, compile_grammar, load_vocabulary, matcher_error

CPU_LIMIT_S = 1.0
"""CPU time for one grammar. 1,000 properties take 0.15 s."""
MEMORY_LIMIT_BYTES = 2**29
"""Memory for one grammar."""
STACK_BYTES = 2**20
"""An eighth of the usual stack of a thread. 100 nested objects fit."""
NICENESS = 5

_SIZE = struct.Struct(">I")
_DEATHS: Mapping[int, str] = {
    signal.SIGPROF: f"it takes more than {CPU_LIMIT_S:g} s of CPU time to compile",
    signal.SIGSEGV: "it is nested too deeply",
    signal.SIGBUS: "it is nested too deeply",
    signal.SIGABRT: f"it takes more than {MEMORY_LIMIT_BYTES >> 20} MB of memory to compile",
}


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
    mask = matcher.compute_bitmask()
    if matcher.is_error():
        return f"the grammar can't be used: {matcher_error(matcher)}"
    return "" if any(mask) else "no output can match the grammar"


def try_in_fork(vocabulary: Vocabulary, grammar: str) -> str:
    """As `try_grammar`, within limits of time, memory and stack."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _limit()
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
    return _DEATHS.get(death, "it can't be compiled")


def _limit() -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)  # counts in the kernel: it ends Rust code, too
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
    """Say "" once the vocabulary is loaded, or why it can't be; then answer each grammar until the input ends."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the replies
    os.nice(NICENESS)
    try:
        vocabulary = load_vocabulary(Path(folder), trust_remote_code=trust_remote_code == "1")
    except VocabularyError as error:
        write_message(replies, str(error))
        return
    write_message(replies, "")
    while (grammar := read_message(requests)) is not None:
        write_message(replies, try_in_fork(vocabulary, grammar))


if __name__ == "__main__":
    main(*sys.argv[1:])
