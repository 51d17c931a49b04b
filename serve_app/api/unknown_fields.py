"""Request fields that are not served: refused where they would change the answer, else ignored and named.

Promises that an unknown field is never ignored in silence: its name is in the header `X-Ignored-Fields` and in the
access log. The name is a client's text, and is made safe for both. Knows no endpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from serve_app.api.errors import ApiError, bad_request, unknown_parameter
from serve_app.observability.logs import RequestRecord

NO_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
    }
)
"""OpenAI's fields that change nothing in an answer, or only its speed: accepted with any value, and not reported."""

NOT_SERVED: Mapping[str, tuple[Any, ...]] = {
    # Tools, media and services around a model; "tools" and "tool_choice" are here for the endpoint without chats
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "images": (),
    "web_search_options": (),
    "enable_search": (),
    "search_parameters": (),
    "plugins": (),
    "moderation": (),
    "safe_prompt": (),
    "prompt_mode": (),
    "watermark": (),
    # Other forms of the prompt; "messages" and "prompt" are here for the endpoint that takes the other one
    "messages": (),
    "prompt": (),
    "add_special_tokens": (),
    "add_bos_token": (True,),
    "system": (),
    "instructions": (),
    "input": (),
    "input_ids": (),
    "prompt_embeds": (),
    "negative_prompt": (),
    "documents": (),
    "chat_template": (),
    "chat_template_str": (),
    "instruction_template_str": (),
    "continue_": (),
    "template": (),
    "truncate": (),
    "options": (),
    "extra_body": (),
    "lora": (),
    "lora_path": (),
    "lora_request": (),
    "adapter_id": (),
    # Structured output
    "format": (),
    "grammar_string": (),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    # How tokens are chosen; where a sampler has several settings, the one that turns it on
    "best_of": (1,),
    "use_beam_search": (),
    "num_beams": (0, 1),
    "num_return_sequences": (0, 1),
    "n_cmpl": (0, 1),
    "do_sample": (True,),
    "typical_p": (1,),
    "typical": (1,),
    "tfs_z": (1,),
    "tfs": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "nsigma": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "dynamic_temperature": (),
    "smoothing_factor": (0,),
    "adaptive_target": (-1, 0),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "cfg_scale": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "repeat_last_n": (-1,),
    "temperature_last": (),
    "samplers": (),
    "sampler_priority": (),
    "sampler_order": (),
    "allowed_token_ids": (),
    "allowed_tokens": (),
    "bad_words": (),
    "bad_words_ids": (),
    "banned_tokens": (),
    "banned_strings": (),
    "custom_token_bans": (),
    "logits_processors": (),
    "custom_logit_processor": (),
    "random_seed": (),
    # Where the answer ends
    "max_new_tokens": (-1,),
    "max_length": (-1,),
    "n_predict": (-1,),
    "num_predict": (-1,),
    "min_new_tokens": (0,),
    "min_length": (0,),
    "ban_eos_token": (),
    "t_max_predict_ms": (0,),
    "thinking_budget": (-1,),
    "thinking_token_budget": (-1,),
    "reasoning_budget": (-1,),
    "stop_sequence": (),
    "stop_sequences": (),
    "stopping_strings": (),
    "custom_stopping_strings": (),
    "stop_words": (),
    "stop_regex": (),
    # What the answer shows
    "echo": (),
    "suffix": (),
    "return_full_text": (),
    "include_stop_str_in_output": (),
    "no_stop_trim": (),
    "skip_special_tokens": (True,),
    "n_probs": (0,),
    "logprob_token_ids": (),
}
"""Fields of OpenAI's or of other servers' (vLLM, SGLang, TGI, llama.cpp, Ollama, text-generation-webui, Mistral, ...)
that would change an answer in a way that is not served -> their harmless values, besides null, false and empty ones. A
field without effect unless another one is set (`dry_base`, `mirostat_tau`, `length_penalty`) is not listed; only that
other one is."""

_EMPTY: tuple[Any, ...] = (False, "", [], {})
_ON_BY_DEFAULT = frozenset({"add_bos_token", "do_sample", "skip_special_tokens"})
"""Fields that are true by default: for these, false is not harmless."""

_MAX_NAMES = 20
_MAX_NAME_CHARS = 64
_MORE = "..."
_INDEX = re.compile(r"\[\d+\]")


class UnknownFields:
    """Refuses the unknown fields of one request, or records their names."""

    def __init__(self, record: RequestRecord, *, refused: bool) -> None:
        """`record` gets the names, for the log and the header. `refused`: an unknown field is an error instead."""
        self._record = record
        self._refused = refused

    def add(self, name: str) -> None:
        """Add an unknown field, e.g. `stream_options.x`. Raises `ApiError` when unknown fields are refused."""
        if self._refused:
            raise unknown_parameter(name)
        names = self._record.ignored_fields
        if len(names) > _MAX_NAMES:  # a request may have 100,000 of them
            return
        safe = safe_name(name)
        if safe not in names:
            names.append(safe if len(names) < _MAX_NAMES else _MORE)

    def add_in(self, where: str, field: str) -> None:
        """Add the unknown field `field` inside the field `where`. Raises `ApiError` as `add` does."""
        self.add(f"{where}.{field}")


def safe_name(name: str) -> str:
    """A field's name for a header and a line of the log: short, ASCII, no spaces, commas or quotes.

    Without list indices, so that a field that many messages have is named once: `messages[3].id` is `messages[].id`.
    """
    cut = _INDEX.sub("[]", name[: 2 * _MAX_NAME_CHARS])
    safe = quote(cut[:_MAX_NAME_CHARS], safe="[]", errors="replace")
    return safe if len(cut) <= _MAX_NAME_CHARS else safe + _MORE


def refuse_if_not_served(name: str, value: Any, not_served: Mapping[str, tuple[Any, ...]] = NOT_SERVED) -> None:
    """Raise `ApiError` if this value of the field would change the answer in a way that is not served."""
    neutral = not_served.get(name)
    if neutral is None or value is None:
        return
    off = neutral if name in _ON_BY_DEFAULT else (*neutral, *_EMPTY)
    # A boolean must not match a number, although True == 1 in Python.
    if not any(value == harmless and isinstance(value, bool) == isinstance(harmless, bool) for harmless in off):
        raise unsupported(name)


def unsupported(name: str, hint: str = "It is not supported by this server.") -> ApiError:
    """400 for a field that would change the answer and can't be served."""
    return bad_request(f"The parameter '{name}' can't be used: {hint}", param=name, code="unsupported_parameter")
