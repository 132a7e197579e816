"""Text is tokenised as vLLM does it: special tokens once, in either kind of prompt."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cluster.config import ModelConfig
from cluster.errors import ConfigError, InvalidRequest
from router.generation import ChatMessage, Prompt
from router.tokenize import INLINE_CHARS, Tokenizer

BOS = 1


class Pretrained:
    """One token a character; its template writes the special token itself."""

    chat_template: str | None = "yes"

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def __len__(self) -> int:
        return 300

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.threads.add(threading.get_ident())
        tokens = [BOS if c == "^" else 10 + ord(c) % 200 for c in text]
        return [BOS, *tokens] if add_special_tokens else tokens

    def apply_chat_template(
        self, turns: list[dict[str, str]], add_generation_prompt: bool, tokenize: bool
    ) -> str:
        if any(turn["role"] == "robot" for turn in turns):
            raise ValueError("roles must be user or assistant")
        return "^" + "".join(turn["content"] for turn in turns)


async def test_special_tokens_once() -> None:
    tokenizer = Tokenizer(Pretrained())
    text = await tokenizer.encode(Prompt(text="hi"))
    chat = await tokenizer.encode(Prompt(chat=(ChatMessage("user", "hi"),)))
    assert text == chat
    assert text.count(BOS) == 1
    assert await tokenizer.encode(Prompt(token_ids=(5, 6))) == (5, 6)
    assert tokenizer.vocab_size == 300


async def test_long_texts_leave_the_event_loop() -> None:
    pretrained = Pretrained()
    tokenizer = Tokenizer(pretrained)
    await tokenizer.encode(Prompt(text="short"))
    assert pretrained.threads == {threading.get_ident()}
    tokens = await tokenizer.encode(Prompt(text="x" * (INLINE_CHARS + 1)))
    assert len(tokens) == INLINE_CHARS + 2
    assert len(pretrained.threads) == 2
    tokenizer.close()


@pytest.mark.parametrize(
    "chat",
    [
        (ChatMessage("user", ""),) * (INLINE_CHARS // 16),
        (ChatMessage("x" * INLINE_CHARS, ""),),
    ],
    ids=["many empty messages", "a long role"],
)
async def test_chats_that_take_long_leave_the_event_loop(chat: tuple[ChatMessage, ...]) -> None:
    pretrained = Pretrained()
    tokenizer = Tokenizer(pretrained)
    await tokenizer.encode(Prompt(chat=chat))
    assert threading.get_ident() not in pretrained.threads
    tokenizer.close()


async def test_a_template_that_refuses() -> None:
    tokenizer = Tokenizer(Pretrained())
    with pytest.raises(InvalidRequest, match=r"chat.messages.*roles must be"):
        await tokenizer.encode(Prompt(chat=(ChatMessage("robot", "hi"),)))


async def test_no_template() -> None:
    pretrained = Pretrained()
    pretrained.chat_template = None
    with pytest.raises(InvalidRequest, match="no chat template"):
        await Tokenizer(pretrained).encode(Prompt(chat=(ChatMessage("user", "hi"),)))


@pytest.mark.slow
def test_a_model_without_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models\.tiny\.path.*directory"):
        Tokenizer.load(ModelConfig(name="tiny", path=str(tmp_path)))
