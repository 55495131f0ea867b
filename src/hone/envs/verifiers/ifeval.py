"""The 25 verifiable instructions of IFEval, and whether a response follows them, strictly or loosely.

The definitions are those of the paper (Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models") and
of the public data set, whose ids and arguments are accepted as they are. Where the two leave a choice, what is counted is
what a reader would count; so a response that is empty, or whose language cannot be told, follows nothing.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

import msgspec

if TYPE_CHECKING:
    from langdetect.detector_factory import DetectorFactory

Relation = Literal["at least", "less than"]
Count = Annotated[int, msgspec.Meta(ge=0)]
Text = Annotated[str, msgspec.Meta(min_length=1)]
Words = Annotated[list[Text], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a prompt: the id and the arguments of the data set; `ValueError` when they do not fit.

    Arguments that are None are left out, because a table has a column for every argument of any instruction.
    """

    id: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    _check: "Check" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        kind = CHECKS.get(self.id)
        if kind is None:
            raise ValueError(f"unknown instruction {self.id!r}; there are {', '.join(sorted(CHECKS))}")
        given = {name: value for name, value in self.arguments.items() if value is not None}
        try:
            check = msgspec.convert(given, type=kind)
        except msgspec.ValidationError as error:
            raise ValueError(f"instruction {self.id!r}: {error}") from error
        object.__setattr__(self, "_check", check)

    def is_followed(self, response: str) -> bool:
        """Whether the response, as it is, follows the instruction."""
        return bool(response.strip()) and self._check.holds(response)


def instructions_of(info: Mapping[str, Any]) -> list[Instruction]:
    """The instructions in a row of the data set: its `instruction_id_list` and `kwargs`."""
    pairs = zip(info["instruction_id_list"], info["kwargs"], strict=True)
    return [Instruction(name, arguments) for name, arguments in pairs]


def followed(response: str, instructions: Sequence[Instruction], *, is_loose: bool = False) -> list[bool]:
    """For each instruction whether it is followed; loosely, if any variant of the response does.

    The variants leave out the first line, the last line or both ("Sure, here it is:"), and asterisks, or not.
    """
    variants = _variants(response) if is_loose else [response]
    return [any(instruction.is_followed(variant) for variant in variants) for instruction in instructions]


def follows_all(answer: str, info: Mapping[str, Any], *, is_loose: bool = False) -> bool:
    """Whether all instructions in the task's info are followed: the prompt-level accuracy of the benchmark."""
    return all(followed(answer, instructions_of(info), is_loose=is_loose))


def share_followed(answer: str, info: Mapping[str, Any], *, is_loose: bool = False) -> float:
    """Which share of the instructions in the task's info is followed."""
    verdicts = followed(answer, instructions_of(info), is_loose=is_loose)
    return sum(verdicts) / len(verdicts)


def _variants(response: str) -> list[str]:
    lines = response.split("\n")
    cuts = [lines, lines[1:], lines[:-1], lines[1:-1]]
    texts = ["\n".join(cut).strip() for cut in cuts]
    texts[0] = response
    return [variant for text in texts for variant in (text, text.replace("*", ""))]


class Check(Protocol):
    """Arguments of an instruction, and what they ask of a response that is not empty."""

    def holds(self, text: str) -> bool: ...


class _Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The names of the fields are those of the data set."""


def _is_within(found: int, relation: Relation, wanted: int) -> bool:
    return found >= wanted if relation == "at least" else found < wanted


# Keywords.


class KeywordExistence(_Arguments, frozen=True):
    """All keywords appear, in any case."""

    keywords: Words

    def holds(self, text: str) -> bool:
        return all(keyword.casefold() in text.casefold() for keyword in self.keywords)


class KeywordFrequency(_Arguments, frozen=True):
    """The keyword appears so often, in any case."""

    keyword: Text
    frequency: Count
    relation: Relation

    def holds(self, text: str) -> bool:
        return _is_within(text.casefold().count(self.keyword.strip().casefold()), self.relation, self.frequency)


class ForbiddenWords(_Arguments, frozen=True):
    """None of the words appears as a word of its own, in any case."""

    forbidden_words: Words

    def holds(self, text: str) -> bool:
        return not any(_word(word).search(text) for word in self.forbidden_words)


class LetterFrequency(_Arguments, frozen=True):
    """The letter (or sign) appears so often, in either case."""

    letter: Annotated[str, msgspec.Meta(min_length=1, max_length=1)]
    let_frequency: Count
    let_relation: Relation

    def holds(self, text: str) -> bool:
        return _is_within(text.lower().count(self.letter.lower()), self.let_relation, self.let_frequency)


@functools.lru_cache(maxsize=1024)
def _word(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)


# Language.


class ResponseLanguage(_Arguments, frozen=True):
    """The response is in the language of this code: en, de, zh-cn, ..."""

    language: Text

    def holds(self, text: str) -> bool:
        return _language_is(text, self.language)


def _language_is(text: str, code: str) -> bool:
    factory = _languages()
    if code not in factory.get_lang_list():
        raise ValueError(f"language {code!r} is unknown; there are {', '.join(sorted(factory.get_lang_list()))}")
    from langdetect.lang_detect_exception import LangDetectException  # of the extra, as in `_languages`

    detector = factory.create()
    detector.append(text)
    try:
        return bool(detector.detect() == code)
    except LangDetectException:  # digits and signs have no language
        return False


@functools.cache
def _languages() -> "DetectorFactory":
    try:
        from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory  # of an extra, and slow to load
    except ImportError as error:
        raise ImportError(
            "instructions on languages need the package langdetect: pip install 'hone[ifeval]'"
        ) from error
    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.set_seed(0)  # it draws at random, and would tell the language of a short text differently each time
    return factory


# Length.


class NumberOfSentences(_Arguments, frozen=True):
    """So many sentences."""

    num_sentences: Count
    relation: Relation

    def holds(self, text: str) -> bool:
        return _is_within(count_sentences(text), self.relation, self.num_sentences)


class NumberOfParagraphs(_Arguments, frozen=True):
    """Exactly so many paragraphs, separated by `***`."""

    num_paragraphs: Count

    def holds(self, text: str) -> bool:
        paragraphs = [paragraph.strip() for paragraph in text.split("***")]
        between = paragraphs[1:-1]
        return all(between) and sum(map(bool, paragraphs)) == self.num_paragraphs


class NumberOfWords(_Arguments, frozen=True):
    """So many words."""

    num_words: Count
    relation: Relation

    def holds(self, text: str) -> bool:
        return _is_within(len(_WORD.findall(text)), self.relation, self.num_words)


class FirstWordOfParagraph(_Arguments, frozen=True):
    """Exactly so many paragraphs, separated by empty lines, of which the nth begins with this word."""

    num_paragraphs: Count
    nth_paragraph: Annotated[int, msgspec.Meta(ge=1)]
    first_word: Text

    def holds(self, text: str) -> bool:
        paragraphs = [paragraph.strip() for paragraph in _EMPTY_LINE.split(text) if paragraph.strip()]
        if len(paragraphs) != self.num_paragraphs or self.nth_paragraph > len(paragraphs):
            return False
        first = paragraphs[self.nth_paragraph - 1].split()[0].strip("*_#\"'\u201c\u201d\u2018\u2019.,:;?!()")
        return first.casefold() == self.first_word.strip().casefold()


_WORD = re.compile(r"\w+")
_EMPTY_LINE = re.compile(r"\n[^\S\n]*\n")
_FULL_WIDTH_END = re.compile(r"([\u3002\uff01\uff1f\u0964])")
_CLOSING = "\"')]*_\u201d\u2019\u00bb"
_INITIALS = re.compile(r"(?:[^\W\d_]\.)+")
_LIST_MARK = re.compile(r"\s*(?:[-*\u2022]|\(?\d{1,3}[.)])\s")
_TITLES = ("mr", "mrs", "ms", "dr", "prof", "sr", "jr", "st", "inc", "ltd", "co", "corp", "dept")
_MONTHS = ("jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec")
_ABBREVIATIONS = frozenset([*_TITLES, *_MONTHS, "vs", "etc", "vol", "fig"])


def count_sentences(text: str) -> int:
    """How many sentences there are: what ends with . ! or ? before a new beginning, and a rest without an end.

    Abbreviations, initials, decimal points and the numbers of list items end no sentence.
    """
    words = list(_words_in_order(_FULL_WIDTH_END.sub(r"\1 ", text)))
    count, is_open = 0, False
    for word, following in itertools.pairwise([*words, ""]):
        is_open = is_open or any(map(str.isalnum, word))
        if is_open and _ends_sentence(word, following):
            count, is_open = count + 1, False
    return count + is_open


def _words_in_order(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        mark = _LIST_MARK.match(line)
        yield from (line if mark is None else line[mark.end() :]).split()


def _ends_sentence(word: str, following: str) -> bool:
    bare = word.rstrip(_CLOSING)
    if not bare.endswith((".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f", "\u0964")):
        return False
    if not following:
        return True
    beginning = following.lstrip("\"'([*_\u201c\u2018\u00ab")
    if beginning[:1].islower():
        return False
    opened = bare.lstrip("\"'([*_\u201c\u2018\u00ab")
    is_abbreviation = opened.endswith(".") and (
        opened[:-1].lower() in _ABBREVIATIONS or bool(_INITIALS.fullmatch(opened))
    )
    return not is_abbreviation


# Content and format.


class NumberOfPlaceholders(_Arguments, frozen=True):
    """At least so many placeholders in square brackets, such as [address]."""

    num_placeholders: Count

    def holds(self, text: str) -> bool:
        return len(_PLACEHOLDER.findall(text)) >= self.num_placeholders


class Postscript(_Arguments, frozen=True):
    """There is a postscript that begins with the marker, with or without the spaces and dots of P.S. and P.P.S."""

    postscript_marker: Text

    def holds(self, text: str) -> bool:
        letters = [re.escape(letter) for letter in self.postscript_marker.strip().rstrip(".") if letter not in ". "]
        return re.search(rf"(?<!\w){r'[. ]{0,2}'.join(letters)}(?!\w)", text, re.IGNORECASE) is not None


class NumberOfBullets(_Arguments, frozen=True):
    """Exactly so many bullet points: lines that begin with * or -."""

    num_bullets: Count

    def holds(self, text: str) -> bool:
        return sum(_BULLET.match(line) is not None for line in text.split("\n")) == self.num_bullets


class ConstrainedResponse(_Arguments, frozen=True):
    """One of the three answers is given: "My answer is yes.", "My answer is no." or "My answer is maybe."."""

    answers: ClassVar[tuple[str, ...]] = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

    def holds(self, text: str) -> bool:
        return any(answer in text for answer in self.answers)


class NumberOfHighlights(_Arguments, frozen=True):
    """At least so many sections highlighted by asterisks, *so* or **so**."""

    num_highlights: Count

    def holds(self, text: str) -> bool:
        rest, num_bold = _BOLD.subn(" ", text)
        return num_bold + len(_HIGHLIGHT.findall(rest)) >= self.num_highlights


class MultipleSections(_Arguments, frozen=True):
    """At least so many sections, each begun by the word and a number, as Section 1."""

    section_spliter: Text
    num_sections: Count

    def holds(self, text: str) -> bool:
        mark = re.compile(rf"(?<!\w){re.escape(self.section_spliter.strip())}\s?\d+")
        return len(mark.findall(text)) >= self.num_sections


class JsonFormat(_Arguments, frozen=True):
    """The whole response is JSON, in a fence of three backticks or not."""

    def holds(self, text: str) -> bool:
        fenced = _JSON_FENCE.fullmatch(text.strip())
        try:
            json.loads(text if fenced is None else fenced[1])
        except (ValueError, RecursionError):
            return False
        return True


class Title(_Arguments, frozen=True):
    """There is a title in double angular brackets, <<so>>."""

    def holds(self, text: str) -> bool:
        return any(title.strip() for title in _TITLE.findall(text))


_PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]")
_BULLET = re.compile(r"\s*(?:\*(?!\*)|-(?!-))\s*\S")
_BOLD = re.compile(r"\*\*(?!\s)[^\n*]+(?<!\s)\*\*")
_HIGHLIGHT = re.compile(r"\*(?!\s)[^\n*]+(?<!\s)\*")
_JSON_FENCE = re.compile(r"```(?:json)?\s(.*)```", re.DOTALL | re.IGNORECASE)
_TITLE = re.compile(r"<<([^\n<>]+)>>")


# Combinations, beginning and end, case, punctuation.


class TwoResponses(_Arguments, frozen=True):
    """Exactly two different responses, separated by six asterisks."""

    def holds(self, text: str) -> bool:
        first, *others = [response.strip() for response in text.strip().strip("*").split("******")]
        return len(others) == 1 and bool(first and others[0]) and first != others[0]


class RepeatPrompt(_Arguments, frozen=True):
    """The response begins with the prompt, word for word."""

    prompt_to_repeat: Text

    def holds(self, text: str) -> bool:
        return text.strip().casefold().startswith(self.prompt_to_repeat.strip().casefold())


class EndPhrase(_Arguments, frozen=True):
    """The response ends with the phrase, and no other words follow it."""

    end_phrase: Text

    def holds(self, text: str) -> bool:
        return text.strip().strip('"').strip().casefold().endswith(self.end_phrase.strip().strip('"').casefold())


class Quotation(_Arguments, frozen=True):
    """The whole response is in double quotation marks."""

    def holds(self, text: str) -> bool:
        whole = text.strip()
        return len(whole) > 2 and whole[0] == whole[-1] == '"'


class CapitalWordFrequency(_Arguments, frozen=True):
    """So many words are written in capital letters."""

    capital_frequency: Count
    capital_relation: Relation

    def holds(self, text: str) -> bool:
        capitals = sum(word.isupper() for word in _HYPHENATED.findall(text))
        return _is_within(capitals, self.capital_relation, self.capital_frequency)


class EnglishCapital(_Arguments, frozen=True):
    """English, in capital letters only."""

    def holds(self, text: str) -> bool:
        return text.isupper() and _language_is(text.lower(), "en")


class EnglishLowercase(_Arguments, frozen=True):
    """English, in small letters only."""

    def holds(self, text: str) -> bool:
        return text.islower() and _language_is(text, "en")


class NoComma(_Arguments, frozen=True):
    """There is no comma."""

    def holds(self, text: str) -> bool:
        return "," not in text


_HYPHENATED = re.compile(r"\w+(?:['\u2019-]\w+)*")

CHECKS: dict[str, type[_Arguments]] = {
    "keywords:existence": KeywordExistence,
    "keywords:frequency": KeywordFrequency,
    "keywords:forbidden_words": ForbiddenWords,
    "keywords:letter_frequency": LetterFrequency,
    "language:response_language": ResponseLanguage,
    "length_constraints:number_sentences": NumberOfSentences,
    "length_constraints:number_paragraphs": NumberOfParagraphs,
    "length_constraints:number_words": NumberOfWords,
    "length_constraints:nth_paragraph_first_word": FirstWordOfParagraph,
    "detectable_content:number_placeholders": NumberOfPlaceholders,
    "detectable_content:postscript": Postscript,
    "detectable_format:number_bullet_lists": NumberOfBullets,
    "detectable_format:constrained_response": ConstrainedResponse,
    "detectable_format:number_highlighted_sections": NumberOfHighlights,
    "detectable_format:multiple_sections": MultipleSections,
    "detectable_format:json_format": JsonFormat,
    "detectable_format:title": Title,
    "combination:two_responses": TwoResponses,
    "combination:repeat_prompt": RepeatPrompt,
    "startend:end_checker": EndPhrase,
    "startend:quotation": Quotation,
    "change_case:capital_word_frequency": CapitalWordFrequency,
    "change_case:english_capital": EnglishCapital,
    "change_case:english_lowercase": EnglishLowercase,
    "punctuation:no_comma": NoComma,
}
"""The instructions by the ids of the data set."""
