"""Which weights are served now, for what was generated earlier and is still kept. Knows no store."""

from __future__ import annotations

from serve_app.api.errors import SERVER_ERROR, ApiError
from serve_app.core import FailureCode, Fingerprint, ModelCard, not_ready
from serve_app.generation.service import CompletionService


class ServedWeights:
    """The fingerprint of the served weights, also while no replica is up."""

    def __init__(self, service: CompletionService) -> None:
        self._service = service
        self._seen: Fingerprint | None = None
        """As last seen."""

    def saw(self, fingerprint: Fingerprint) -> None:
        """Note the weights of a request that was just accepted."""
        self._seen = fingerprint

    async def fingerprint(self) -> Fingerprint:
        """Raises `RequestError` (503) if this process never saw a replica up."""
        state = await self._service.state()
        if isinstance(state, ModelCard):
            self._seen = state.fingerprint
        elif self._seen is None:
            raise not_ready(state)
        return self._seen


def replaced(what: str) -> ApiError:
    """410 for something whose tokens belong to other weights than those that are served now."""
    message = f"The model was replaced after this {what} began, and it can't be continued. Send it again."
    return ApiError(410, message, type=SERVER_ERROR, code=str(FailureCode.WRONG_WEIGHTS))
