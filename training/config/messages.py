"""One-line messages for config errors."""

from pydantic import ValidationError

# Flags whose names differ from their keys'.
_FLAGS = {"train.data.train": "data"}


def one_line(error: Exception) -> str:
    """The error's message; pydantic's many lines become one."""
    return wrong_fields(error) if isinstance(error, ValidationError) else str(error)


def wrong_fields(error: ValidationError) -> str:
    """Each wrong field of a config, with its value and the way out, in one line."""
    return "; ".join(_wrong_field(**line) for line in error.errors())


def _wrong_field(*, type: str, loc: tuple[str | int, ...], msg: str, input: object, **_: object) -> str:
    key = ".".join(str(part) for part in loc)
    if type == "missing":
        # Without its only required key, pydantic reports the whole table as missing.
        return missing("data.train" if key == "data" else key)
    # pydantic's own messages for these name classes and patterns.
    if type == "dataclass_type":
        return f"{key}={input} must be a table: write [{key}], and its keys below"
    if type == "unexpected_keyword_argument":
        return f"there is no key {key}; check the spelling, or leave it out"
    if type == "string_pattern_mismatch":
        return f"{key}={input} is not a valid name; use lowercase letters, digits and hyphens, as in my-run-1"
    message = msg.removeprefix("Value error, ")
    # Where fields conflict, the input is all of them, and the message names those that do.
    one = input is None or isinstance(input, bool | int | float | str | list | tuple)
    return f"{key}={input}: {message}" if key and one else message


def missing(key: str) -> str:
    """The message for a missing key that has no default."""
    flag = _FLAGS.get(key, key.replace("_", "-"))
    return f"{key} is missing; give it in the config or as --{flag}"
