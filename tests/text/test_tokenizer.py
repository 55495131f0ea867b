"""Encoding, decoding, streaming, loading and saving."""

import json

import pytest
import tokenizers as library
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from hone.text.tokenizer import BYTE_OF_CHARACTER, IncrementalDecoder, Tokenizer
from hone.text.training import train_tokenizer

CHATML = train_tokenizer(["some words, and 12 numbers; naïve 猫 🐈‍⬛"] * 3, 300, chat_template="chatml")


def stream(tokenizer, token_ids, skip_special=False):
    decoder = IncrementalDecoder(tokenizer, skip_special=skip_special)
    return [*(decoder.feed([token_id]) for token_id in token_ids), decoder.finish()]


def sentence_piece_like():
    backend = library.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(special_tokens=["<unk>"], vocab_size=600, show_progress=False)
    backend.train_from_iterator(["the cat sat on the mat"] * 5, trainer)
    backend.add_tokens(byte_tokens)
    return Tokenizer(backend)


@given(st.text())
def test_any_text_survives_encoding_and_decoding(text):
    assert CHATML.decode(CHATML.encode(text)) == text
    assert CHATML.decode(CHATML.encode(text, allow_special=True)) == text


def test_control_tokens_in_a_text_count_only_where_allowed():
    end = CHATML.token_id("<|im_end|>")
    assert CHATML.encode("<|im_end|>", allow_special=True) == [end]
    assert end not in CHATML.encode("<|im_end|>")
    assert CHATML.decode(CHATML.encode("<|im_end|>")) == "<|im_end|>"


def test_control_tokens_can_be_left_out_of_the_text_and_markup_stays():
    token_ids = CHATML.encode("<think>a</think>b<|im_end|>", allow_special=True)
    assert CHATML.decode(token_ids, skip_special=True) == "<think>a</think>b"


@given(st.lists(st.integers(0, CHATML.vocab_size + 3)), st.booleans())
def test_streamed_text_adds_up_to_the_whole_for_any_tokens(token_ids, skip_special):
    assert "".join(stream(CHATML, token_ids, skip_special)) == CHATML.decode(token_ids, skip_special)


@given(st.text(min_size=1))
def test_no_streamed_part_ends_inside_a_character(text):
    singles = train_tokenizer([], None)
    assert stream(singles, singles.encode(text)) == [
        part for character in text for part in [*[""] * (len(character.encode()) - 1), character]
    ] + [""]


def test_a_stream_that_ends_inside_a_character_says_so():
    assert stream(CHATML, CHATML.encode("猫")[:1])[-1] == "\ufffd"


@given(st.text(alphabet="thecasmo n猫é🐈"))
def test_other_decoders_stream_too(text):
    tokenizer = SENTENCE_PIECE
    token_ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, token_ids)) == tokenizer.decode(token_ids)


SENTENCE_PIECE = sentence_piece_like()


def test_the_bytes_of_tokens_are_those_of_the_text():
    text = "naïve 猫 🐈‍⬛"
    assert b"".join(map(CHATML.token_bytes, CHATML.encode(text))) == text.encode()
    assert CHATML.token_bytes(CHATML.vocab_size) == b""


def test_the_byte_alphabet_is_that_of_the_library():
    assert sorted(BYTE_OF_CHARACTER) == sorted(pre_tokenizers.ByteLevel.alphabet())


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(ValueError, match="lone surrogate"):
        CHATML.encode("a\ud800")


def test_tokens_have_names_and_unknown_ones_are_refused():
    assert CHATML.token(CHATML.token_id("<think>")) == "<think>"
    with pytest.raises(ValueError, match="no token '<nope>'"):
        CHATML.token_id("<nope>")
    with pytest.raises(ValueError, match="no token with id 9999"):
        CHATML.token(9999)


def test_a_saved_tokenizer_loads_as_it_was(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_token_ids == tokenizer.eos_token_ids
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.named_tokens == tokenizer.named_tokens
    assert loaded.special_tokens == tokenizer.special_tokens
    assert loaded.vocab_size == tokenizer.vocab_size
    text = "<|user|>Reverse <think> 猫 5 + 8\n\n"
    assert loaded.encode(text, allow_special=True) == tokenizer.encode(text, allow_special=True)


def test_saving_again_writes_the_same_files(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "first")
    Tokenizer.load(tmp_path / "first").save(tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes(), path.name


def test_transformers_loads_a_saved_tokenizer_with_the_same_ids(tokenizer, tmp_path, conversations):
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for conversation in conversations:
        for message in conversation.messages:
            text = message.content + "<|user|><|im_end|><|eot_id|><think>"
            assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text, allow_special=True)
    assert theirs.chat_template == tokenizer.chat_template
    assert theirs.eos_token_id == tokenizer.eos_token_ids[0]
    assert len(theirs) == tokenizer.vocab_size


def test_saving_keeps_the_rest_of_the_generation_settings(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.8, "eos_token_id": 7}')
    CHATML.save(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved == {"top_p": 0.8, "eos_token_id": list(CHATML.eos_token_ids)}


def test_eos_ids_come_from_every_file_that_names_them(tmp_path):
    CHATML.backend.save(str(tmp_path / "tokenizer.json"))
    end, text_end = CHATML.token_id("<|im_end|>"), CHATML.token_id("<|endoftext|>")
    assert Tokenizer.load(tmp_path).eos_token_ids == ()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": text_end}))
    assert Tokenizer.load(tmp_path).eos_token_ids == (text_end,)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert Tokenizer.load(tmp_path).eos_token_ids == (end, text_end)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, end]}))
    assert Tokenizer.load(tmp_path).eos_token_ids == (end, 3)


def test_the_template_may_stand_in_the_configuration(tmp_path):
    CHATML.backend.save(str(tmp_path / "tokenizer.json"))
    configuration = tmp_path / "tokenizer_config.json"
    configuration.write_text('{"chat_template": "inline"}')
    assert Tokenizer.load(tmp_path).chat_template == "inline"
    named = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": "usual"}]
    configuration.write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.load(tmp_path).chat_template == "usual"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(tmp_path).chat_template == "file"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "BPE"}}', "\x00\x01"])
def test_a_broken_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer that can be read"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("generation_config.json", "[1]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 3}', "must be text"),
    ],
)
def test_broken_files_beside_it_are_refused(tmp_path, name, content, complaint):
    CHATML.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=complaint):
        Tokenizer.load(tmp_path)
