"""What an author reads out of an answer: fields, boxed results, numbers, code, tool calls, letters.

All are pure functions of the text, take time in proportion to its length whatever a policy writes, and give None (or
nothing) where there is nothing to read; none raises.
"""

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from hone.schema.messages import ToolCall

Which = Literal["first", "last"]
"""Which of several is meant. A policy corrects itself, so the last is the default."""


def without_reasoning(text: str, opening: str = "<think>", closing: str = "</think>") -> str:
    """What was said after the reasoning: the text after the last closing tag, without what is opened and not closed.

    An answer that ends within its reasoning says nothing. The opening tag may be missing, where the prompt has it.
    """
    return text.rpartition(closing)[2].partition(opening)[0].strip()


def reasoning(text: str, opening: str = "<think>", closing: str = "</think>") -> str | None:
    """What was thought, from the first opening tag (or the beginning) to the last closing one; None without tags."""
    thought, end, _ = text.rpartition(closing)
    _, begin, rest = (thought if end else text).partition(opening)
    if not (begin or end):
        return None
    return (rest if begin else thought).strip()


def xml_field(text: str, name: str, which: Which = "last") -> str | None:
    """What stands between `<name>` and `</name>`. The innermost pair counts where tags are repeated or nested."""
    opening, closing = f"<{name}>", f"</{name}>"
    if which == "last":
        before, end, _ = text.rpartition(closing)
        _, begin, content = before.rpartition(opening)
    else:
        start = text.find(opening)
        before, end, _ = text[start:].partition(closing) if start >= 0 else ("", "", "")
        _, begin, content = before.rpartition(opening)
    return content.strip() if begin and end else None


def xml_fields(text: str, *names: str) -> dict[str, str]:
    """The last field of each of these names, where there is one."""
    found = ((name, xml_field(text, name)) for name in names)
    return {name: content for name, content in found if content is not None}


_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def boxed(text: str, which: Which = "last") -> str | None:
    """The content of LaTeX's `\\boxed{...}` (or `\\fbox`), with the braces in it; a box that is not closed is none.

    Of boxes within boxes the outer one is the last.
    """
    found: str | None = None
    starts: list[int | None] = []  # of every open brace: where its box began, None if it is none
    for piece in _BRACES.finditer(text):
        if piece[0] == "}":
            start = starts.pop() if starts else None
            if start is not None:
                found = text[start : piece.start()].strip()
                if which == "first":
                    return found
        elif piece[0].endswith("{") and piece[0] != "\\{":
            starts.append(None if piece[0] == "{" else piece.end())
    return found


_ANSWER = re.compile(r"\banswer\s?(?:is\b\s?:?|:)[\s*]{0,6}(?!\s)([^\n]+)", re.IGNORECASE)
_WRAPPING = " \t\r*`$\"'\u201c\u201d"


def final_answer(text: str) -> str | None:
    """What an answer in prose comes to: what is boxed, or follows the last "the answer is", or else the last line.

    Quotation marks, emphasis and the final full stop are taken off.
    """
    box = boxed(text)
    if box is not None:
        return box
    stated = [found[1] for found in _ANSWER.finditer(text)]
    lines = [line for line in text.split("\n") if line.strip()]
    last = next(iter(stated[-1:] or lines[-1:]), "")
    return last.strip(_WRAPPING).removesuffix(".").strip(_WRAPPING) or None


_ROW = re.compile(r"[\s|\[(]*\d(?:[\s,|]{0,3}\d)*[\s|\]),]*")


def grid(text: str) -> list[list[int]] | None:
    """The last grid of digits, as the puzzles of ARC have it: a JSON list of lists, or lines of digits; None if ragged."""
    value = json_value(text)
    rows = value if isinstance(value, list) and value and all(isinstance(row, list) for row in value) else None
    if rows is None:
        rows = _last_rows(text)
    is_grid = bool(rows) and len({len(row) for row in rows}) == 1 and all(_is_digit(c) for row in rows for c in row)
    return rows if is_grid else None


def _last_rows(text: str) -> list[list[int]]:
    rows: list[list[int]] = []
    for line in reversed(text.split("\n")):
        if _ROW.fullmatch(line):
            rows.append([int(digit) for digit in re.findall(r"\d", line)])
        elif rows:
            break
    return rows[::-1]


def _is_digit(cell: object) -> bool:
    return isinstance(cell, int) and not isinstance(cell, bool) and 0 <= cell <= 9


MAX_DIGITS = 300
"""A longer row of digits is no number that anybody means, and costs much to read."""

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"""
    (?P<sign>[-+\u2212]?) [$€£]? (?P<second_sign>[-+\u2212]?)
    (?: (?P<whole>\d{{1,3}}) (?: [ ](?=\d+\s?/\s?\d) | [ ]?(?=\\[dt]?frac\{{\d) ) )?
    (?:
        \\[dt]?frac \{{ (?P<above>[-+]?\d+) \}} \{{ (?P<below>[-+]?\d+) \}}
      | (?P<value>{_DIGITS}) (?P<power>[eE][-+]?\d{{1,2}}(?![\d.]))? (?:\s?/\s?(?P<divisor>{_DIGITS}))?
    )
    """,
    re.VERBOSE,
)
_JOINS = re.compile(r"[\w)\]}]")
"""A hyphen after one of these is a dash or a minus between two numbers, not a sign."""
_UNIT = re.compile(r"\\?%|[\s.]*|\s?[^\W\d_]+(?:[ /][^\W\d_]+){0,3}\.?")


def number(text: str) -> Fraction | None:
    """The number that the whole text is, exactly; a unit, a currency or a percent sign may be with it: 50% is 50."""
    plain = _without_spacing(text).strip().strip("$").strip()
    found = list(_numbers(plain))
    if len(found) != 1 or not plain.startswith(found[0].text):
        return None
    return found[0].value if _UNIT.fullmatch(plain[len(found[0].text) :]) else None


def final_number(text: str) -> Fraction | None:
    """The last number in a text, exactly: `1,234.50`, `-3/4`, `2 1/2`, `\\frac{3}{4}`, `1.5e3`; units are passed over.

    A range or a date (`3-5`) ends with its last number, whose dash is no sign.
    """
    last = None
    for found in _numbers(_without_spacing(text)):
        last = found.value
    return last


@dataclass(frozen=True, slots=True)
class _Found:
    text: str
    value: Fraction


def _without_spacing(text: str) -> str:
    """Without LaTeX's ways to space the thousands: `1{,}234` and `1,\\!234`."""
    return text.replace("{,}", ",").replace("\\!", "")


def _numbers(text: str) -> Iterator[_Found]:
    for found in _NUMBER.finditer(text):
        value = _value(found)
        if value is not None:
            is_dash = found.start() > 0 and _JOINS.match(text[found.start() - 1]) is not None
            sign = found["second_sign"] or ("" if is_dash else found["sign"])
            yield _Found(found[0], -value if sign in ("-", "\u2212") else value)


def _value(found: re.Match[str]) -> Fraction | None:
    if len(found[0]) > MAX_DIGITS:
        return None
    if found["above"] is not None:
        above, below = Fraction(found["above"]), Fraction(found["below"])
    else:
        above = Fraction(found["value"].replace(",", "") + (found["power"] or ""))
        below = Fraction((found["divisor"] or "1").replace(",", ""))
    if not below:
        return None
    is_mixed = found["whole"] is not None and 0 < above < below
    return above / below + (int(found["whole"]) if is_mixed else 0)


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """A fenced block; the language as written after the fence, in lower case, empty where there is none."""

    language: str
    code: str


_FENCE = re.compile(r"(`{3,}|~{3,})\s*([^\s`]*)")
_LANGUAGES = {
    "py": "python",
    "python3": "python",
    "sh": "bash",
    "shell": "bash",
    "js": "javascript",
    "ts": "typescript",
}


def code_blocks(text: str) -> list[CodeBlock]:
    """All fenced blocks that are closed; one that was cut off is no answer."""
    blocks: list[CodeBlock] = []
    fence, indent, language, lines = "", 0, "", list[str]()
    for line in text.split("\n"):
        stripped = line.strip()
        if not fence:
            opened = _FENCE.match(stripped)
            if opened is not None and opened[1][0] not in stripped[opened.end() :]:
                fence, language, lines = opened[1], opened[2].lower(), []
                indent = len(line) - len(line.lstrip())
        elif len(stripped) >= len(fence) and not stripped.strip(fence[0]):
            blocks.append(CodeBlock(_LANGUAGES.get(language, language), "\n".join(lines)))
            fence = ""
        else:
            lines.append(line[min(indent, len(line) - len(line.lstrip())) :])
    return blocks


def code_block(text: str, language: str | None = None, which: Which = "last") -> str | None:
    """One fenced block of this language, or if there is none, one without a language; any block if language is None."""
    blocks = code_blocks(text)
    if language is not None:
        wanted = _LANGUAGES.get(language.lower(), language.lower())
        blocks = [b for b in blocks if b.language == wanted] or [b for b in blocks if not b.language]
    return None if not blocks else blocks[0 if which == "first" else -1].code


def json_value(text: str) -> dict[str, Any] | list[Any] | None:
    """The last JSON object or array in a text: all of it, a fenced block, or somewhere in the prose."""
    for span in reversed(_bracketed(text)):
        value = _read_json(span)
        if isinstance(value, dict | list):
            return value
    return None


_STRUCTURE = re.compile(r'\\.|["\[\]{}\n]')


def _bracketed(text: str) -> list[str]:
    """The outermost pieces between brackets that match; brackets within strings do not count."""
    spans: list[tuple[int, int]] = []
    opened: list[tuple[str, int]] = []
    in_string = False
    for found in _STRUCTURE.finditer(text):
        piece = found[0]
        if in_string:
            in_string = piece not in ('"', "\n")
        elif piece == '"':
            in_string = bool(opened)
        elif piece in "[{":
            opened.append(("]" if piece == "[" else "}", found.start()))
        elif opened and opened[-1][0] == piece:
            _, begin = opened.pop()
            while spans and spans[-1][0] > begin:
                spans.pop()
            spans.append((begin, found.end()))
        elif piece in "]}":
            opened.clear()
    return [text[begin:end] for begin, end in spans]


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def tool_calls(text: str, opening: str = "<tool_call>", closing: str = "</tool_call>") -> list[ToolCall]:
    """The tool calls written as JSON objects with a name and arguments, each between the tags; others are passed over.

    For models whose server leaves the calls in the text. Their ids are call_0, call_1 and on.
    """
    calls: list[ToolCall] = []
    for piece in text.split(opening)[1:]:
        content, end, _ = piece.partition(closing)
        call = _read_json(content) if end else None
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            arguments = call.get("arguments", {})
            written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            calls.append(ToolCall(f"call_{len(calls)}", call["name"], written))
    return calls


def choice_letter(text: str, letters: str = "ABCD") -> str | None:
    """The letter of a multiple choice that an answer settles on; None where it does not say.

    In this order: a boxed letter, the last "the answer is (B)", a last line and a first line that begin with a letter
    set off as one ("B", "(b)", "**B.** Paris"). A letter within a sentence is none: `A cat` is no choice of A.
    """
    if not letters.isalpha() or not letters.isupper():
        raise ValueError(f"letters {letters!r} are not upper-case letters; write them as ABCD")
    box = boxed(text)
    if box is not None and (found := _lone_letter(box.removeprefix("\\text{").removeprefix("\\textbf{"), letters)):
        return found
    stated = list(_statement(letters).finditer(text))
    if stated:
        return stated[-1][1].upper()
    lines = [line for line in text.split("\n") if line.strip()]
    return next((found for line in (lines[-1:] + lines[:1]) if (found := _lone_letter(line, letters))), None)


@functools.cache
def _statement(letters: str) -> re.Pattern[str]:
    gap = r"[\s:*_$\"'\u201c]{0,6}"
    verb = rf"(?:(?i:is|was|would\ be|must\ be|should\ be){gap})?"
    noun = rf"(?:(?i:option|choice|letter){gap})?"
    letter = rf"(?:\\boxed\{{|\\text\{{|[(\[]){{0,2}}([{letters}](?![\w'])|(?<=\()[{letters.lower()}](?=\)))"
    return re.compile(rf"\b(?i:answer|choice|option){gap}{verb}{noun}{letter}")


@functools.cache
def _lone(letters: str) -> re.Pattern[str]:
    both = letters + letters.lower()
    return re.compile(
        rf"[\s(\[*_$]{{0,6}}(?:([{letters}])(?:[)\].:*_]|\s*$)|([{both}])[\s)\].:*_$}}]{{0,6}}$)",
    )


def _lone_letter(line: str, letters: str) -> str | None:
    found = _lone(letters).match(line)
    return None if found is None else (found[1] or found[2]).upper()
