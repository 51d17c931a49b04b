"""A Serve config file, read and validated without starting anything: every problem with its line and path.

Serve ignores fields that it does not know; here they are problems, since a mistyped limit is a limit that is missing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from serve_app.cli.command_error import CommandError
from serve_app.config import AppConfig
from serve_app.demo_config import DEMO_CONFIG
from serve_app.deployments.serve_schema import ServeDeploySchema
from serve_app.yaml_lines import Path, YamlError, parse

IMPORT_PATH = "serve_app.app:build"
DEMO_IMPORT_PATH = "serve_app.app:demo"
LAST_PORT = 65535
DEFAULT_PORT = 8000
DEFAULT_GRPC_PORT = 9000
"""Serve's own defaults."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to put right."""

    path: Path
    message: str
    line: int | None = None

    def describe(self, file: FilePath) -> str:
        """One line for the terminal: file:line: path: message."""
        place = f"{file}:{self.line}" if self.line is not None else str(file)
        path = render_path(self.path)
        return f"{place}: {path}: {self.message}" if path else f"{place}: {self.message}"


@dataclass(frozen=True, slots=True)
class ServedApp:
    """One application of the file that is ours."""

    name: str
    route_prefix: str | None
    config: AppConfig


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A file without problems."""

    path: FilePath
    data: dict[str, Any]
    host: str
    port: int
    grpc_port: int | None
    """None: without gRPC."""
    https: bool
    apps: tuple[ServedApp, ...]
    foreign: tuple[str, ...]
    """Names of applications that are not serve_app's; their args were not checked."""


def load(path: FilePath) -> ConfigFile:
    """Read and validate a file. Raises CommandError when it can't be read, or with all its problems, one a line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CommandError(f"there is no file {path}; give the path of a config, e.g. {DEMO_CONFIG}", 2) from None
    except IsADirectoryError:
        raise CommandError(f"{path} is a folder; give the path of a config in it", 2) from None
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})", 2) from error
    except OSError as error:
        raise CommandError(f"{path} can't be read: {error.strerror}", 2) from error
    try:
        document = parse(text)
        problems = [replace(problem, line=document.line_of(problem.path)) for problem in _problems(document.data)]
    except YamlError as error:
        problems = [Problem((), str(error), error.line)]
    if problems:
        lines = "".join(f"\n  {problem.describe(path)}" for problem in problems)
        raise CommandError(f"{path} can't be served as it is:{lines}", status=2)
    return _config_file(path, document.data)


def render_path(path: Path) -> str:
    """('applications', 0, 'args') -> applications[0].args"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _problems(data: Any) -> Iterator[Problem]:
    if not isinstance(data, dict):
        yield Problem((), "a Serve config is a mapping with `applications:`")
        return
    yield from _schema_problems(ServeDeploySchema, data, ())
    yield from _port_problems(data)
    applications = data.get("applications")
    ours = 0
    for index, application in enumerate(applications if isinstance(applications, list) else []):
        if not isinstance(application, dict):
            continue
        path: Path = ("applications", index)
        yield from _route_problems(application.get("route_prefix"), (*path, "route_prefix"))
        import_path = application.get("import_path")
        if import_path == IMPORT_PATH:
            ours += 1
            yield from _schema_problems(AppConfig, application.get("args", {}), (*path, "args"))
        elif import_path == DEMO_IMPORT_PATH:
            ours += 1
            message = f"{import_path} is for `serve run {import_path}`; in a config write {IMPORT_PATH}"
            yield Problem((*path, "import_path"), message)
        elif isinstance(import_path, str) and difflib.SequenceMatcher(None, import_path, IMPORT_PATH).ratio() > 0.75:
            ours += 1
            yield Problem((*path, "import_path"), f"{import_path!r} does not exist; did you mean {IMPORT_PATH}?")
    if isinstance(applications, list) and not ours:
        yield Problem(("applications",), f"no application has `import_path: {IMPORT_PATH}`")


def _route_problems(prefix: Any, path: Path) -> Iterator[Problem]:
    """Mistakes in a route prefix that Serve reports only when the application starts."""
    if isinstance(prefix, str) and not prefix.startswith("/"):
        yield Problem(path, f"{prefix!r} must begin with a slash")
    elif isinstance(prefix, str) and prefix != "/" and prefix.endswith("/"):
        yield Problem(path, f"{prefix!r} must not end with a slash")


def _port_problems(data: dict[str, Any]) -> Iterator[Problem]:
    """Ports that do not exist, which Serve's schema lets through."""
    for section in ("http_options", "grpc_options"):
        options = data.get(section)
        port = options.get("port") if isinstance(options, dict) else None
        if isinstance(port, int) and not 0 < port <= LAST_PORT:
            yield Problem((section, "port"), f"there is no port {port}; ports go from 1 to {LAST_PORT}")
    http, grpc = (data[name] if isinstance(data.get(name), dict) else {} for name in ("http_options", "grpc_options"))
    port = grpc.get("port", DEFAULT_GRPC_PORT)
    if grpc.get("grpc_servicer_functions") and port == http.get("port", DEFAULT_PORT):
        yield Problem(("grpc_options", "port"), f"HTTP has port {port} too; choose another one for gRPC")


def _schema_problems(schema: type[BaseModel], data: Any, path: Path) -> Iterator[Problem]:
    """The unknown fields of `data`, and pydantic's validation errors with paths into the document."""
    if not isinstance(data, dict):
        yield Problem(path, f"must be a mapping, not {data!r}")
        return
    yield from _unknown_fields(schema, data, path)
    try:
        schema.model_validate(data)
    except ValidationError as invalid:
        messages: dict[Path, list[str]] = {}
        for error in invalid.errors(include_url=False):
            if error["type"] != "extra_forbidden":  # reported above, also where the schema allows it
                place = error["loc"] if error["type"] == "missing" else _existing(data, error["loc"])
                messages.setdefault(place, []).append(error["msg"].removeprefix("Value error, "))
        for place, said in messages.items():
            # A field of several types is refused once for each of them.
            yield Problem((*path, *place), "; or ".join(said))


def _existing(data: Any, loc: Path) -> Path:
    """The part of pydantic's location that exists in the document; pydantic also names the branches of unions."""
    path: list[str | int] = []
    for part in loc:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            break
        path.append(part)
    return tuple(path)


def _unknown_fields(schema: type[BaseModel], data: dict[Any, Any], path: Path) -> Iterator[Problem]:
    known = dict(schema.model_fields)
    known |= {field.alias: field for field in schema.model_fields.values() if field.alias}
    for name, value in data.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
            hint = f"did you mean `{close[0]}`?" if close else "known here: " + ", ".join(known)
            yield Problem((*path, str(name)), f"unknown field; {hint}")
            continue
        inner = _inner_schema(known[name].annotation)
        if inner is None:
            continue
        if isinstance(value, dict):
            yield from _unknown_fields(inner, value, (*path, name))
        for index, item in enumerate(value if isinstance(value, list) else []):
            if isinstance(item, dict):
                yield from _unknown_fields(inner, item, (*path, name, index))


def _inner_schema(annotation: Any) -> type[BaseModel] | None:
    """The one model in a field's annotation (`Model`, `Model | None`, `list[Model]`); None when there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = {found for argument in get_args(annotation) if (found := _inner_schema(argument)) is not None}
    return inner.pop() if len(inner) == 1 and dict not in get_args(annotation) else None


def _config_file(path: FilePath, data: dict[str, Any]) -> ConfigFile:
    served = ServeDeploySchema.model_validate(data)
    ours = [application for application in served.applications if application.import_path == IMPORT_PATH]
    return ConfigFile(
        path=path,
        data=data,
        host=served.http_options.host,
        port=served.http_options.port,
        grpc_port=served.grpc_options.port if served.grpc_options.grpc_servicer_functions else None,
        https=served.http_options.ssl_certfile is not None,
        apps=tuple(
            ServedApp(application.name, application.route_prefix, AppConfig.model_validate(application.args))
            for application in ours
        ),
        foreign=tuple(application.name for application in served.applications if application not in ours),
    )
