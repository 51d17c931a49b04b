"""Every operation of the HTTP API: its path, what it takes and what it answers.

Promises that each path of the application is here; a test compares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel

from serve_app.api.anthropic.fields import CountFields, MessagesFields
from serve_app.api.native import PromptDocument, QueryDocument
from serve_app.api.openai.chat import ChatRequest
from serve_app.api.openai.completions import CompletionRequest
from serve_app.api.openai.tokenize import DetokenizeRequest, TokenizeRequest
from serve_app.api.openapi import anthropic_answers as anthropic
from serve_app.api.openapi import openai_answers as openai
from serve_app.api.openapi import responses_answers as responses
from serve_app.api.responses.fields import ConversationFields, ItemsQuery, ResponseRequest, RetrieveQuery


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    name: str
    """OpenAPI's `operationId`."""
    summary: str
    tag: str
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    answers: tuple[type[BaseModel], ...] = ()
    """What its JSON may be. Empty: it has none."""
    text: bool = False
    """It answers plain text."""
    events: tuple[type[BaseModel], ...] = ()
    """What the data of the events of its stream may be. Empty: it never streams."""
    path_parameters: Mapping[str, str] = field(default_factory=dict)
    """Name -> what it is."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Request headers of its own: name -> what it is for."""
    others: Mapping[int, type[BaseModel] | None] = field(default_factory=dict)
    """Other answers than 200 and errors, by status."""
    errors: tuple[int, ...] = ()
    shapes: tuple[type[BaseModel], ...] = (openai.ErrorAnswer,)
    """What an error may look like."""


GENERATION_ERRORS = (400, 401, 403, 404, 408, 413, 415, 429, 431, 500, 503, 504)
READ_ERRORS = (400, 401, 403, 404, 410, 429, 431, 500, 503)
_RESUMES = {
    "X-Stream-Resume": "1: the stream can be resumed, and its events have ids.",
    "Last-Event-ID": "With X-Stream-Resume: continue the stream after this event.",
}
_VERSION = {"anthropic-version": "Anthropic's clients send it, and get their own schema."}

_RESPONSE = "/v1/responses/{response_id}"
_RESPONSE_ID = {"response_id": "The id of a response that is kept."}

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        method="post",
        path="/stream",
        name="stream",
        summary="One event for each token of the answer",
        tag="stream",
        body=PromptDocument,
        events=(openai.StreamedToken, openai.StreamDone, openai.ErrorAnswer),
        headers=_RESUMES,
        errors=GENERATION_ERRORS,
    ),
    Operation(
        method="get",
        path="/stream",
        name="stream_by_query",
        summary="The same for a browser's EventSource",
        tag="stream",
        query=QueryDocument,
        events=(openai.StreamedToken, openai.StreamDone, openai.ErrorAnswer),
        headers={"Last-Event-ID": "With ?resume=1: continue the stream after this event."},
        others={204: None},
        errors=GENERATION_ERRORS,
    ),
    Operation(
        method="get",
        path="/v1/streams/{stream_id}",
        name="resume_stream",
        summary="The rest of a stream whose connection was lost",
        tag="stream",
        path_parameters={"stream_id": "The id in the header X-Stream-Id of the stream."},
        headers={"Last-Event-ID": "The id of the last event that arrived."},
        events=(openai.StreamedToken, openai.StreamDone, openai.ErrorAnswer),
        others={204: None},
        errors=READ_ERRORS,
    ),
    Operation(
        method="delete",
        path="/v1/streams/{stream_id}",
        name="cancel_stream",
        summary="End a stream that could be resumed: no more of it is generated",
        tag="stream",
        path_parameters={"stream_id": "The id in the header X-Stream-Id of the stream."},
        others={204: None},
        errors=READ_ERRORS,
    ),
    Operation(
        method="post",
        path="/v1/chat/completions",
        name="create_chat_completion",
        summary="The answer to a chat, whole or as a stream",
        tag="OpenAI",
        body=ChatRequest,
        answers=(openai.ChatCompletion,),
        events=(openai.ChatCompletionChunk, openai.ErrorAnswer),
        headers=_RESUMES,
        errors=GENERATION_ERRORS,
    ),
    Operation(
        method="post",
        path="/v1/completions",
        name="create_completion",
        summary="The continuation of a text, whole or as a stream",
        tag="OpenAI",
        body=CompletionRequest,
        answers=(openai.TextCompletion,),
        events=(openai.TextCompletion, openai.ErrorAnswer),
        headers=_RESUMES,
        errors=GENERATION_ERRORS,
    ),
    Operation(
        method="post",
        path="/v1/chat/completions/render",
        name="render_chat_completion",
        summary="What a chat's request would become, without an answer",
        tag="tokens",
        body=ChatRequest,
        answers=(openai.Rendered,),
        errors=GENERATION_ERRORS,
    ),
    Operation(
        method="post",
        path="/v1/completions/render",
        name="render_completion",
        summary="What a text's request would become, without an answer",
        tag="tokens",
        body=CompletionRequest,
        answers=(openai.Rendered,),
        errors=GENERATION_ERRORS,
    ),
    Operation(
        method="post",
        path="/tokenize",
        name="tokenize",
        summary="The tokens of a text or of a chat's prompt",
        tag="tokens",
        body=TokenizeRequest,
        answers=(openai.Tokenized,),
        errors=GENERATION_ERRORS,
    ),
    Operation(
        method="post",
        path="/detokenize",
        name="detokenize",
        summary="The text of tokens",
        tag="tokens",
        body=DetokenizeRequest,
        answers=(openai.Detokenized,),
        errors=GENERATION_ERRORS,
    ),
    Operation(
        method="get",
        path="/tokenizer_info",
        name="tokenizer_info",
        summary="The tokenizer's special tokens and chat template",
        tag="tokens",
        answers=(openai.TokenizerInfo,),
        errors=READ_ERRORS,
    ),
    Operation(
        method="post",
        path="/v1/messages",
        name="create_message",
        summary="The answer to a chat, whole or as a stream",
        tag="Anthropic",
        body=MessagesFields,
        answers=(anthropic.AnthropicMessage,),
        events=anthropic.EVENTS,
        headers=_RESUMES,
        errors=GENERATION_ERRORS,
        shapes=(anthropic.AnthropicError,),
    ),
    Operation(
        method="post",
        path="/v1/messages/count_tokens",
        name="count_message_tokens",
        summary="The tokens that a chat's prompt has",
        tag="Anthropic",
        body=CountFields,
        answers=(anthropic.CountedTokens,),
        errors=GENERATION_ERRORS,
        shapes=(anthropic.AnthropicError,),
    ),
    Operation(
        method="post",
        path="/v1/responses",
        name="create_response",
        summary="A response: whole, as a stream or in the background",
        tag="Responses",
        body=ResponseRequest,
        answers=(responses.ResponseDocument,),
        events=responses.EVENTS,
        headers={name: f"With store: false. {text}" for name, text in _RESUMES.items()},
        errors=(*GENERATION_ERRORS, 410),
    ),
    Operation(
        method="get",
        path=_RESPONSE,
        name="retrieve_response",
        summary="A response as it is now, or its events",
        tag="Responses",
        path_parameters=_RESPONSE_ID,
        query=RetrieveQuery,
        answers=(responses.ResponseDocument,),
        events=responses.EVENTS,
        errors=READ_ERRORS,
    ),
    Operation(
        method="delete",
        path=_RESPONSE,
        name="delete_response",
        summary="Forget a response, also one that is generated",
        tag="Responses",
        path_parameters=_RESPONSE_ID,
        answers=(responses.DeletedResponse,),
        errors=READ_ERRORS,
    ),
    Operation(
        method="post",
        path=f"{_RESPONSE}/cancel",
        name="cancel_response",
        summary="End a response in the background",
        tag="Responses",
        path_parameters=_RESPONSE_ID,
        answers=(responses.ResponseDocument,),
        errors=READ_ERRORS,
    ),
    Operation(
        method="get",
        path=f"{_RESPONSE}/input_items",
        name="list_input_items",
        summary="What the model read, earlier responses included",
        tag="Responses",
        path_parameters=_RESPONSE_ID,
        query=ItemsQuery,
        answers=(responses.ItemList,),
        errors=READ_ERRORS,
    ),
    Operation(
        method="post",
        path="/v1/responses/input_tokens",
        name="count_input_tokens",
        summary="The tokens that the model would read",
        tag="Responses",
        body=ConversationFields,
        answers=(responses.CountedInput,),
        errors=(*GENERATION_ERRORS, 410),
    ),
    Operation(
        method="post",
        path="/v1/responses/compact",
        name="compact_response",
        summary="A conversation as its user's messages and a summary",
        tag="Responses",
        body=ConversationFields,
        answers=(responses.CompactedResponse,),
        errors=(*GENERATION_ERRORS, 410),
    ),
    Operation(
        method="get",
        path="/v1/models",
        name="list_models",
        summary="The model that is served",
        tag="OpenAI",
        headers=_VERSION,
        answers=(openai.ServedModels, anthropic.AnthropicModels),
        errors=READ_ERRORS,
        shapes=(openai.ErrorAnswer, anthropic.AnthropicError),
    ),
    Operation(
        method="get",
        path="/v1/models/{model}",
        name="retrieve_model",
        summary="The same model by its name",
        tag="OpenAI",
        path_parameters={"model": "A name of the model; it may contain slashes."},
        headers=_VERSION,
        answers=(openai.ServedModel, anthropic.AnthropicModel),
        errors=READ_ERRORS,
        shapes=(openai.ErrorAnswer, anthropic.AnthropicError),
    ),
    Operation(
        method="get",
        path="/health",
        name="health",
        summary="Whether the process answers",
        tag="probes",
        answers=(openai.Health,),
        errors=(403,),
    ),
    Operation(
        method="get",
        path="/ready",
        name="ready",
        summary="Whether a model can serve, and how far it is with loading",
        tag="probes",
        answers=(openai.Ready,),
        others={503: openai.NotReady},
        errors=(401, 403, 429),
    ),
    Operation(
        method="get",
        path="/metrics",
        name="metrics",
        summary="What the whole service does, in Prometheus's text format",
        tag="probes",
        text=True,
        errors=(401, 403, 429, 500, 503),
    ),
)
