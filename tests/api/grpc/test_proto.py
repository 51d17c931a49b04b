"""The modules that protoc has made, the services that a server registers, and reflection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from serve_app.api.grpc.services import CHECK, JINA_SERVICE, SERVICE, STREAM, STREAM_DOC, add_services
from serve_app.api.native import PromptDocument
from serve_app.proto import serve_app_pb2

ROOT = Path(__file__).parents[3]


def test_the_modules_are_what_protoc_makes(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    from scripts.protos import TARGET, generate

    generate(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in TARGET.glob("*_pb2.py*")}
    assert made == kept, "run `make proto`"


def test_the_message_has_the_fields_of_the_document() -> None:
    fields = serve_app_pb2.PromptDocument.DESCRIPTOR.fields_by_name
    assert set(fields) == set(PromptDocument.model_fields)


class Recorder:
    """What Serve's server does with the handlers."""

    def __init__(self) -> None:
        self.methods: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: tuple[Any, ...]) -> None:
        self.methods |= handlers[0]._method_handlers


def test_the_methods_have_the_names_of_the_ingress() -> None:
    from serve_app.deployments.ingress import Ingress

    recorder = Recorder()
    add_services(Ingress.func_or_class if hasattr(Ingress, "func_or_class") else Ingress, recorder)
    assert set(recorder.methods) == {STREAM, STREAM_DOC, CHECK}


async def test_reflection_describes_the_services() -> None:
    class Servicer:
        Stream = stream_doc = Check = None

    server = grpc.aio.server()
    add_services(Servicer, server)
    reflection.enable_server_reflection([SERVICE, JINA_SERVICE, reflection.SERVICE_NAME], server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=JINA_SERVICE),
        ]
        names, *files = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
    await server.stop(None)
    assert {SERVICE, JINA_SERVICE} <= {each.name for each in names.list_services_response.service}
    for answer in files:
        assert answer.file_descriptor_response.file_descriptor_proto
