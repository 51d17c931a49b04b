"""Makes docs/configuration.md from the models in serve_app/config.py: `python tests/support/configuration_page.py`.

The page can't go stale: tests/test_docs.py compares it with what this makes.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from serve_app.config import AppConfig, AutoscalingConfig, GenerationConfig

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"

HEAD = """\
# Configuration

<!-- Made from serve_app/config.py by tests/support/configuration_page.py; change it there. -->

A config is a plain [Ray Serve config file](https://docs.ray.io/en/latest/serve/production-guide/config.html). This
page lists what stands under `args` of an application with `import_path: serve_app.app:build`. Every field may be left
out, and an unknown one is refused. `serve-app check CONFIG` validates a file and says what it needs, without starting
anything.

Outside `args` you will mostly want `http_options` (`host`, `port`), `grpc_options` (`port`) and `proxy_location`; the
files in `configs/` show them. gRPC listens on the host of `http_options`, and is off without `grpc_servicer_functions`.
All of these are read when Serve starts: a change needs a restart, where `args` need only `serve deploy`.

Sizes are numbers of bytes, or like `2GiB` or `500MB`.
"""


def page() -> str:
    """The whole page."""
    sections = [HEAD]
    for name, field in AppConfig.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            sections.append(section(name, inner))
            if name == "model":
                sections.append(section("model.generation", GenerationConfig))
            if name == "ingress":
                sections.append(section("model_server.autoscaling and ingress.autoscaling", AutoscalingConfig))
    top = {name: field for name, field in AppConfig.model_fields.items() if not _is_model(field)}
    sections.append("## At the top of `args`\n\n" + table(top))
    return "\n".join(sections)


def section(name: str, model: type[BaseModel]) -> str:
    """One table with its heading."""
    heading = " and ".join(f"`{part}`" for part in name.split(" and "))
    return f"## {heading}\n\n{' '.join((model.__doc__ or '').split())}\n\n{table(model.model_fields)}"


def table(fields: dict[str, FieldInfo]) -> str:
    """Field, type, default and meaning."""
    rows = ["| field | type | default | |", "| --- | --- | --- | --- |"]
    for name, field in fields.items():
        meaning = " ".join((field.description or "").split())
        rows.append(f"| `{name}` | {_kind(field)} | {default(field)} | {meaning} |".replace("\n", " "))
    return "\n".join(rows) + "\n"


def kind(annotation: Any) -> str:
    """A type as people write it."""
    origin = get_origin(annotation)
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (types.UnionType, Union):
        return " \\| ".join(kind(part) for part in get_args(annotation) if part is not type(None))
    if origin is tuple:
        return f"list of {kind(get_args(annotation)[0])}"
    if origin is dict:
        return "mapping"
    names = {int: "integer", float: "number", str: "text", bool: "true/false"}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return names.get(annotation, "size")


def _kind(field: FieldInfo) -> str:
    """Sizes are numbers with a reader of their own, which pydantic keeps beside the type."""
    return "size" if any(isinstance(part, BeforeValidator) for part in field.metadata) else kind(field.annotation)


def default(field: FieldInfo) -> str:
    """The default as it would stand in YAML; a dash for none."""
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return "-"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, BaseModel):
        return "`{}`"
    if isinstance(value, tuple | dict):
        return "`[]`" if isinstance(value, tuple) else "`{}`"
    if isinstance(value, int) and value and value % 2**20 == 0:
        return f"`{value // 2**20}MiB`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _is_model(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
