"""What keeps a tokenizer from being used, whatever a request says."""

from __future__ import annotations


class TokenizerError(Exception):
    """The model's tokenizer or chat template can't be used: said once, at start-up, to whoever runs the service."""
