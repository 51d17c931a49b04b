"""The demo's config, which is part of the package and is served if no other config is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

DEMO_CONFIG = Path(__file__).with_name("demo.yaml")
"""In a checkout a link to configs/serve.yaml, in a wheel a copy of it."""


def demo_arguments() -> dict[str, Any]:
    """The `args` of the demo's application."""
    (application,) = yaml.safe_load(DEMO_CONFIG.read_text(encoding="utf-8"))["applications"]
    arguments: dict[str, Any] = application["args"]
    return arguments
