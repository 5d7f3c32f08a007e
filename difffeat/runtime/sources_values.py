"""Values as spreadsheets, data frames and arrays spell them: nothing, numbers, truth, lists in text. One spelling means one thing in every format."""

from __future__ import annotations

import ast
import json
import math
import re
from decimal import Decimal
from typing import Any

from difffeat.errors import SampleError

NULLS = frozenset(
    [
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "NaT",
        "None",
        "n/a",
        "nan",
        "null",
    ]
)
"""Texts that pandas reads as nothing, and `NaT`, which it writes."""
TRUTH = {"true": True, "false": False}
_WHOLE = re.compile(r"([+-]?\d+)\.0+")
_SCALAR = re.compile(r"(?:np|numpy)\.\w+\(([^()]*)\)")
_ARRAY = re.compile(r"(?:np\.|numpy\.)?array\((.*?)(?:,\s*dtype=[^()]*)?\)", re.DOTALL)
_TOKEN = re.compile(
    r"""\s*(?:(?P<quoted>b?'(?:[^'\\]|\\.)*'|b?"(?:[^"\\]|\\.)*")|(?P<bare>[^,'"\s][^,'"]*?))\s*(?P<end>,|$|(?=\s)|(?=['"]))""", re.DOTALL
)
_MAPPING = re.compile(r"""\{\s*['"][^'"]*['"]\s*:""")
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def is_null(value: Any) -> bool:
    """Whether a cell holds nothing: no value, not a number, blank, or a text by which data frames write that."""
    if isinstance(value, str):
        text = value.strip()
        return not text or text in NULLS
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def is_blank(value: Any) -> bool:
    """The same without the texts that may be somebody's id or caption."""
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and math.isnan(value))


def whole(value: Any) -> Any:
    """Numbers without a fraction, as numbers or as text (`3.0`), as whole ones; truth in text as `True` and `False`; all else as it is."""
    if isinstance(value, str):
        text = value.strip()
        if (match := _WHOLE.fullmatch(text)) is not None:
            return match[1].removeprefix("+")
        return str(TRUTH[text.lower()]) if text.lower() in TRUTH and text in (text.lower(), text.upper(), text.title()) else text
    if isinstance(value, bool):
        return value
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return int(value)
    return value


def bit(value: Any) -> int | None:
    """1 and 0 of any type and spelling; −1 for −1 and for nothing; None for all else."""
    if is_null(value):
        return -1
    value = whole(value)
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str):
        return {"1": 1, "0": 0, "-1": -1, "True": 1, "False": 0}.get(value)
    return value if isinstance(value, int) and value in (0, 1, -1) else None


def text_list(text: str, *, strict: bool = False) -> list[Any] | None:
    """The list that a text spells: as JSON, Python (list, tuple, set), NumPy (`[3 0 7]`, `['a' 'b']`), or without quotes (`[cat, dog]`); None where
    it is no list. `strict`: only lists of quoted texts.

    Raises SampleError for a list that was cut short where it was printed, and for a mapping.
    """
    text = text.strip()
    if text[-1:] not in ("]", ")", "}"):
        return None
    if text.startswith("frozenset(") and text.endswith(")"):
        text = text.removeprefix("frozenset(")[:-1].strip() or "set()"
    if text == "set()":
        return None if strict else []
    if text.startswith("[") and text.endswith("]"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            pass
        else:
            return found if not strict or all(isinstance(part, str) for part in found) else None
    text = _SCALAR.sub(r"\1", text)
    if (match := _ARRAY.fullmatch(text)) is not None:
        text = match[1].strip()
    if len(text) < 2 or _CLOSING.get(text[0]) != text[-1]:
        return None
    if _MAPPING.match(text):
        if strict:
            return None
        raise SampleError(f"a mapping stands where a list should: {text[:80]}. Save a list.")
    tokens = _tokens(text[1:-1])
    if tokens is None or (not tokens and text[0] == "{"):
        return None
    quoted = [is_quoted for is_quoted, _ in tokens]
    if any(not is_quoted and value == "..." for is_quoted, value in tokens):
        raise SampleError(f"its list was cut short where it was printed: {text[:80]}. Save the list itself, or print it whole.")
    if (text[0] != "[" and not any(quoted) and not all(_NUMBER.fullmatch(value) for _, value in tokens)) or (strict and not (tokens and all(quoted))):
        return None
    return [value if is_quoted else _literal(value) for is_quoted, value in tokens]


def _tokens(inside: str) -> list[tuple[bool, str]] | None:
    """(whether it was quoted, text) of each part; None where the quotes do not close."""
    tokens: list[tuple[bool, str]] = []
    commas, at = False, 0
    while inside[at:].strip():
        match = _TOKEN.match(inside, at)
        if match is None:
            return None
        if match["quoted"] is not None:
            tokens.append((True, _unquoted(match["quoted"])))
        else:
            tokens.append((False, match["bare"].strip()))
        commas, at = commas or match["end"] == ",", match.end()
    bare = [value for is_quoted, value in tokens if not is_quoted]
    if bare and not all(map(_is_literal, bare)) and "..." not in bare:
        if any(is_quoted for is_quoted, _ in tokens):
            return None
        return [(False, part) for piece in inside.split(",") if (part := piece.strip())]  # names without quotes, which may hold spaces
    return tokens


def _unquoted(quoted: str) -> str:
    try:
        value = ast.literal_eval(quoted)
    except (ValueError, SyntaxError):  # a line break or a zero byte within
        return quoted[1:-1]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _is_literal(text: str) -> bool:
    return text in NULLS or text.lower() in TRUTH or _NUMBER.fullmatch(text) is not None


def _literal(text: str) -> Any:
    if text in NULLS:
        return None
    if text.lower() in TRUTH:
        return TRUTH[text.lower()]
    if _NUMBER.fullmatch(text):
        return int(text) if re.fullmatch(r"[+-]?\d{1,19}", text) else whole(float(text))
    return text
