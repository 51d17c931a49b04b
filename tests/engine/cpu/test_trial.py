"""The trial of a new library of CPU kernels leaves none of them out."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from serve_app.engine.cpu.library import Kernels
from serve_app.engine.cpu.linear import Form
from serve_app.engine.cpu.trial import FORMS, call_all

WITHIN_A_LAYER = {"linear", "gated", "rms_norm", "rotate", "store", "attend", "layer"}
"""Each layer calls them."""


def test_it_calls_every_kernel_with_every_form(kernels: Kernels) -> None:
    called: set[str] = set()
    packed: set[int] = set()

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            called.add(name)
            if name == "pack":
                packed.add(arguments[5])
            return function(*arguments)

        return call

    functions = {name: function for name, function in vars(kernels).items() if callable(function)}
    call_all(
        SimpleNamespace(  # type: ignore[arg-type]
            page_tokens=kernels.page_tokens, **{name: recorded(name, each) for name, each in functions.items()}
        )
    )
    assert called | WITHIN_A_LAYER == set(functions)
    assert packed == {int(form) for form in Form}
    assert len(Form) == FORMS
