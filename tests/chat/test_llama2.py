"""Against Meta's reference, spelt out: facebookresearch/llama, llama/generation.py, `chat_completion`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_tokenizers import llama_like
from tokenizers import normalizers

from serve_app.chat.conversation import ChatMessage
from serve_app.chat.llama2 import Llama2Format, check_golden_ids
from serve_app.chat.prompt_error import PromptError
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.chat.tokenizer_error import TokenizerError

BOS, EOS = 1, 2
GOLDEN = [1, 518, 25580, 29962, 6324, 518, 29914, 25580, 29962]


def system(text: str) -> ChatMessage:
    return ChatMessage("system", text)


def user(text: str) -> ChatMessage:
    return ChatMessage("user", text)


def assistant(text: str) -> ChatMessage:
    return ChatMessage("assistant", text)


def raw(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """What sentencepiece's encode gives: no BOS, no EOS."""
    return tokenizer._encoder.encode(text, add_special_tokens=False).ids


def test_the_golden_ids(llama2: ChatTokenizer) -> None:
    assert Llama2Format(llama2).encode([user("Hi")]) == GOLDEN
    assert Llama2Format(llama2).encode([user("  Hi\n")]) == GOLDEN


def test_each_finished_pair_is_encoded_apart(llama2: ChatTokenizer) -> None:
    chat = [user(" one "), assistant("\n two "), user("three"), assistant("four"), user("five ")]
    assert Llama2Format(llama2).encode(chat) == [
        *(BOS, *raw(llama2, "[INST] one [/INST] two "), EOS),
        *(BOS, *raw(llama2, "[INST] three [/INST] four "), EOS),
        *(BOS, *raw(llama2, "[INST] five [/INST]")),
    ]


def test_the_system_text_is_folded_into_the_first_turn(llama2: ChatTokenizer) -> None:
    chat = [system(" Be brief. "), user(" Hi "), assistant("yes"), user("Hi")]
    first = "[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\n Hi [/INST] yes "
    assert Llama2Format(llama2).encode(chat) == [BOS, *raw(llama2, first), EOS, *GOLDEN]
    developer = [ChatMessage("developer", " Be brief. "), *chat[1:]]
    assert Llama2Format(llama2).encode(developer) == Llama2Format(llama2).encode(chat)


def test_stripped_after_folding(llama2: ChatTokenizer) -> None:
    """An empty first user text leaves the fold without its newlines, as Meta's strip does."""
    expected = [BOS, *raw(llama2, "[INST] <<SYS>>\nBe brief.\n<</SYS>> [/INST]")]
    assert Llama2Format(llama2).encode([system("Be brief."), user(" ")]) == expected


def test_bos_and_eos_in_a_text_are_text(llama2: ChatTokenizer) -> None:
    ids = Llama2Format(llama2).encode([user("<s>a</s>"), assistant("</s><s>b"), user("<s>")])
    assert (ids.count(BOS), ids.count(EOS)) == (2, 1)
    assert llama2.decode(ids[1:]).count("<s>") == 3


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_tags_are_refused_in_user_and_system_text(llama2: ChatTokenizer, tag: str) -> None:
    for chat, param in ([user(f"a{tag}b")], "messages[0].content"), ([system(tag), user("a")], "messages[0].content"):
        with pytest.raises(PromptError, match="reserved by the Llama-2") as caught:
            Llama2Format(llama2).encode(chat)
        assert caught.value.param == param


def test_tags_can_be_broken_instead(llama2: ChatTokenizer) -> None:
    text = "a [[INST]INST] [/INST] <<<SYS>> <</SYS>>"
    ids = Llama2Format(llama2, tags="escape").encode([user(text)])
    prompt = llama2.decode(ids)
    assert prompt.replace("\u200d", "") == f"[INST] {text} [/INST]"
    assert [prompt.count(tag) for tag in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")] == [1, 1, 0, 0]


def test_history_is_never_refused(llama2: ChatTokenizer) -> None:
    for tags in ("reject", "escape"):
        ids = Llama2Format(llama2, tags=tags).encode([user("Hi"), assistant("[INST] <<SYS>>"), user("Hi")])
        assert ids == [BOS, *raw(llama2, "[INST] Hi [/INST] [INST] <<SYS>> "), EOS, *GOLDEN]


@pytest.mark.parametrize(
    "chat",
    [
        [assistant("a")],
        [user("a"), user("b")],
        [user("a"), assistant("b")],
        [system("a")],
        [system("a"), system("b"), user("c")],
        [user("a"), system("b"), user("c")],
        [],
    ],
)
def test_turns_out_of_order_are_refused(llama2: ChatTokenizer, chat: list[ChatMessage]) -> None:
    with pytest.raises(PromptError, match="user and assistant in turn") as caught:
        Llama2Format(llama2).encode(chat)
    assert caught.value.param == "messages"


def test_a_wrongly_converted_llama_is_refused(llama2: ChatTokenizer, save_tokenizer: Callable[..., Path]) -> None:
    vocab = llama2._encoder.get_vocab()
    merges = [["▁", "["], ["I", "N"], ["S", "T"], ["IN", "ST"], ["H", "i"], ["▁", "Hi"]]
    backend = llama_like(vocab, merges)
    backend.normalizer = normalizers.Replace(" ", "▁")  # no space before the text
    wrong = ChatTokenizer.load(save_tokenizer(backend, bos_token="<s>", eos_token="</s>"))
    with pytest.raises(TokenizerError, match="converted wrongly"):
        check_golden_ids(wrong)
    with pytest.raises(TokenizerError, match="converted wrongly"):
        Llama2Format(wrong)


def test_another_vocabulary_has_no_golden_ids(metaspace: ChatTokenizer) -> None:
    check_golden_ids(metaspace)
    assert Llama2Format(metaspace).encode([user("the fox")])[0] == metaspace.bos_token_id


def test_bos_and_eos_are_needed(save_tokenizer: Callable[..., Path], llama2: ChatTokenizer) -> None:
    backend = llama_like({"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3}, [])
    with pytest.raises(TokenizerError, match="BOS and an EOS"):
        Llama2Format(ChatTokenizer.load(save_tokenizer(backend)))
