"""Errors of a config in one line."""

from pydantic import ValidationError

# Flags that are not named as their keys are.
_FLAGS = {"train.data.train": "data"}


def one_line(error: Exception) -> str:
    """The message of an error; of a config's, which pydantic spreads over lines, the fault alone."""
    return wrong_fields(error) if isinstance(error, ValidationError) else str(error)


def wrong_fields(error: ValidationError) -> str:
    """Each field that a config has wrong, its value and what would do, in one line."""
    return "; ".join(_wrong_field(**line) for line in error.errors())


def _wrong_field(*, type: str, loc: tuple[str | int, ...], msg: str, input: object, **_: object) -> str:
    key = ".".join(str(part) for part in loc)
    if type == "missing":
        # A table without its one required key is dropped whole.
        return missing("data.train" if key == "data" else key)
    # Of these pydantic's own messages name classes and patterns.
    if type == "dataclass_type":
        return f"{key}={input} must be a table: write [{key}], and its keys below"
    if type == "unexpected_keyword_argument":
        return f"there is no key {key}; mend its name, or leave it out"
    if type == "string_pattern_mismatch":
        return f"{key}={input} is no name; take small letters, digits and hyphens, as in my-run-1"
    message = msg.removeprefix("Value error, ")
    # Where several fields do not go together the input is all of them, and the message names those it means.
    one = input is None or isinstance(input, bool | int | float | str | list | tuple)
    return f"{key}={input}: {message}" if key and one else message


def missing(key: str) -> str:
    """What is said of a key that has no default."""
    flag = _FLAGS.get(key, key.replace("_", "-"))
    return f"{key} is missing; give it in the config or as --{flag}"
