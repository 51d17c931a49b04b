"""What the API modules call: the model's state, prompts as ids, resolved requests, running completions.

Promises that leaving a `RunningCompletion` frees the device at once (P5). Knows no HTTP and no wire format.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from functools import partial

from serve_app.chat.conversation import Unknown, refuse_unknown
from serve_app.chat.options import DEFAULT_OPTIONS, ChatOptions
from serve_app.chat.prompts import PromptFormatter
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import Failure, GenerationDefaults, LoadStage, ModelCard, RequestError, not_ready
from serve_app.generation.attempt_history import FailoverSettings
from serve_app.generation.attempts import Generations
from serve_app.generation.completion import Completion, Usage
from serve_app.generation.predicted import MAX_PREDICTED_TOKENS
from serve_app.generation.replica import ReplicaClient
from serve_app.generation.request import Prompt, ResolvedRequest, resolve
from serve_app.generation.text import Delta
from serve_app.grammar_checker import GrammarChecker

TRUNCATED_CONTEXTS = 16
"""A prompt that is to be cut may be as long as this many contexts: encoding and rendering it takes time."""
_LONGEST_NAME = 100
"""Characters of a model's name that an error repeats."""


IsFull = Callable[[str, float, float], Failure | None]
"""(tenant, its weight, seconds left) -> the refusal of a new request, or None."""


class CompletionService:
    """Answers for one model. One per ingress replica, used from its event loop."""

    def __init__(
        self,
        client: ReplicaClient,
        formatter: PromptFormatter,
        defaults: GenerationDefaults,
        failover: FailoverSettings | None = None,
        aliases: frozenset[str] = frozenset(),
        grammars: GrammarChecker | None = None,
        full: IsFull = lambda tenant, weight, remaining_s: None,
    ) -> None:
        """`aliases`: other names that the model answers to. Without `grammars`, no answer can be constrained."""
        self._full = full
        self._aliases = aliases
        self._grammars = grammars
        self._client = client
        self._formatter = formatter
        self._failover = failover or FailoverSettings()
        self.tokenizer: ChatTokenizer = formatter.tokenizer
        self.template_variables = formatter.template_variables
        """Variables of the model's chat template that a caller may set."""
        self.sampling_defaults = {name: value for name, value in asdict(defaults).items() if name != "eos_token_ids"}
        """The sampling parameters of requests that don't give them."""
        self.resolve = partial(resolve, defaults)
        """Resolves and checks everything about a request; see `generation.request.resolve`."""

    async def state(self) -> ModelCard | LoadStage:
        """The model's card if the model can serve, else how far it is with loading."""
        return await self._client.model()

    async def ready_model(self, name: str | None, allowed: frozenset[str] | None) -> ModelCard:
        """The model's card. Raises `RequestError` while no model can serve, if `name` is not one of its names, and if
        none of its names is among those that the caller is `allowed` (None: all are).

        No name, or an empty one, stands for the model.
        """
        state = await self._client.model()
        if isinstance(state, LoadStage):
            raise not_ready(state)
        if name and name != state.name and name not in self._aliases:
            message = f"The model '{name[:_LONGEST_NAME]}' does not exist; GET /v1/models lists what is served."
            raise RequestError(message, code="model_not_found", param="model")
        if not self._is_allowed(state, allowed):
            message = f"This API key may not use the model '{state.name}'; GET /v1/models lists what it may use."
            raise RequestError(message, code="model_not_allowed", param="model")
        return state

    async def ready_models(self, allowed: frozenset[str] | None) -> tuple[ModelCard, ...]:
        """The cards of the models that the caller is `allowed`. Raises `RequestError` while no model can serve."""
        card = await self.ready_model(None, None)
        return (card,) if self._is_allowed(card, allowed) else ()

    def _is_allowed(self, card: ModelCard, allowed: frozenset[str] | None) -> bool:
        return allowed is None or not allowed.isdisjoint({card.name, *self._aliases})

    def refuse_when_full(self, tenant: str, weight: float, remaining_s: float) -> None:
        """Raise `RequestError` if a new request of the tenant would not start in time. To be asked before any work is
        done on it. `weight`: the tenant's share."""
        if (failure := self._full(tenant, weight, remaining_s)) is not None:
            raise RequestError.of(failure)

    def render_chat(
        self,
        card: ModelCard,
        messages: Sequence[Mapping[str, object]],
        options: ChatOptions = DEFAULT_OPTIONS,
        unknown: Unknown = refuse_unknown,
        *,
        limited: bool = True,
        truncates: bool = False,
    ) -> Prompt:
        """The prompt of a chat. `unknown` is as in `parse_messages`. Safe on any thread. Raises `PromptError`.

        `limited`: a prompt that leaves no room for an answer is refused. `truncates`: a longer one will be cut.
        """
        longest = card.context_tokens * (TRUNCATED_CONTEXTS if truncates else 1)
        limit = longest if limited else None
        ids = self._formatter.render_chat(messages, options, context_tokens=limit, unknown=unknown)
        answer = self._formatter.answer_format(ids, options)
        constraint = self._formatter.constraint(options, answer)
        names = () if answer is None else answer.end_tokens
        ends = tuple(token_id for name in names if (token_id := self.tokenizer.token_id(name)) is not None)
        return Prompt(tuple(ids), options.continue_final_message, "messages", answer, constraint, ends)

    def render_text(
        self,
        card: ModelCard,
        text: str,
        *,
        parse_special: bool = False,
        add_bos: bool = True,
        truncates: bool = False,
        room: int = 1,
    ) -> Prompt:
        """The prompt of a text that is to be continued, by `room` tokens at least. `truncates`: a longer one will be
        cut. Safe on any thread. Raises `PromptError`.
        """
        context_tokens = card.context_tokens * TRUNCATED_CONTEXTS if truncates else card.context_tokens + 1 - room
        ids = self._formatter.render_text(
            text, parse_special=parse_special, add_bos=add_bos, context_tokens=context_tokens
        )
        return Prompt(tuple(ids), True, "prompt")

    def prediction(self, card: ModelCard, text: str) -> tuple[int, ...]:
        """The ids of what a caller expects of the answer, cut to what is of use. Safe on any thread."""
        longest = min(card.context_tokens, MAX_PREDICTED_TOKENS)
        text = text[: longest * self.tokenizer.longest_token_chars]
        return tuple(self.tokenizer.encode_text(text, add_bos=False, parse_special=False)[:longest])

    def render_gap(
        self, card: ModelCard, prefix: str, suffix: str, *, parse_special: bool = False
    ) -> tuple[Prompt, tuple[int, ...]]:
        """The prompt of a text whose answer belongs before `suffix`, and the ids that end such an answer.

        Safe on any thread. Raises `PromptError`, also for a model that can't do that.
        """
        ids, ends = self._formatter.render_gap(
            prefix, suffix, parse_special=parse_special, context_tokens=card.context_tokens
        )
        return Prompt(tuple(ids), False, "prompt"), ends

    async def constraint_fault(self, request: ResolvedRequest, caller: str | None = None) -> str:
        """Why a request's constraint can't be used, without a full stop; "" when it can, or there is none.

        To be asked before a request with a constraint from outside is started. `caller`: who asks, so that no other
        caller waits for it. Raises `RequestError` when it can't be told now.
        """
        for constraint in {one.constraint for one in request.requests} - {""}:
            if self._grammars is None:
                return "this server does not support it"
            if fault := await self._grammars.fault(constraint, caller):
                return fault
        return ""

    def start(self, request: ResolvedRequest) -> RunningCompletion:
        """The answer; entering it starts the work. Raises `PromptError` for stop strings that can't be used."""
        return RunningCompletion(self._client, self._failover, Completion(request, self.tokenizer))


class RunningCompletion(Generations):
    """One running request, its output as text. Leaving it cancels what still runs."""

    def __init__(self, client: ReplicaClient, settings: FailoverSettings, completion: Completion) -> None:
        super().__init__(client, settings)
        self._completion = completion
        for request in completion.request.requests:
            self.add(request)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The deltas of all choices, as they come; every choice ends with a finish reason.

        Raises `RequestError` when a choice can't go on; what came before stays valid.
        """
        async with aclosing(self.replies()) as replies:
            async for choice, reply in replies:
                if isinstance(reply, Failure):
                    raise RequestError.of(reply)
                delta = self._completion.push(choice, reply)
                if delta.finish_reason is not None and reply.finish_reason is None:
                    await self.stop(choice)  # a stop string: the model would go on
                yield delta

    @property
    def usage(self) -> Usage:
        """What was counted so far."""
        return self._completion.usage
