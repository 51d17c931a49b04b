"""The fixed work of the benchmarks: varied chats, as token ids, so that every contender computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

SUBJECTS = (
    "the tides", "a sourdough starter", "binary search", "the French Revolution", "a bicycle's gears", "photosynthesis",
    "compound interest", "the offside rule", "a haiku", "plate tectonics", "a good night's sleep", "prime numbers",
    "the water cycle", "a chess opening", "vaccines", "the speed of light",
)  # fmt: skip
_TASKS = (
    "Explain {} to a ten-year-old.",
    "Write three short paragraphs about {}, the second of them with an example from everyday life, and end with a "
    "question that makes the reader curious to find out more.",
)


def chats(folder: Path, count: int) -> list[list[int]]:
    """`count` prompts rendered by the model's own chat template, as ids; between 30 and 80 tokens each."""
    texts = [_TASKS[i // len(SUBJECTS) % len(_TASKS)].format(SUBJECTS[i % len(SUBJECTS)]) for i in range(count)]
    return render(folder, [[{"role": "user", "content": text}] for text in texts])


def render(folder: Path, conversations: Sequence[list[dict[str, str]]]) -> list[list[int]]:
    """Messages as ids, by the chat template of the tokenizer in `folder`, up to where the answer begins."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for messages in conversations
    ]
