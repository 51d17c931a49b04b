"""Text that can be encoded, and a printable form of text that can't.

Knows no request.
"""

from __future__ import annotations

from serve_app.chat.prompt_error import PromptError

_SHOWN_CHARACTERS = 40
"""How much of a caller's own wrong value an error repeats."""


def require_unicode(text: str, param: str) -> None:
    """Refuse text with a lone surrogate, which JSON can spell ("\\ud800") and no encoding can hold: `PromptError`."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{param} is not valid Unicode: character {error.start} is a lone surrogate.", param=param
        ) from error


def shown(value: object) -> str:
    """A short, printable form: ascii() also spells lone surrogates, which a response could not carry."""
    if not isinstance(value, str):
        return "null" if value is None else f"of type {type(value).__name__}"
    return ascii(value if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]}...")
