"""Answers that shall be JSON of a given shape. Needs the extra `schema`."""

import json
from collections.abc import Mapping
from typing import Any

from hone.envs.isolation import Place
from hone.envs.parsers import json_value
from hone.envs.verifiers.budget import is_confirmed

MAX_CHARACTERS = 1_000_000
"""A longer answer does not fit, without a look."""
CPU_SECONDS = 5.0

IS_VALID = Place("hone.envs.verifiers.json_schema", "is_valid")


async def fits_schema(
    answer: str, schema: Mapping[str, Any], *, is_strict: bool = False, cpu_seconds: float = CPU_SECONDS
) -> bool:
    """Whether the JSON in an answer fits a JSON schema (draft 2020-12, unless `$schema` names another).

    is_strict: the whole answer must be JSON; otherwise it is what `json_value` finds in it.

    An answer that keeps the validation busy for longer than `cpu_seconds` does not fit. A schema that is none is a
    failure of class environment.
    """
    text = answer if is_strict else _json_in(answer)
    if text is None or len(text) > MAX_CHARACTERS:
        return False
    arguments = {"text": text, "schema": dict(schema)}
    return await is_confirmed(IS_VALID, arguments, arguments | {"text": "null"}, cpu_seconds)


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    """The same in this process, for as long as it takes; text that is no JSON does not fit."""
    try:
        import jsonschema  # of an extra that few environments need
    except ImportError as error:
        raise ImportError("the verifier of JSON needs the package jsonschema: pip install 'hone[schema]'") from error
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    validator.check_schema(schema)
    try:
        value = json.loads(text, parse_constant=_refuse)
        return bool(validator(schema).is_valid(value))
    except (ValueError, RecursionError, MemoryError):
        return False


def _json_in(answer: str) -> str | None:
    value = json_value(answer)
    return None if value is None else json.dumps(value)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")
