"""The names by which clients may call a model besides the one it is served by.

Promises that each names this model and no other. Reads no file's contents.
"""

from __future__ import annotations

from serve_app.config import ModelConfig
from serve_app.home import expanded
from serve_app.models.demo import DEMO_HUB_ID, DEMO_NAME
from serve_app.models.source import SourceKind, source_kind


def aliases(model: ModelConfig) -> frozenset[str]:
    """The source as the config has it, and its last part: a hub id's, a folder's or a file's own name.

    The demo model also answers to its makers' id. Raises `ModelError` for a source that is none.
    """
    kind, path = source_kind(model.source), expanded(model.source)
    if kind is SourceKind.DEMO:
        return frozenset({model.source, DEMO_NAME, DEMO_HUB_ID})
    if kind is SourceKind.GGUF:
        return frozenset({model.source, path.name, path.stem})
    if kind is SourceKind.FOLDER:
        return frozenset({model.source, path.resolve().name})
    return frozenset({model.source, model.source.rsplit("/", 1)[-1]})
