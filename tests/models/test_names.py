from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.config import ModelConfig
from serve_app.models.names import aliases


def test_the_demo_answers_to_its_makers_id() -> None:
    assert aliases(ModelConfig()) == {"demo", "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"}


@pytest.mark.parametrize(
    ("source", "name"), [("Qwen/Qwen3-0.6B", "Qwen3-0.6B"), ("own-model", "own-model")], ids=["owner", "no owner"]
)
def test_a_hub_model_answers_to_its_id(source: str, name: str) -> None:
    assert aliases(ModelConfig(source=source, served_model_name="chat")) == {source, name}


def test_a_folder_and_a_file_answer_to_their_names(tmp_path: Path) -> None:
    folder, file = tmp_path / "my-model", tmp_path / "tiny.Q4.gguf"
    folder.mkdir()
    file.touch()
    assert aliases(ModelConfig(source=f"{folder}/")) == {f"{folder}/", "my-model"}
    assert aliases(ModelConfig(source=str(file))) == {str(file), "tiny.Q4.gguf", "tiny.Q4"}
