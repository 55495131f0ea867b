import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for policies.py: tests are no package

from policies import Policy

from hone.text.tokenizer import Tokenizer
from hone.text.training import train_tokenizer

CORPUS = ["You are a helpful agent. Add the numbers, call the tool, and say what the result is. yes no done 0123456789"]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CORPUS * 3, 420, chat_template="qwen3")


@pytest.fixture
def policy(tokenizer):
    """Makes a policy of what its engine answers to a prompt."""
    return lambda script: Policy(tokenizer, script)
