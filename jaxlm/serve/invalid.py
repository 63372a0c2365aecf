"""Why a body is refused: what, got, expected, what to do; never the words of the parser."""

import json
from collections.abc import Sequence
from typing import Any

from jaxlm.decode.pool import TOPS
from jaxlm.serve.schema import MAX_N, MAX_STOPS, MAX_STRING

JSON = "send a JSON object, with the header Content-Type: application/json"
FLAG, COUNT = "true or false", "a whole number of at least 1"
TEXTS = (f"a text of 1 to {MAX_STRING} characters that is valid Unicode, or a list of up to "
         f"{MAX_STOPS} of them")
TURN = '{"role": ..., "content": ...}'
NOT_OFFERED = "is not offered"
EXPECTED = {
    "model": "a text, the name that /v1/models gives", "max_tokens": COUNT,
    "max_completion_tokens": COUNT, "temperature": "a number from 0 to 100",
    "top_p": "a number above 0, up to 1", "top_k": "a whole number from -1; -1 and 0 cut nothing",
    "min_p": "a number from 0 to 1", "n": f"a whole number from 1 to {MAX_N}",
    "seed": "a whole number of 64 bits", "stop": TEXTS, "step": TEXTS,
    "include_stop_str_in_output": FLAG, "stream": FLAG,
    "stream_options": 'an object such as {"include_usage": true}', "include_usage": FLAG,
    "method": "a text, plain or the name of a search", "budget": COUNT,
    "max_steps": "a whole number from 1 to 1024", "user": "a text",
    "frequency_penalty": f"0, for a penalty {NOT_OFFERED}",
    "presence_penalty": f"0, for a penalty {NOT_OFFERED}",
    "repetition_penalty": f"1, for a penalty {NOT_OFFERED}",
    "logit_bias": f"an empty object, for a bias {NOT_OFFERED}",
    "response_format": f'{{"type": "text"}}, for another form {NOT_OFFERED}',
    "store": "false, for nothing is stored", "best_of": COUNT,
    "prompt": f"a text, a list of token ids, or a list of 1 to {MAX_N} of either",
    "logprobs": f"a whole number from 0 to {TOPS}", "echo": f"false, for the echo {NOT_OFFERED}",
    "suffix": f"null, for a suffix {NOT_OFFERED}", "extra_body": "an object",
    "messages": f"a list of at least one {TURN}", "role": "system, developer, user or assistant",
    "content": 'a text, or a list of at least one {"type": "text", "text": ...}; images and sounds '
               "are not offered",
    "name": "null, for templates take no names", "top_logprobs": f"a whole number from 0 to {TOPS}",
    "add_generation_prompt": FLAG, "continue_final_message": FLAG,
    "tools": "an empty list, for tool calls are not offered",
    "tool_choice": '"none", for tool calls are not offered',
}


def reason(errors: Sequence[Any], body: Any, chat: bool = False) -> tuple[str, str | None]:
    """A message about the first thing that is wrong, and the field's path.

    Args: errors: pydantic's. body: as it was parsed. chat: of `/v1/chat/completions`.

    >>> reason([{"type": "int_type", "loc": ("body", "n"), "input": "x"}], {"n": "x"})
    ('n is "x"; expected a whole number from 1 to 1024; change it or leave it out', 'n')
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']}; {JSON}", None
    path = field(first)
    own = next((e for e in errors if e["type"] == "value_error" and field(e) == path), None)
    place = ".".join(map(str, path)) or None
    if own is not None:
        text = own["msg"].removeprefix("Value error, ")
        return f"{place}: {text}" if place else text, place
    if place is None:
        return f"the body is {shown(first['input'])}; {JSON}", None
    if first["type"] == "extra_forbidden":
        return f"there is no field {place}, which is {shown(first['input'])}; leave it out", place
    name = next((part for part in reversed(path) if isinstance(part, str)), "")
    wanted = FLAG if chat and name == "logprobs" else EXPECTED[name]
    if path and isinstance(path[-1], int):
        wanted = {"messages": TURN}.get(name, wanted)
    if first["type"] == "missing":
        return f"{place} is missing; expected {wanted}; give it", place
    given = at(body, path, first["input"])
    must = name in ("model", "prompt", "messages", "role", "content")
    return (f"{place} is {shown(given)}; expected {wanted}; change it"
            + ("" if must else " or leave it out")), place


def field(error: Any) -> tuple[str | int, ...]:
    """The path to a field, without the parser's own names of the forms that it may have."""
    parts = [part for part in error["loc"] if part != "body"]
    if error["type"] == "extra_forbidden":
        return tuple(parts) if all(p in EXPECTED or isinstance(p, int) for p in parts[:-1]) else (
            field({**error, "type": ""}))
    ends = (i for i, part in enumerate(parts) if isinstance(part, str) and part not in EXPECTED)
    return tuple(parts[: next(ends, len(parts))])


def at(body: Any, path: Sequence[str | int], other: Any) -> Any:
    """The value at a path, or `other` where there is none."""
    try:
        for part in path:
            body = body[part]
        return body
    except (KeyError, IndexError, TypeError):
        return other


def shown(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, default=lambda x: x.decode(errors="replace") if isinstance(x, bytes)
                      else type(x).__name__)
    return text if len(text) <= 60 else f"{text[:57]}..."
