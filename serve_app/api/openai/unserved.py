"""Endpoints of OpenAI's API, and of servers like this one, that are not served: they are refused by name.

Knows no endpoint that is served.
"""

from __future__ import annotations

from serve_app.api.errors import ApiError

_UNSERVED = {
    "/v1/embeddings": "Embeddings",
    "/v1/audio": "Speech and transcription",
    "/v1/images": "Images",
    "/v1/videos": "Videos",
    "/v1/realtime": "Realtime sessions",
    "/v1/moderations": "Moderation",
    "/v1/files": "Files",
    "/v1/uploads": "Files",
    "/v1/batches": "Batches",
    "/v1/fine_tuning": "Fine-tuning",
    "/v1/vector_stores": "Vector stores",
    "/v1/assistants": "Assistants",
    "/v1/threads": "Assistants",
    "/v1/containers": "Containers",
    "/v1/evals": "Evaluations",
    "/v1/edits": "Edits",
    "/v1/rerank": "Reranking",
    "/v1/score": "Scoring of pairs",
    "/rerank": "Reranking",
    "/score": "Scoring of pairs",
    "/pooling": "Pooling",
    "/classify": "Classification",
    "/embeddings": "Embeddings",
}
"""Path, which also stands for all paths below it -> what it gives elsewhere."""


def unserved(path: str) -> ApiError | None:
    """The refusal of a path that is known and not served; None for any other."""
    for known, what in _UNSERVED.items():
        if path == known or path.startswith(f"{known}/"):
            message = (
                f"{what}: {known} is not served here. This server answers chats and texts: POST /v1/chat/completions, "
                "/v1/completions, /v1/responses, /v1/messages or /stream."
            )
            return ApiError(404, message, code="unsupported_endpoint")
    return None
