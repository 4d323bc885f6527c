"""Why a row cannot become a pair: a closed set of codes, each with what to do about it."""

from enum import StrEnum

from core.errors import InvalidInput


class RowCode(StrEnum):
    LINE_TOO_LONG = "line_too_long"
    INVALID_UTF8 = "invalid_utf8"
    INVALID_CHARACTERS = "invalid_characters"
    MALFORMED_ROW = "malformed_row"
    NOT_JSON = "not_json"
    NOT_AN_OBJECT = "not_an_object"
    TOO_DEEP = "too_deep"
    DUPLICATE_KEY = "duplicate_key"
    UNKNOWN_LAYOUT = "unknown_layout"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    EMPTY_TEXT = "empty_text"
    UNKNOWN_ROLE = "unknown_role"
    ROLE_ORDER = "role_order"
    NO_PROMPT = "no_prompt"
    LAST_TURN_DIFFERS = "last_turn_differs"
    IDENTICAL_PAIR = "identical_pair"
    UNSUPPORTED_CONTENT = "unsupported_content"
    UNKNOWN_VALUE = "unknown_value"


HINTS: dict[RowCode, str] = {
    RowCode.LINE_TOO_LONG: "shorten the texts of this row, or raise KDPO_DATA__MAX_LINE_BYTES",
    RowCode.INVALID_UTF8: "write the file as UTF-8, for example: iconv -f <encoding> -t UTF-8",
    RowCode.INVALID_CHARACTERS: (
        "remove control characters; an escaped \\f or \\b is often LaTeX (\\frac, \\beta) whose "
        "backslash was not doubled"
    ),
    RowCode.MALFORMED_ROW: (
        "write CSV with a csv library: quote cells that hold separators, quotes or line ends"
    ),
    RowCode.NOT_JSON: "write one complete JSON object on each line (JSONL)",
    RowCode.NOT_AN_OBJECT: 'each line must be a JSON object such as {"prompt": …}',
    RowCode.TOO_DEEP: "flatten the row, or raise KDPO_DATA__MAX_DEPTH",
    RowCode.DUPLICATE_KEY: "keep one of the two values; readers disagree on which one counts",
    RowCode.UNKNOWN_LAYOUT: (
        "give each row `prompt`, `chosen` and `rejected`, as texts or as lists of "
        '{"role", "content"} messages; or say with `column_mapping` which columns these are'
    ),
    RowCode.MISSING_FIELD: "add the field, drop these rows, or set on_invalid=skip",
    RowCode.WRONG_TYPE: "write the field as the type that is expected in this layout",
    RowCode.EMPTY_TEXT: "drop rows with an empty text",
    RowCode.UNKNOWN_ROLE: "use the roles system, user, assistant and tool",
    RowCode.ROLE_ORDER: (
        "turns must go [system] user, assistant, user, …; a prompt ends with user or tool, a "
        "completion begins and ends with assistant"
    ),
    RowCode.NO_PROMPT: (
        "give the prompt in its own field; it is found in `chosen` and `rejected` only when both "
        "begin with it"
    ),
    RowCode.LAST_TURN_DIFFERS: (
        "both sides must answer one conversation: they may differ only after its last user turn"
    ),
    RowCode.IDENTICAL_PAIR: "drop rows whose two sides are the same; they say nothing",
    RowCode.UNSUPPORTED_CONTENT: "write the content as text; tool calls and pictures are not read",
    RowCode.UNKNOWN_VALUE: "write one of the values that this layout knows, or drop these rows",
}


class RowFault(InvalidInput):
    """One row cannot become a pair; `pointer` is a JSON pointer inside the row."""

    default_code = "invalid_row"

    def __init__(self, row_code: RowCode, detail: str, *, pointer: str = "") -> None:
        super().__init__(detail, code=row_code.value, hint=HINTS[row_code])
        self.row_code = row_code
        self.pointer = pointer


def escape_pointer(key: str) -> str:
    """Return one reference token of a JSON pointer (RFC 6901), cut at 100 characters."""
    return key[:100].replace("~", "~0").replace("/", "~1")
