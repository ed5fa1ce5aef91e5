"""JSON that may come from anybody: whatever is wrong with it is a ValueError.

The parser of the standard library raises three kinds of exceptions for text that is no JSON, among them a RecursionError
for brackets within brackets; who reads a file has one way of saying what is wrong with it.
"""

import json
from typing import Any


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: when it is none, is nested too deeply, or has numbers of too many digits.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
