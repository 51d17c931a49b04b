"""Notes which isolated request a replica is computing, so that its death can be blamed on that request.

A replica writes a note before each step that an isolated request has to itself. The streams that waited beside it are
not blamed. Notes are in Ray's key-value store, like `progress`: they outlive the replica, and any ingress can read
them.
"""

from __future__ import annotations

import logging

from serve_app.core import GenerationRequest
from serve_app.deployments.ray_internals import delete_note, get_note, put_note

logger = logging.getLogger(__name__)


class PoisonNotes:
    """One note per replica that computes a suspect. Each call is one short blocking round trip to the GCS, or two.

    Errors of the store are logged and not raised: without a note no request is blamed for a death.
    """

    def __init__(self, app_name: str) -> None:
        self._app_name = app_name

    def write(self, replica: str, request: GenerationRequest) -> None:
        """Note that this replica is about to compute `request` alone."""
        try:
            put_note(self._key(replica), _name(request))
        except Exception:
            logger.exception("request %s: could not write the note that it is computed alone", request.request_id)

    def names(self, replica: str, request: GenerationRequest) -> bool:
        """Whether the lost `replica` was computing this attempt, alone."""
        try:
            return bool(get_note(self._key(replica)) == _name(request))
        except Exception:
            logger.exception("request %s: could not read the note that it is computed alone", request.request_id)
            return False

    def forget(self, replica: str, request: GenerationRequest) -> None:
        """This attempt is over: take its note away, unless another suspect's has taken its place."""
        if self.names(replica, request):
            try:
                delete_note(self._key(replica))
            except Exception:
                logger.exception("request %s: could not delete the note that it is computed alone", request.request_id)

    def _key(self, replica: str) -> str:
        return f"{self._app_name}/{replica}/suspect"


def _name(request: GenerationRequest) -> bytes:
    return f"{request.request_id}/{request.choice}/{len(request.output_token_ids)}".encode()
