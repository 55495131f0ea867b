"""Training a tokenizer: byte-level BPE over every byte, or over the bytes seen for vocabularies of a few dozen tokens."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hone.schema.messages import Message
from hone.text.template import FAMILIES, ChatTemplate, TemplateFamily, built_in
from hone.text.tokenizer import BYTE_OF_CHARACTER, Tokenizer, any_of

UNKNOWN = "<unk>"
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int | None,
    special_tokens: Sequence[str] = (),
    chat_template: str | None = None,
    *,
    alphabet: Literal["bytes", "seen"] = "bytes",
    eos_tokens: Sequence[str] = (),
) -> Tokenizer:
    """A tokenizer with `vocab_size` tokens in all, or fewer where the texts give no more; None: no merges at all.

    chat_template: the name of a built-in family, which brings its own tokens, or a template's source.
    special_tokens are added to those; eos_tokens end a turn in place of the family's.
    alphabet "seen" keeps only the bytes of `texts` and of the template's own words; any other byte becomes <unk>.
    """
    family = built_in(chat_template) if chat_template in FAMILIES else None
    source = family.source if family else chat_template
    control = [*(family.control_tokens if family else ()), *special_tokens]
    control = list(dict.fromkeys([*control, *(eos_tokens if not family else ())]))
    markup = list(family.markup_tokens) if family else []
    ends = eos_tokens or (family.end_tokens if family else ())
    if missing := set(ends) - set(control):
        raise ValueError(f"eos_tokens {sorted(missing)} are not special tokens of the tokenizer: {control}")
    pieces = list(without_added(chain(texts, probe_texts(source) if source else []), [*control, *markup]))
    backend = train_backend(pieces, vocab_size, alphabet, control, markup)
    added = {token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items()}
    return Tokenizer(
        backend,
        eos_token_ids=[added[token] for token in ends],
        chat_template=source,
        settings=settings_of(family, ends, alphabet),
    )


def train_backend(
    texts: Sequence[str], vocab_size: int | None, alphabet: str, control: Sequence[str], markup: Sequence[str]
) -> tokenizers.Tokenizer:
    unknown = [UNKNOWN] if alphabet == "seen" else []
    symbols = byte_symbols(texts) if alphabet == "seen" else sorted(BYTE_OF_CHARACTER)
    num_added = len(control) + len(markup)
    least = len(unknown) + len(symbols) + num_added
    if vocab_size is not None and vocab_size < least:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: {len(symbols)} bytes and {least - len(symbols)} added tokens "
            f"need {least}" + ('; alphabet = "seen" needs fewer' if alphabet == "bytes" else "")
        )
    backend = empty_backend(unknown)
    trainer = trainers.BpeTrainer(
        vocab_size=(vocab_size or least) - num_added,
        initial_alphabet=symbols,
        special_tokens=unknown,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in control])
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False) for token in markup])
    return backend


def empty_backend(unknown: Sequence[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(unk_token=unknown[0] if unknown else None))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_symbols(texts: Iterable[str]) -> list[str]:
    seen: set[int] = set()
    for text in texts:
        seen.update(text.encode())
    return sorted(CHARACTER_OF_BYTE[byte] for byte in seen)


def without_added(texts: Iterable[str], added: Sequence[str]) -> Iterator[str]:
    """The texts between added tokens: these never reach the merges, so they must not shape them."""
    pattern = any_of(added)
    return (piece for text in texts for piece in pattern.split(text) if piece)


def probe_texts(source: str) -> list[str]:
    """What a template itself writes around the messages of a plain conversation."""
    question, answer = Message(role="user", content=""), Message(role="assistant", content="")
    template = ChatTemplate(source)
    system = Message(role="system", content="")
    return [
        template.render([*first, question, answer, question], add_generation_prompt=True) for first in ([], [system])
    ]


def settings_of(family: TemplateFamily | None, ends: Sequence[str], alphabet: str) -> dict[str, Any]:
    named = {
        "bos_token": family.bos_token if family else None,
        "eos_token": ends[0] if ends else None,
        "pad_token": family.pad_token if family else None,
        "unk_token": UNKNOWN if alphabet == "seen" else None,
    }
    return {key: token for key, token in named.items() if token is not None}
