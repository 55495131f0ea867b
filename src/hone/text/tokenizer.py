"""The tokenizer of a model: text to token ids and back, in one go or token by token."""

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
REPLACEMENT = "\ufffd"
MAX_PENDING_TOKENS = 8  # more than any character has bytes: what is still undecodable then is not text


class Tokenizer:
    """A `tokenizers` tokenizer with what a chat model's folder says about it.

    eos_token_ids: the tokens that end a completion, the usual one first. chat_template: Jinja2 source, if any.
    settings: the content of tokenizer_config.json without the template; kept for `save`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.backend = backend
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.chat_template = chat_template
        self.settings = dict(settings or {})
        added = backend.get_added_tokens_decoder()
        self.added_tokens = {token.content: token_id for token_id, token in added.items()}
        self.special_tokens = {token.content: token_id for token_id, token in added.items() if token.special}
        self.vocab_size = max([backend.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added)])
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._special_ids = frozenset(self.special_tokens.values())
        self._bytes_of: dict[int, bytes] = {}
        self._literal: tokenizers.Tokenizer | None = None

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.json and, where they exist, the configuration, template and generation files beside it."""
        folder = Path(folder)
        backend = read_backend(folder / "tokenizer.json")
        settings = read_json(folder / "tokenizer_config.json")
        names = {**read_json(folder / "special_tokens_map.json"), **settings}
        template = read_template(folder, settings.pop("chat_template", None))
        settings |= {key: token_text(names[key]) for key in NAMED_TOKENS if names.get(key)}
        eos = read_eos_token_ids(folder)
        usual = backend.token_to_id(settings.get("eos_token", ""))
        if usual is not None:
            eos = [usual, *eos]
        return cls(backend, eos_token_ids=eos, chat_template=template, settings=settings)

    def save(self, folder: str | Path) -> None:
        """Writes the files that `load` and transformers' AutoTokenizer read; keeps a generation_config.json's rest."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_json(folder / "tokenizer_config.json", defaults | self.settings)
        write_json(folder / "special_tokens_map.json", self.named_tokens)
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        if self.eos_token_ids:
            path = folder / "generation_config.json"
            write_json(path, read_json(path) | {"eos_token_id": list(self.eos_token_ids)})

    @property
    def named_tokens(self) -> dict[str, str]:
        """The tokens with a role, as templates know them: `eos_token` and the like; only those that are set."""
        return {key: self.settings[key] for key in NAMED_TOKENS if self.settings.get(key)}

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of `text`. Control tokens spelled out in it count as such only where allowed."""
        backend = self.backend if allow_special else self._literal_backend()
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # what the library says of text that has no UTF-8 form
            raise ValueError(f"the text is not valid Unicode, it holds a lone surrogate: {text[:80]!r}") from error

    def decode(self, token_ids: Sequence[int], skip_special: bool = False) -> str:
        return self.backend.decode(token_ids, skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int:
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise ValueError(f"the tokenizer has no token {token!r}")
        return token_id

    def token(self, token_id: int) -> str:
        token = self.backend.id_to_token(token_id)
        if token is None:
            raise ValueError(f"the tokenizer has no token with id {token_id}; it has {self.vocab_size}")
        return token

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token of a byte-level vocabulary stands for; none for an id outside the vocabulary."""
        found = self._bytes_of.get(token_id)
        if found is None:
            token = self.backend.id_to_token(token_id) or ""
            found = self._bytes_of[token_id] = bytes_of_token(token)
        return found

    def _literal_backend(self) -> tokenizers.Tokenizer:
        if not self.special_tokens:
            return self.backend
        if self._literal is None:
            self._literal = tokenizers.Tokenizer.from_str(self.backend.to_str())
            self._literal.encode_special_tokens = True
        return self._literal


class IncrementalDecoder:
    """Decodes a stream of tokens: the parts add up to `decode` of the whole, and no part ends inside a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._window: list[int] = []
        self._num_shown = 0  # tokens at the start of the window whose text was given out

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that became certain with these tokens; costs the same however long the stream is."""
        kept = [i for i in token_ids if not (self._skip_special and self._tokenizer.is_special(i))]
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"".join(map(self._tokenizer.token_bytes, kept)))
        return "".join(map(self._feed_window, kept))

    def finish(self) -> str:
        """The rest; a character cut in half comes out as U+FFFD."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"", final=True)
        return self._show_window()

    def _feed_window(self, token_id: int) -> str:
        self._window.append(token_id)
        pending = len(self._window) - self._num_shown
        is_cut = self._tokenizer.decode(self._window).endswith(REPLACEMENT)
        return "" if is_cut and pending < MAX_PENDING_TOKENS else self._show_window()

    def _show_window(self) -> str:
        # Decoders that join words look one token back, so the tokens shown last stay as the context of the next.
        shown = self._tokenizer.decode(self._window[: self._num_shown])
        text = self._tokenizer.decode(self._window)
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return text[len(shown) :]


def read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a model's folder needs its tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every kind of broken file
        raise ValueError(f"{path} is not a tokenizer that can be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or nothing where the file does not exist."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_template(folder: Path, configured: Any) -> str | None:
    """chat_template.jinja, else the template in tokenizer_config.json: text, or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if isinstance(configured, list):
        configured = {entry["name"]: entry["template"] for entry in configured}.get("default")
    if configured is not None and not isinstance(configured, str):
        raise ValueError(f"chat_template in {folder / 'tokenizer_config.json'} must be text")
    return configured


def read_eos_token_ids(folder: Path) -> list[int]:
    """What ends a completion, from generation_config.json or else config.json: one id or a list."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(folder / name).get("eos_token_id")
        if found is not None:
            return list(found) if isinstance(found, list) else [found]
    return []


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest first; nothing where there are none."""
    alternatives = sorted(map(re.escape, tokens), key=len, reverse=True)
    return re.compile("|".join(alternatives) or "(?!)")


def token_text(token: Any) -> str:
    """The text of a token in a configuration file: plain, or an object with its flags."""
    return token["content"] if isinstance(token, dict) else str(token)


def bytes_of_token(token: str) -> bytes:
    # A token with any character outside the byte alphabet (an added one) stands for its own UTF-8 text.
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


def byte_alphabet() -> dict[str, int]:
    """The character by which byte-level vocabularies spell each byte: itself if printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = byte_alphabet()
