"""Models from the Hugging Face hub, into Hugging Face's own cache.

Promises to fetch one format of the weights only, to refuse pickles before fetching, to use what is cached when the
hub can't be reached, and to say in one sentence what is wrong when it can't.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, cast

from huggingface_hub import HfApi, constants, get_session, get_token, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm

from serve_app.config import ModelConfig
from serve_app.core import LoadStage
from serve_app.models.cache import Progress, disk_error, require_space
from serve_app.models.checkpoint import PICKLE_WEIGHTS, SAFETENSORS_WEIGHTS, pickle_refused, weight_files, weight_names
from serve_app.models.model_error import ModelError

_TIMEOUT_S = 10.0
"""For the hub to answer one question; downloads go on as long as bytes come."""
_SMALL_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken"})
_HUB_ERRORS = (cast(type[Exception], HfHubHTTPError.__bases__[0]), OSError)
"""huggingface_hub lets errors of its HTTP library through (httpx or httpx2, by version); its own are based on them."""


def fetch(model: ModelConfig, *, tokenizer_only: bool, progress: Progress) -> tuple[Path, str]:
    """The snapshot folder in Hugging Face's cache, and its commit.

    Falls back on the cache when the hub can't be reached or refuses. Raises `ModelError`.
    """
    try:
        return _fetch(model, tokenizer_only, progress)
    except _HUB_ERRORS as error:
        if (
            not isinstance(error, RevisionNotFoundError)
            and (folder := cached(model, tokenizer_only=tokenizer_only)) is not None
        ):
            return folder, folder.name
        raise _explain(model, error) from error


def _fetch(model: ModelConfig, tokenizer_only: bool, progress: Progress) -> tuple[Path, str]:
    progress(LoadStage(f"asking {constants.ENDPOINT} for {model.source}"))
    _require_session()
    info = HfApi().model_info(model.source, revision=model.revision, files_metadata=True, timeout=_TIMEOUT_S)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    if not tokenizer_only:
        _refuse_formats(model, sizes)
    # Fetched by the revision's name: the cache then records its commit, for when the hub can't be reached.
    small = [name for name in sizes if _is_small(name, with_code=model.trust_remote_code)]
    bar = _bar_class(progress, f"fetching {model.source} (settings and tokenizer)", 0)
    folder = Path(snapshot_download(model.source, revision=model.revision, allow_patterns=small, tqdm_class=bar))
    if not tokenizer_only:
        _check_before_weights(model, folder)
        weights = [
            name
            for name in weight_names(folder, sizes)
            if not isinstance(try_to_load_from_cache(model.source, name, revision=folder.name), str)
        ]
        needed = sum(sizes.get(name, 0) for name in weights)
        cache = Path(constants.HF_HUB_CACHE)
        require_space(next(path for path in (cache, *cache.parents) if path.exists()), needed)
        if weights:
            bar = _bar_class(progress, f"fetching {model.source} ({needed / 1e9:.1f} GB)", needed)
            snapshot_download(model.source, revision=folder.name, allow_patterns=weights, tqdm_class=bar)
    return folder, folder.name


def _require_session() -> None:
    """Raise OSError for proxy settings that the HTTP library can't use, so that `fetch` falls back on the cache."""
    try:
        get_session()
    except Exception as error:  # ImportError, ValueError or its own InvalidURL, by setting and library
        raise ConnectionError(f"the environment's proxy settings can't be used: {error}") from error


def _check_before_weights(model: ModelConfig, folder: Path) -> None:
    """Raise `ModelError` for a model that can't be served, before gigabytes are fetched."""
    # Imported late: these import transformers and torch, which fetching a tokenizer does not need.
    from serve_app.models.rotary import choose_angles
    from serve_app.models.sizes import own_context_tokens
    from serve_app.models.support import read_config

    config = read_config(folder, model.source, trust_remote_code=model.trust_remote_code)
    choose_angles(config, model.max_model_len or own_context_tokens(config) or 0, model.source)


def _refuse_formats(model: ModelConfig, sizes: Mapping[str, int]) -> None:
    if any(name in sizes for name in SAFETENSORS_WEIGHTS):
        return
    if not any(name in sizes for name in PICKLE_WEIGHTS):
        kinds = sorted({PurePosixPath(name).suffix for name in sizes} & {".gguf", ".onnx", ".pth", ".bin", ".msgpack"})
        found = f" (only {', '.join(kinds)})" if kinds else ""
        raise ModelError(
            f"{model.source} holds no weights that can be served{found}; use a repository with model.safetensors, or "
            "download a .gguf file and give its path."
        )
    if not model.allow_pickle_weights:
        raise pickle_refused(model.source)


def _is_small(name: str, *, with_code: bool) -> bool:
    path = PurePosixPath(name)
    if path.suffix == ".py":
        return with_code
    return len(path.parts) == 1 and path.suffix in _SMALL_SUFFIXES


def cached(model: ModelConfig, *, tokenizer_only: bool) -> Path | None:
    """The snapshot folder of an earlier fetch, if all needed files are in it. Uses no network."""
    try:
        found = snapshot_download(
            model.source, revision=model.revision, local_files_only=True, allow_patterns=["config.json"]
        )
    except LocalEntryNotFoundError:
        return None
    folder = Path(found)
    weights = [] if tokenizer_only else weight_files(folder)
    return folder if tokenizer_only or (weights and all(path.is_file() for path in weights)) else None


def _explain(model: ModelConfig, error: Exception) -> ModelError:
    """One sentence for a person, from what the hub or the network said."""
    page = f"{constants.ENDPOINT}/{model.source}"
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    token = get_token()
    if isinstance(cause, GatedRepoError):
        if token is None:
            return ModelError(
                f"{model.source} needs its licence accepted at {page} and a token: set HF_TOKEN, or run "
                "`hf auth login`."
            )
        return ModelError(
            f"Your token has no access to {model.source}; ask for it at {page}, and wait until it is given."
        )
    if isinstance(cause, RevisionNotFoundError):
        return ModelError(f"{model.source} has no revision {model.revision!r}; see {page}/commits.")
    if isinstance(cause, RepositoryNotFoundError):
        login = "" if token else ", or, if it is private, set HF_TOKEN or run `hf auth login`"
        return ModelError(
            f"The hub has no model {model.source}, or you have no access to it; check the name at {page}{login}."
        )
    if status in (401, 403):
        return ModelError(f"The hub refused the token ({status}); make a new one and set HF_TOKEN, or `hf auth login`.")
    if isinstance(cause, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return ModelError(
            f"{model.source} is not (whole) in {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE is set; unset it to fetch, "
            "or copy the cache from another machine."
        )
    if isinstance(cause, OSError) and cause.errno is not None and status is None:
        return disk_error(Path(constants.HF_HUB_CACHE), cause)
    said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    return ModelError(
        f"The hub {constants.ENDPOINT} can't be reached ({said}) and {model.source} is not in "
        f"{constants.HF_HUB_CACHE}; check the network, or set model.source to a model folder."
    )


def _bar_class(progress: Progress, stage: str, total_bytes: int) -> Any:
    """A progress bar for huggingface_hub that reports bytes instead of drawing."""

    class _Reporting(tqdm):  # type: ignore[misc]
        def display(self, *args: Any, **kwargs: Any) -> bool:
            if self.unit == "B" and total_bytes:
                progress(LoadStage(stage, min(self.n / total_bytes, 1.0)))
            return True

    return _Reporting
