"""Tokenizers of each family, small and trained once, and the conversations of the golden files."""

from pathlib import Path

import msgspec
import pytest

from hone.schema.messages import Message, ToolSpec
from hone.text.template import FAMILIES
from hone.text.tokenizer import Tokenizer
from hone.text.training import train_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "text"


class Conversation(msgspec.Struct, forbid_unknown_fields=True):
    """One entry of conversations.json."""

    name: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    variables: dict[str, bool] = {}
    add_generation_prompt: bool = False


def read_conversations() -> list[Conversation]:
    return msgspec.json.decode((GOLDEN / "conversations.json").read_bytes(), type=list[Conversation])


CORPUS = [message.content for conversation in read_conversations() for message in conversation.messages] * 4


@pytest.fixture(scope="session")
def conversations() -> list[Conversation]:
    return read_conversations()


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Tokenizer]:
    return {name: train_tokenizer(CORPUS, 400, chat_template=name) for name in FAMILIES}


@pytest.fixture(scope="session", params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers[request.param]
