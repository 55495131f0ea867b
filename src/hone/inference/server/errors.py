"""Errors in the shape of the OpenAI API."""

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException


class ApiError(Exception):
    """An answer other than success; `param` names the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, kind, param, code)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def json_response(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status_code=status, media_type="application/json")


def install(app: FastAPI) -> None:
    """Have `app` answer every error in this shape."""

    @app.exception_handler(ApiError)
    async def typed(_: Request, error: ApiError) -> Response:
        return json_response(error.body, error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        message, param = complaint(error.errors())
        return json_response(error_body(message, "invalid_request_error", param), 400)

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> Response:
        return json_response(error_body(str(error.detail), "invalid_request_error"), error.status_code)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return json_response(error_body(f"internal error: {type(error).__name__}", "server_error"), 500)


def complaint(details: Sequence[Any]) -> tuple[str, str | None]:
    """What is wrong with a body, first mistake first, and the field it is in."""
    # Of a union's branches, the one that got furthest into the value knows best what was meant.
    detail = max(details, key=lambda one: (len(one["loc"]), one["type"] != "string_type"))
    if detail["type"] == "json_invalid":
        return f"the body is not JSON: {detail.get('ctx', {}).get('error', detail['msg'])}", None
    path = [str(part) for part in detail["loc"] if part != "body"]
    param = ".".join(part for part in path if not part[:1].isupper() and "[" not in part) or None
    if detail["type"] == "extra_forbidden":
        return f"unknown field {param!r}", param
    message = detail["msg"].removeprefix("Value error, ")
    return (f"{param}: {message}" if param else message), param
