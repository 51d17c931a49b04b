"""Makes the OpenAPI 3.1 document of a list of operations.

Promises one schema for each type, under its name. Knows no operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve_app import __version__
from serve_app.api.limit_headers import OPENAI_NAMES
from serve_app.api.openapi.operations import OPERATIONS, Operation

_SCHEMAS = "#/components/schemas/{model}"
_JSON = "application/json"
_EVENTS = "text/event-stream"
_TEXT = "text/plain"
_ANSWER_HEADERS = {
    "X-Request-Id": "The request's id, which stands in every log line of the request.",
    "X-Ignored-Fields": "Fields of the request that were ignored.",
    "X-Clamped-Fields": "Limits of the request that were cut to what is possible.",
    "X-Seed": "The seed that was used.",
    **dict.fromkeys(OPENAI_NAMES, "What is left of the caller's limits; only for a caller with limits."),
}
_RETRY_HEADERS = {
    "Retry-After": "Seconds until the request fits, if nothing else is used.",
    "Retry-After-Ms": "The same in milliseconds.",
}

_KEY = "An API key, where the service asks for one."
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer", "description": _KEY},
    "header": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": _KEY},
}

Schema = dict[str, Any]


def openapi_document(operations: Iterable[Operation] = OPERATIONS) -> Schema:
    """The document. Its server is the one that it comes from."""
    operations = tuple(operations)
    schemas = _Schemas(operations)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "serve_app",
            "version": __version__,
            "description": "Chat answers of the served model. Streams are server-sent events.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "."}],
        "paths": paths,
        "components": {"schemas": schemas.definitions, "securitySchemes": _KEYS},
        "security": [{}, *({name: []} for name in _KEYS)],  # {}: a service may ask for no key
    }


class _Schemas:
    """The schemas of all types, by name."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        taken = {model for each in operations for model in (each.body, each.query) if model is not None}
        given = {model for each in operations for model in _answers(each)}
        models: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
            *((model, "validation") for model in sorted(taken, key=_name)),
            *((model, "serialization") for model in sorted(given, key=_name)),
        ]
        named, generated = models_json_schema(models, ref_template=_SCHEMAS)
        self._references = {model: schema for (model, _), schema in named.items()}
        self.definitions: Schema = generated["$defs"]

    def of(self, model: type[BaseModel]) -> Schema:
        """A reference to the type's schema."""
        return self._references[model]

    def fields(self, model: type[BaseModel]) -> Mapping[str, Schema]:
        """The type's own schema, which a query's parameters are made of."""
        schema: Schema = self.definitions[model.__name__]
        return schema


def _name(model: type[BaseModel]) -> str:
    return model.__name__


def _answers(operation: Operation) -> list[type[BaseModel]]:
    models = [*operation.answers, *operation.events, *operation.others.values(), *operation.shapes]
    return [model for model in models if model is not None]


def _described(operation: Operation, schemas: _Schemas) -> Schema:
    described: Schema = {
        "operationId": operation.name,
        "summary": operation.summary,
        "tags": [operation.tag],
        "parameters": _parameters(operation, schemas),
        "responses": _responses(operation, schemas),
    }
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {_JSON: {"schema": schemas.of(operation.body)}}}
    return described


def _parameters(operation: Operation, schemas: _Schemas) -> list[Schema]:
    parameters = [
        {"name": name, "in": "path", "required": True, "description": what, "schema": {"type": "string"}}
        for name, what in operation.path_parameters.items()
    ]
    parameters += [
        {"name": name, "in": "header", "required": False, "description": what, "schema": {"type": "string"}}
        for name, what in operation.headers.items()
    ]
    if operation.query is not None:
        schema = schemas.fields(operation.query)
        required = schema.get("required", ())
        for name, field in schema["properties"].items():
            parameters.append({"name": name, "in": "query", "required": name in required, "schema": field})
    return parameters


def _responses(operation: Operation, schemas: _Schemas) -> Schema:
    content: Schema = {}
    if operation.answers:
        content[_JSON] = {"schema": _any_of(operation.answers, schemas)}
    if operation.text:
        content[_TEXT] = {"schema": {"type": "string"}}
    if operation.events:
        content[_EVENTS] = {"schema": _events(operation, schemas)}
    responses: Schema = {}
    if content:
        headers = _headers(_ANSWER_HEADERS)
        responses["200"] = {"description": "The answer.", "headers": headers, "content": content}
    for status, model in operation.others.items():
        responses[str(status)] = {"description": "No content: nothing more will come."}
        if model is not None:
            responses[str(status)] = {"description": model.__doc__, "content": {_JSON: {"schema": schemas.of(model)}}}
    for status in operation.errors:
        refused = {"description": "An error.", "content": {_JSON: {"schema": _any_of(operation.shapes, schemas)}}}
        if status == 429:
            refused["headers"] = _headers(_RETRY_HEADERS)
        responses.setdefault(str(status), refused)
    return responses


def _headers(described: Mapping[str, str]) -> Schema:
    return {name: {"description": what, "schema": {"type": "string"}} for name, what in described.items()}


def _any_of(models: Sequence[type[BaseModel]], schemas: _Schemas) -> Schema:
    return schemas.of(models[0]) if len(models) == 1 else {"anyOf": [schemas.of(model) for model in models]}


def _events(operation: Operation, schemas: _Schemas) -> Schema:
    """The schema of one event, in the form of OpenAPI 3.2's registry for server-sent events; 3.1 has no such schema."""
    data: Schema = {"type": "string", "contentMediaType": _JSON}
    data["contentSchema"] = _any_of(operation.events, schemas)
    text = {"type": "string"}
    return {
        "type": "object",
        "description": "One of the server-sent events. Its data is JSON, or `[DONE]` after OpenAI's last chunk.",
        "properties": {"event": text, "data": data, "id": text, "retry": {"type": "integer", "minimum": 0}},
        "required": ["data"],
    }
