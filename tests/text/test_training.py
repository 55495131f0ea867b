"""Trained tokenizers: sizes, alphabets, and what transformers makes of them."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hone.schema.messages import Message
from hone.text.rendering import Renderer
from hone.text.template import built_in
from hone.text.training import train_tokenizer

WORDS = ["the cat sat on the mat and the hat", "reverse the word stone", "a stone at the gate"] * 5


def test_merges_fill_the_vocabulary():
    tokenizer = train_tokenizer(WORDS, 280)
    assert tokenizer.vocab_size == 280
    assert len(tokenizer.encode("the stone")) < len("the stone")


def test_the_vocabulary_may_be_just_bytes_and_special_tokens():
    tokenizer = train_tokenizer(WORDS, 258, ["<s>", "</s>"], eos_tokens=["</s>"])
    assert tokenizer.vocab_size == 258
    assert tokenizer.eos_token_ids == (tokenizer.token_id("</s>"),)
    assert len(tokenizer.encode("the stone é")) == len("the stone é".encode())
    assert train_tokenizer(WORDS, None, ["<s>", "</s>"]).vocab_size == 258


def test_training_is_repeatable():
    assert train_tokenizer(WORDS, 290).backend.to_str() == train_tokenizer(WORDS, 290).backend.to_str()


def test_texts_may_come_from_a_generator():
    assert train_tokenizer((word for word in WORDS), 280).vocab_size == 280


def test_a_seen_alphabet_makes_a_vocabulary_of_characters():
    tokenizer = train_tokenizer(["abcdefghijkl", "ba"], None, ["<s>", "</s>"], alphabet="seen")
    assert tokenizer.vocab_size == 1 + 12 + 2
    assert [tokenizer.token(i) for i in tokenizer.encode("lab")] == ["l", "a", "b"]


def test_a_seen_alphabet_covers_what_the_template_writes():
    tokenizer = train_tokenizer(["abcdefghijkl"], None, chat_template="glm4", alphabet="seen")
    family = built_in("glm4")
    added = len(family.control_tokens) + len(family.markup_tokens)
    assert tokenizer.vocab_size == 1 + 12 + 1 + added  # <unk>, the letters, the line break
    prompt = Renderer(tokenizer).prompt([Message(role="user", content="abc")])
    assert tokenizer.decode(prompt) == "[gMASK]<sop><|user|>\nabc<|assistant|>"


def test_a_seen_alphabet_marks_what_it_has_not_seen():
    tokenizer = train_tokenizer(["abc"], None, alphabet="seen")
    assert tokenizer.decode(tokenizer.encode("abz")) == "ab<unk>"


def test_a_seen_alphabet_may_have_merges():
    tokenizer = train_tokenizer(["banana banana"] * 3, 12, alphabet="seen")
    assert len(tokenizer.encode("banana")) < 6


def test_added_tokens_do_not_shape_the_vocabulary():
    plain = train_tokenizer(["ab"], None, ["<|end|>"], alphabet="seen")
    spelled = train_tokenizer(["a<|end|>b"], None, ["<|end|>"], alphabet="seen")
    assert spelled.backend.get_vocab() == plain.backend.get_vocab()


def test_a_vocabulary_too_small_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size 100 is too small: 256 bytes and 0 .* need 256; alphabet"):
        train_tokenizer(WORDS, 100)
    with pytest.raises(ValueError, match="vocab_size 5 is too small"):
        train_tokenizer(WORDS, 5, alphabet="seen")


def test_end_tokens_must_be_tokens():
    with pytest.raises(ValueError, match="not special tokens"):
        train_tokenizer(WORDS, None, chat_template="glm4", eos_tokens=["<nope>"])


def test_the_family_brings_its_tokens(tokenizer):
    family = next(
        built_in(name)
        for name in ("chatml", "qwen3", "glm4", "llama3")
        if built_in(name).source == tokenizer.chat_template
    )
    assert set(family.control_tokens) <= set(tokenizer.special_tokens)
    assert set(family.markup_tokens) <= set(tokenizer.added_tokens) - set(tokenizer.special_tokens)
    assert [tokenizer.token(i) for i in tokenizer.eos_token_ids] == list(family.end_tokens)


@pytest.mark.parametrize("alphabet", ["bytes", "seen"])
@pytest.mark.parametrize("load", [AutoTokenizer, PreTrainedTokenizerFast])
def test_transformers_loads_it_with_the_same_ids(tmp_path, alphabet, load):
    tokenizer = train_tokenizer(WORDS, None, chat_template="glm4", alphabet=alphabet)
    tokenizer.save(tmp_path)
    theirs = load.from_pretrained(tmp_path)
    for text in ["the cat", "<|user|>\nxyz é<|assistant|><think>", " a  b\n\n12345"]:
        token_ids = tokenizer.encode(text, allow_special=True)
        assert theirs.encode(text, add_special_tokens=False) == token_ids
        assert theirs.decode(token_ids) == tokenizer.decode(token_ids)
