import json
from pathlib import Path

import pytest
from model_builders import tiny_tokenizer
from pydantic import ValidationError

from serve_app.config import AppConfig, GenerationConfig
from serve_app.core import SamplingParams
from serve_app.models.defaults import GenerationDefaults, read_generation_defaults
from serve_app.models.model_error import ModelError


def _read(folder: Path, **files: object) -> GenerationDefaults:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return read_generation_defaults(folder, folder)


def test_openai_defaults_when_nothing_is_said(tmp_path: Path) -> None:
    assert _read(tmp_path, config={}) == GenerationDefaults()
    assert GenerationDefaults() == GenerationDefaults(1.0, 1.0, 0, 0.0, 1.0, ())


def test_what_the_model_says_is_taken(tmp_path: Path) -> None:
    settings = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
    got = _read(tmp_path, config={"eos_token_id": 7}, generation_config={**settings, "eos_token_id": [9, 3]})
    assert got == GenerationDefaults(0.6, 0.9, 20, 0.05, 1.1, (3, 9))


def test_what_is_configured_comes_before_what_the_model_says(tmp_path: Path) -> None:
    _read(tmp_path, generation_config={"temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": 3})
    configured = GenerationConfig(temperature=0, top_k=0, repetition_penalty=1.2)
    got = read_generation_defaults(tmp_path, tmp_path, configured)
    assert got == GenerationDefaults(0.0, 0.9, 0, 0.0, 1.2, (3,))


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -0.1}, {"top_p": 1.1}, {"top_k": -1}, {"min_p": 2}, {"repetition_penalty": 0}, {"top_q": 1}],
)
def test_a_configured_default_that_no_sampler_can_honour_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        AppConfig.model_validate({"model": {"generation": settings}})


@pytest.mark.parametrize("bound", [0, 1])
def test_the_bounds_of_what_can_be_configured_make_sampling_parameters(bound: int) -> None:
    bounds = {"temperature": (0, 100), "top_p": (0, 1), "top_k": (0, 2**31 - 1), "min_p": (0, 1)}
    for name, values in {**bounds, "repetition_penalty": (0.01, 100)}.items():
        GenerationConfig(**{name: values[bound]})
        SamplingParams(seed=0, **{name: values[bound]})


def test_null_is_nothing_said(tmp_path: Path) -> None:
    got = _read(tmp_path, config={"eos_token_id": 0}, generation_config={"temperature": None, "eos_token_id": None})
    assert got == GenerationDefaults(eos_token_ids=(0,))


def test_eos_of_a_nested_config(tmp_path: Path) -> None:
    assert _read(tmp_path, config={"text_config": {"eos_token_id": [5]}}).eos_token_ids == (5,)


def test_eos_of_the_tokenizer_counts_too(tmp_path: Path) -> None:
    """ChatML fine-tunes whose generation_config.json is their base model's."""
    tiny_tokenizer().save_pretrained(tmp_path)
    assert _read(tmp_path, config={}).eos_token_ids == (2,)
    assert _read(tmp_path, config={"eos_token_id": 1}).eos_token_ids == (1, 2)
    assert _read(tmp_path, config={"eos_token_id": 1}, generation_config={"eos_token_id": [0]}).eos_token_ids == (0, 2)


def test_eos_of_a_tokenizer_whose_vocabulary_is_not_json(tmp_path: Path) -> None:
    added = {"2": {"content": "</s>"}, "32000": {"content": "<|im_end|>"}}
    files = {"tokenizer_config": {"added_tokens_decoder": added}, "generation_config": {"eos_token_id": 2}}
    got = _read(tmp_path, special_tokens_map={"eos_token": {"content": "<|im_end|>"}}, **files)
    assert got.eos_token_ids == (2, 32000)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", -1),
        ("top_p", 1.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("min_p", 2),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
    ],
)
def test_what_no_sampler_can_honour_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, value: float
) -> None:
    got = _read(tmp_path, generation_config={"do_sample": False, name: value, "eos_token_id": [-1, 3]})
    assert got == GenerationDefaults(eos_token_ids=(3,))
    (line,) = caplog.messages
    assert name in line


def test_every_value_that_is_taken_makes_sampling_parameters(tmp_path: Path) -> None:
    """Also those at the bounds: a request must never fail by the model's own settings."""
    for value in (-1e9, -1, 0, 1e-3, 0.5, 1, 50, 101, 2**31, 1e300):
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        got = _read(tmp_path, generation_config=dict.fromkeys(names, value))
        SamplingParams(seed=0, **{name: getattr(got, name) for name in names})


@pytest.mark.parametrize("content", ["{", "[]", '{"temperature": "hot"}', '{"top_k": []}'])
def test_rubbish_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        read_generation_defaults(tmp_path, tmp_path)
