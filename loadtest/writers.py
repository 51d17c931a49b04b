"""What does a protocol cost? CPU of writing the events of one answer, by token, without Ray, model or connection.

`python -m loadtest.writers` gives the same deltas (one token each) to the writer of every protocol, in turns. It prints
microseconds a token and the difference to /stream. For gRPC it runs the application's side of a call too: the events
of /stream are read again, made into messages and serialised. What all protocols share is left out: the deltas
themselves and the connection.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from serve_app.api.anthropic.events import MessageWriter
from serve_app.api.grpc.servicer import Servicer
from serve_app.api.http.endpoint import DOCUMENT
from serve_app.api.native import NativeFormat
from serve_app.api.openai.chat import ChatFormat
from serve_app.api.openai.completions import TextFormat
from serve_app.api.responses.ids import new_response_id
from serve_app.api.responses.writer import ResponseWriter
from serve_app.chat.answers import AnswerFormat
from serve_app.chat.prompts import PromptFormatter
from serve_app.chat.token_texts import TokenTexts
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.config import ChatConfig
from serve_app.core import (
    Fingerprint,
    FinishReason,
    GenerationDefaults,
    GenerationRequest,
    LoadStage,
    ModelCard,
    Reply,
    SamplingParams,
    TokenBatch,
    TokenLogprobs,
)
from serve_app.generation.completion import Completion, Usage
from serve_app.generation.events import EventWriter
from serve_app.generation.request import ResolvedRequest
from serve_app.generation.service import CompletionService
from serve_app.generation.text import Delta
from serve_app.proto import serve_app_pb2

TEXT = Path(__file__).with_name("quality.txt")
TARGET_US = 50.0
"""Most that a protocol may cost a token more than /stream."""
TOKENS, ROUNDS = 1_000, 15
TOP = 2
"""Likely tokens beside each token that has logprobs."""
BASE = "stream"
WHAT = ("text", "calls", "logprobs")
_TOOLS = {"note": {"text": True}}


@dataclass(frozen=True, slots=True)
class Work:
    """One answer as its writers get it."""

    request: ResolvedRequest
    deltas: Sequence[Delta]
    usage: Usage


class _NoReplica:
    """The `ReplicaClient` of a service that only writes."""

    def open(self, request: GenerationRequest) -> AsyncGenerator[Reply, None]:
        raise NotImplementedError

    async def model(self) -> ModelCard | LoadStage:
        raise NotImplementedError


def small_tokenizer() -> ChatTokenizer:
    """Byte-level BPE of 2,000 tokens, learned from `TEXT`: its tokens are about as long as those of a model's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2_000, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT.read_text()], trainer)
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)
        return ChatTokenizer.load(Path(folder))


def work(tokenizer: ChatTokenizer, what: str, tokens: int) -> Work:
    """An answer of `tokens` tokens: text, a tool call with a long argument, or text with logprobs."""
    text = " ".join([TEXT.read_text()] * (1 + tokens // 1_000))
    answer = None
    if what == "calls":
        text = '<tool_call>{"name": "note", "arguments": {"text": ' + json.dumps(text)[:-1]
        answer = AnswerFormat(tool_format="hermes", tools=_TOOLS)
    ids = tokenizer.encode_text(text, add_bos=False, parse_special=False)[:tokens]
    logprobs = TOP if what == "logprobs" else None
    sampling = SamplingParams(seed=7, logprobs=logprobs)
    one = GenerationRequest("request", Fingerprint("writers"), tuple(ids[:30]), sampling, len(ids))
    request = ResolvedRequest("a-model", (one,), False, (), 1, answer=answer)
    completion, deltas = Completion(request, tokenizer), []
    for place, token_id in enumerate(ids):
        told = None
        if logprobs is not None:
            likely = tuple((other, -0.5 - rank) for rank, other in enumerate(ids[place : place + TOP]))
            told = (TokenLogprobs(-0.51234567, likely),)
        last = FinishReason.LENGTH if place + 1 == len(ids) else None
        deltas.append(completion.push(0, TokenBatch(place, (token_id,), told, last)))
    return Work(request, deltas, completion.usage)


def new_writers(tokenizer: ChatTokenizer, request: ResolvedRequest) -> Mapping[str, Callable[[], EventWriter]]:
    """Protocol -> how to make the writer of one answer, from the settings that its endpoint makes."""
    service = CompletionService(_NoReplica(), PromptFormatter(tokenizer, ChatConfig()), GenerationDefaults())
    native = NativeFormat(service)
    chat = ChatFormat(service, refuse_unknown_fields=False)
    text = TextFormat(service, refuse_unknown_fields=False)
    envelope = {"created": 1, "model": request.model, "system_fingerprint": "fp_0123456789"}
    of_chunks = {"usage": True, "continuous_usage": False}
    of_chat = {"envelope": {"id": "chatcmpl-" + 32 * "0", "object": chat.chunk_kind, **envelope}, **of_chunks}
    of_text = {"envelope": {"id": "cmpl-" + 32 * "0", "object": text.chunk_kind, **envelope}, **of_chunks}
    of_message = {"id": "msg_" + 24 * "0", "omit_thinking": False}
    response = {
        "id": new_response_id(),
        "object": "response",
        "background": False,
        "model": request.model,
        "output": [],
        "usage": None,
    }
    tokens = TokenTexts(tokenizer)
    return {
        BASE: lambda: native.writer(request, {}),
        "chat": lambda: chat.writer(request, of_chat),
        "completions": lambda: text.writer(request, of_text),
        "messages": lambda: MessageWriter(request, of_message),
        "responses": lambda: ResponseWriter({"response": response}, tokens),
    }


def events(writer: EventWriter, done: Work) -> Iterator[bytes]:
    """All events of an answer."""
    yield from writer.opened()
    for delta in done.deltas:
        yield from writer.gained(delta)
    yield from writer.ended(done.usage)


class _Call:
    """What a servicer uses of a gRPC context."""

    def invocation_metadata(self) -> Any:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:50000"

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        pass


async def grpc_bytes(new_writer: Callable[[], EventWriter], done: Work) -> int:
    """The bytes of all messages of an answer, from the events of /stream to what gRPC sends."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope[DOCUMENT].decode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for event in events(new_writer(), done):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    request = serve_app_pb2.PromptDocument(prompt="x").SerializeToString()
    messages = Servicer(app, _NoReplica().model).stream(request, _Call())
    return sum([len(message.SerializeToString()) async for message in messages])


def measured(tokenizer: ChatTokenizer, done: Work, rounds: int) -> dict[str, dict[str, float]]:
    """Protocol -> `us` (microseconds of CPU a token), `more_us` (than /stream, in the same round) and `bytes` a token.

    Medians of the rounds; in each round every protocol writes the answer once.
    """
    makers = new_writers(tokenizer, done.request)
    runs: dict[str, Callable[[], int]] = {
        name: lambda make=make: sum(map(len, events(make(), done)))  # type: ignore[misc]
        for name, make in makers.items()
    }
    runs["grpc"] = lambda: asyncio.run(grpc_bytes(makers[BASE], done))
    tokens = len(done.deltas)
    spent: dict[str, list[float]] = {name: [] for name in runs}
    sizes = {name: run() / tokens for name, run in runs.items()}  # also whatever is only done once
    gc.disable()  # the heap of this program is none of a writer's cost
    try:
        for _ in range(rounds):
            for name, run in runs.items():
                began_ns = time.thread_time_ns()
                run()
                spent[name].append((time.thread_time_ns() - began_ns) / 1e3 / tokens)
    finally:
        gc.enable()
    return {
        name: {
            "us": statistics.median(of_rounds),
            "more_us": statistics.median(a - b for a, b in zip(of_rounds, spent[BASE], strict=True)),
            "bytes": sizes[name],
        }
        for name, of_rounds in spent.items()
    }


def table(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Markdown."""
    rows = ["| CPU us a token (more than /stream) | " + " | ".join(figures) + " | bytes a token |"]
    rows.append("|---|" + "---|" * (len(figures) + 1))
    for name in next(iter(figures.values())):
        cells = [f"{of[name]['us']:.1f} ({of[name]['more_us']:+.1f})" for of in figures.values()]
        sizes = " / ".join(f"{of[name]['bytes']:.0f}" for of in figures.values())
        rows.append(f"| {name} | {' | '.join(cells)} | {sizes} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.writers", description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of the answer ({TOKENS})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"({ROUNDS})")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT, help="what the answer is (all)")
    parser.add_argument("--output", type=Path, default=Path("loadtest/results/writers.json"))
    arguments = parser.parse_args()
    if min(arguments.tokens, arguments.rounds) < 1:
        parser.error("--tokens and --rounds must be positive")
    tokenizer = small_tokenizer()
    figures = {
        what: measured(tokenizer, work(tokenizer, what, arguments.tokens), arguments.rounds) for what in arguments.what
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(figures, indent=1))
    print(table(figures))
    dear = [
        f"{name} ({what})"
        for what, of_what in figures.items()
        for name, cost in of_what.items()
        if cost["more_us"] > TARGET_US
    ]
    print(f"\nmore than {TARGET_US:g} us a token over /{BASE}: {', '.join(dear) or 'none'}")
    return 1 if dear else 0


if __name__ == "__main__":
    raise SystemExit(main())
