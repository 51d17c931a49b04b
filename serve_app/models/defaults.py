"""What a request leaves out: the config's `model.generation`, then the model's own settings, then OpenAI's defaults.

Reads generation_config.json, config.json and the tokenizer's settings as they lie in the folder; loads nothing.
Promises values that a sampler can honour.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve_app.config import GenerationConfig
from serve_app.core import SAMPLING_BOUNDS, GenerationDefaults
from serve_app.models.checkpoint import read_json
from serve_app.models.model_error import ModelError

logger = logging.getLogger(__name__)


def read_generation_defaults(
    folder: Path, tokenizer_folder: Path, configured: GenerationConfig | None = None
) -> GenerationDefaults:
    """The defaults of the model in `folder`, but for what is `configured`.

    Raises `ModelError` for a file that isn't what it should be.

    Only what the files state counts: transformers' class defaults (top_k 50, greedy unless `do_sample`) are not the
    model's own. A value that no sampler can honour (top_k -1) is left out, and the log says so.

    An answer ends with the ids that the model states and with the tokenizer's own, as in vLLM: fine-tunes that brought
    ChatML often left their base model's id in generation_config.json, and would run past their turn. These ids also end
    the answers to raw prompts: the model was taught to end with them, and they have no text.
    """
    generation = read_json(folder / "generation_config.json")
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    stated = (_ids(said.get("eos_token_id")) for said in (generation, config, text) if isinstance(said, dict))
    eos_token_ids = next(filter(None, stated), set()) | _tokenizer_eos(tokenizer_folder)
    try:
        own = GenerationDefaults(
            temperature=_number(generation, "temperature", 1.0),
            top_p=_number(generation, "top_p", 1.0),
            top_k=int(_number(generation, "top_k", 0)),
            min_p=_number(generation, "min_p", 0.0),
            repetition_penalty=_number(generation, "repetition_penalty", 1.0),
            eos_token_ids=tuple(sorted(token_id for token_id in eos_token_ids if token_id >= 0)),
        )
    except (TypeError, ValueError) as error:
        raise ModelError(f"{folder / 'generation_config.json'} has a value that is no number: {error}.") from error
    return replace(own, **configured.model_dump(exclude_none=True)) if configured else own


def _number(settings: dict[str, Any], name: str, default: float) -> float:
    value = settings.get(name)
    if value is None:
        return default
    low, high = SAMPLING_BOUNDS[name]  # a default outside would fail each request that gives no value
    if low <= float(value) <= high:  # False for NaN, which Python reads from JSON
        return float(value)
    logger.warning(
        "generation_config.json has %s %s, which is not between %g and %g; requests without it take %g",
        *(name, value, low, high, default),
    )
    return default


def _ids(value: Any) -> set[int]:
    """One id, a list of them, or nothing."""
    if value is None:
        return set()
    return {int(item) for item in (value if isinstance(value, list) else [value])}


def _tokenizer_eos(folder: Path) -> set[int]:
    """The id of the tokenizer's eos token, looked up among its added tokens and its vocabulary."""
    settings, tokenizer = read_json(folder / "tokenizer_config.json"), read_json(folder / "tokenizer.json")
    token = settings.get("eos_token") or read_json(folder / "special_tokens_map.json").get("eos_token")
    if isinstance(token, dict):  # older files keep an AddedToken
        token = token.get("content")
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    known = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    # Where a folder has only a tokenizer.model, `added_tokens_decoder` is all that can be read without loading it.
    known |= {entry["content"]: int(key) for key, entry in settings.get("added_tokens_decoder", {}).items()}
    known |= {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])}
    return {known[token]} if token in known else set()
