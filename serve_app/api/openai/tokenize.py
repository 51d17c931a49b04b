"""POST /tokenize, POST /detokenize and GET /tokenizer_info, in vLLM's shapes: the model's tokenizer, without an answer.

A chat is read as /v1/chat/completions reads it. Knows no replica: the service does the work.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from serve_app.api.errors import bad_request
from serve_app.api.fields import Messages, OpenModel, validate_open
from serve_app.api.http.endpoint import Call
from serve_app.api.openai.chat import TemplateFields, chat_options
from serve_app.api.unknown_fields import UnknownFields
from serve_app.core import ModelCard
from serve_app.generation.service import CompletionService

MAX_DETOKENIZED = 2**18
"""Ids in one POST /detokenize. Nothing else runs in this process while they are decoded: 0.13 s for so many."""
_WRITTEN_AT_ONCE = 20_000
"""Ids in the longest answer that one call encodes, during which no other thread runs."""
_JSON = json.JSONEncoder(ensure_ascii=False)


def _ids(value: Any) -> Any:
    """A list of ids as a tuple. Pydantic would describe each wrong item of a long list."""
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise PydanticCustomError("ids_type", "A list of token ids is expected.")
    if len(value) > MAX_DETOKENIZED:
        message = f"At most {MAX_DETOKENIZED} ids are taken; send several requests."
        raise PydanticCustomError("ids_value", "{expected}", {"expected": message})
    return tuple(value)


class TokenizeRequest(TemplateFields):
    """The body of POST /tokenize: `prompt`, or `messages` with the fields that decide how a chat is written."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """False: a prompt gets no BOS. A chat's template writes its own."""
    parse_special: bool | None = None
    """Whether control tokens in a prompt are read as such, as other servers do; false reads them as text, as
    /v1/completions does. Default true."""
    return_token_strs: bool | None = None
    """Also give the tokens' names in the vocabulary."""


class DetokenizeRequest(OpenModel):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: Annotated[tuple[int, ...], BeforeValidator(_ids)] = Field(
        json_schema_extra={"items": {"minimum": 0}, "maxItems": MAX_DETOKENIZED}
    )


class Tokenization:
    """The handlers."""

    def __init__(self, service: CompletionService, *, refuse_unknown_fields: bool) -> None:
        self._service = service
        self._refuse_unknown_fields = refuse_unknown_fields

    async def handle_tokenize(self, call: Call) -> Response:
        """The ids of a text or of a chat's prompt, also where it is too long to be answered. Raises `RequestError`."""
        unknown = UnknownFields(call.record, refused=self._refuse_unknown_fields)
        request = await call.run(partial(validate_open, TokenizeRequest, call.body or {}, unknown))
        if (request.prompt is None) == (request.messages is None):
            raise bad_request("Give either prompt or messages.", param="prompt", code="invalid_value")
        if request.messages is not None and (request.add_special_tokens or request.parse_special):
            message = "add_special_tokens and parse_special go with a prompt; a chat's template writes its tokens."
            raise bad_request(message, param="messages", code="invalid_value")
        card = await self._service.ready_model(request.model, call.caller.models)
        items = len(request.messages or ()) + (len(request.tools) if isinstance(request.tools, list) else 0)
        return await call.run(partial(self._tokenized, call, card, request, unknown), items=items)

    def _tokenized(self, call: Call, card: ModelCard, request: TokenizeRequest, unknown: UnknownFields) -> Response:
        tokenizer = self._service.tokenizer
        if request.messages is not None:
            options = chat_options(request, self._service.template_variables, unknown)
            prompt = self._service.render_chat(card, request.messages, options, unknown.add_in, limited=False)
            ids = list(prompt.ids)
        else:
            parse_special, add_bos = request.parse_special is not False, request.add_special_tokens is not False
            ids = tokenizer.encode_text(request.prompt or "", add_bos=add_bos, parse_special=parse_special)
        call.record.prompt_tokens = len(ids)
        names = [tokenizer.token_at(token_id) for token_id in ids] if request.return_token_strs else None
        document = {"count": len(ids), "max_model_len": card.context_tokens, "tokens": ids, "token_strs": names}
        if len(ids) <= _WRITTEN_AT_ONCE:
            return _json(document)
        return Response("".join(_JSON.iterencode(document)).encode(), media_type="application/json")

    async def handle_detokenize(self, call: Call) -> Response:
        """The text of ids, special tokens by their names. Raises `RequestError`."""
        unknown = UnknownFields(call.record, refused=self._refuse_unknown_fields)
        request = await call.run(partial(validate_open, DetokenizeRequest, call.body or {}, unknown))
        card = await self._service.ready_model(request.model, call.caller.models)
        if request.tokens and not 0 <= min(request.tokens) <= max(request.tokens) < card.vocab_size:
            message = f"A token id must be below the vocabulary's size of {card.vocab_size}."
            raise bad_request(message, param="tokens", code="invalid_value")
        shown = partial(self._service.tokenizer.shown, request.tokens)
        return _json({"prompt": await call.run(shown)})

    async def handle_info(self, call: Call) -> Response:
        """What a client needs to write prompts itself, as evaluation harnesses do. Raises `RequestError`."""
        card, tokenizer = await self._service.ready_model(None, call.caller.models), self._service.tokenizer
        names = {"bos_token": None, "eos_token": None, "pad_token": None, "unk_token": None}
        known = {**names, **tokenizer.special_tokens}
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": card.context_tokens}
        return _json({**described, **known, "chat_template": tokenizer.template})


def _json(document: dict[str, Any]) -> Response:
    return Response(_JSON.encode(document).encode(), media_type="application/json")
