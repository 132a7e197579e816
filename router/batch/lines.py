"""The lines of a batch: what is accepted of them, and what a result is. OpenAI's formats."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import InvalidRequest, PdserveError
from router.http.bodies import ChatBody, CompletionBody
from router.http.failures import body_of, refuse_body

ENDPOINTS: dict[str, type[CompletionBody] | type[ChatBody]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
}


class Line(BaseModel):
    """One request of a batch."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    custom_id: str = Field(min_length=1, max_length=256)
    method: str
    url: str
    body: dict[str, Any]

    def asked(self) -> CompletionBody | ChatBody:
        """The request itself. Raises InvalidRequest, naming the field."""
        try:
            # As JSON, as over HTTP: the bodies are read strictly.
            return ENDPOINTS[self.url].model_validate_json(json.dumps(self.body))
        except ValidationError as error:
            raise refuse_body(error) from None


@dataclass(frozen=True)
class Checked:
    """A batch's lines, blank ones left out, and the results of those that cannot be served."""

    lines: list[str]
    errors: list[tuple[int, str]]


def split(content: bytes) -> list[str]:
    """Lines of a file. What is not UTF-8 is escaped, which no JSON is: such a line is refused."""
    lines = content.decode(errors="backslashreplace").split("\n")
    return [line for line in (line.strip() for line in lines) if line]


def check(lines: Sequence[str], endpoint: str) -> Checked:
    """Looks at every line; takes about 10 µs for each: call it in a thread."""
    errors = []
    seen: dict[str, int] = {}
    for number, raw in enumerate(lines):
        custom_id = ""
        try:
            line = read(raw)
            custom_id = line.custom_id
            if line.method != "POST":
                raise InvalidRequest("method", "must be POST")
            if line.url != endpoint:
                raise InvalidRequest("url", f"must be the batch's endpoint, {endpoint}")
            if line.body.get("stream"):
                raise InvalidRequest("body.stream", "a batch does not stream")
            first = seen.setdefault(custom_id, number)
            if first != number:
                raise InvalidRequest("custom_id", f"is that of line {first + 1} as well")
        except PdserveError as error:
            errors.append((number, failure(number, custom_id, error)))
    return Checked(list(lines), errors)


def read(raw: str) -> Line:
    """Raises InvalidRequest for what is no line of a batch."""
    try:
        return Line.model_validate_json(raw)
    except ValidationError as error:
        refused = refuse_body(error)
        message = refused.message.replace("the body is not JSON", "the line is not JSON")
        raise InvalidRequest("", message) from None


def success(custom_id: str, request_id: str, body: dict[str, Any]) -> str:
    """The result of a line that was served."""
    return _result(custom_id, {"status_code": 200, "request_id": request_id, "body": body})


def failure(number: int, custom_id: str, error: Exception) -> str:
    """The result of a line that was not; `number` counts from 0."""
    status, body = body_of(error)
    body["error"]["line"] = number + 1
    response = {"status_code": status, "request_id": "", "body": body}
    return _result(custom_id, response, body["error"])


def _result(custom_id: str, response: dict[str, Any], error: dict[str, Any] | None = None) -> str:
    result = {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(result, separators=(",", ":"))
