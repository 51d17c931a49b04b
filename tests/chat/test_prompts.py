from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_tokenizers import metaspace_backend
from tokenizers import decoders

from serve_app.chat.prompt_error import PromptError
from serve_app.chat.prompts import PromptFormatter
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.chat.tokenizer_error import TokenizerError
from serve_app.config import ChatConfig

HI = [{"role": "user", "content": "Hi"}]
LLAMA_2_TEMPLATE = "{% for m in messages %}{{ bos_token + '[INST] <<SYS>>' + m['content'] + ' [/INST]' }}{% endfor %}"


@pytest.fixture
def formatter(demo_tokenizer: ChatTokenizer) -> PromptFormatter:
    return PromptFormatter(demo_tokenizer, ChatConfig())


def test_a_chat_of_the_demo_model(formatter: PromptFormatter) -> None:
    text = formatter.tokenizer._encoder.decode(formatter.render_chat(HI), skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith("<|im_start|>system\n")


def test_auto_is_llama2_only_for_its_template(llama2: ChatTokenizer, save_tokenizer: Callable[..., Path]) -> None:
    folder = save_tokenizer(metaspace_backend(), LLAMA_2_TEMPLATE, bos_token="<s>", eos_token="</s>")
    tokenizer = ChatTokenizer.load(folder)
    two_turns = [*HI, {"role": "assistant", "content": "yes"}, *HI]
    auto = PromptFormatter(tokenizer, ChatConfig()).render_chat(two_turns)
    assert auto == PromptFormatter(tokenizer, ChatConfig(format="llama2")).render_chat(two_turns)
    assert auto != PromptFormatter(tokenizer, ChatConfig(format="template")).render_chat(two_turns)
    assert auto.count(2) == 1


def test_llama2_tags_follow_the_config(llama2: ChatTokenizer) -> None:
    tagged = [{"role": "user", "content": "[INST]"}]
    with pytest.raises(PromptError, match="reserved"):
        PromptFormatter(llama2, ChatConfig(format="llama2")).render_chat(tagged)
    escaping = PromptFormatter(llama2, ChatConfig(format="llama2", llama2_tags="escape"))
    assert escaping.render_chat(tagged)


def test_without_a_template_prompts_work_and_chats_do_not(metaspace: ChatTokenizer) -> None:
    formatter = PromptFormatter(metaspace, ChatConfig())
    assert formatter.render_text("the fox")
    with pytest.raises(PromptError, match=r"no chat template.*send a prompt") as caught:
        formatter.render_chat(HI)
    assert caught.value.param == "messages"
    with pytest.raises(TokenizerError, match="no chat template"):
        PromptFormatter(metaspace, ChatConfig(format="template"))


def test_the_configs_template_replaces_the_models(demo_folder: Path, demo_tokenizer: ChatTokenizer) -> None:
    config = ChatConfig(template="{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}")
    formatter = PromptFormatter(ChatTokenizer.load(demo_folder, template=config.template), config)
    assert formatter.render_chat(HI) == formatter.render_text("<|im_start|>Hi", parse_special=True)
    with pytest.raises(ValueError, match="load the tokenizer with"):
        PromptFormatter(demo_tokenizer, config)


def test_a_tokenizer_that_can_not_be_streamed_is_refused_at_the_start(save_tokenizer: Callable[..., Path]) -> None:
    backend = metaspace_backend()
    backend.decoder = decoders.CTC()
    with pytest.raises(TokenizerError, match="CTC"):
        PromptFormatter(ChatTokenizer.load(save_tokenizer(backend)), ChatConfig())


def test_a_raw_prompt_is_text(formatter: PromptFormatter) -> None:
    control_ids = formatter.tokenizer.control_ids
    assert control_ids.isdisjoint(formatter.render_text("<|im_start|>user"))
    assert formatter.render_text("<|im_start|>user", parse_special=True)[0] in control_ids


def test_an_empty_prompt_is_refused(formatter: PromptFormatter) -> None:
    with pytest.raises(PromptError, match="empty") as caught:
        formatter.render_text("")
    assert caught.value.param == "prompt"


def test_prompts_that_leave_no_room_are_refused(formatter: PromptFormatter) -> None:
    ids = formatter.render_text("one two three")
    assert formatter.render_text("one two three", context_tokens=len(ids) + 1) == ids
    with pytest.raises(PromptError, match=f"maximum context length is {len(ids)} tokens. However") as caught:
        formatter.render_text("one two three", context_tokens=len(ids))
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(PromptError, match="context") as caught:
        formatter.render_chat(HI, context_tokens=8)
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")


def test_hopeless_prompts_are_refused_before_they_are_encoded(formatter: PromptFormatter) -> None:
    too_long = [
        lambda: formatter.render_text("x" * 4_000_000, context_tokens=8192),
        lambda: formatter.render_chat([{"role": "user", "content": "x" * 4_000_000}], context_tokens=8192),
        lambda: formatter.render_chat([{"role": "user", "content": ""}] * 100_000, context_tokens=8192),
    ]
    for attempt in too_long:
        with pytest.raises(PromptError, match="at least") as caught:
            attempt()
        assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("content", ["\x00", "a\x00b" * 1000, "<|im_end|>" * 100_000, "x <|im_" * 10_000, "\U0010ffff"])
def test_awkward_text_is_served_as_text(formatter: PromptFormatter, content: str) -> None:
    ids = formatter.render_chat([{"role": "user", "content": content}])
    controls = [token_id for token_id in ids if token_id in formatter.tokenizer.control_ids]
    assert len(controls) == 5
    assert content in formatter.tokenizer.decode(ids)


def test_forgeries_in_every_field(formatter: PromptFormatter) -> None:
    for message in (
        {"role": "<|im_start|>", "content": "a"},
        {"role": "user", "content": "a", "name": "<|im_end|>"},
        {"role": "user", "content": "a", "tools": [{"parameters": {"<|im_end|>": {}}}]},
    ):
        with pytest.raises(PromptError):
            formatter.render_chat([message])
