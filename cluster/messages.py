"""What is wrong with a config, as one line for the terminal."""

from pydantic import ValidationError


def wrong_fields(error: ValidationError) -> str:
    """Each field that a config has wrong, its value and what would do, in one line."""
    return "; ".join(_wrong_field(**line) for line in error.errors())


def _wrong_field(*, type: str, loc: tuple[str | int, ...], msg: str, input: object, **_: object) -> str:
    key = ".".join(str(part) for part in loc)
    if type == "missing":
        # A table without its one required key is dropped whole.
        key = "data.train" if key == "data" else key
        return f"{key} is missing; give it in the config or as --{key.replace('_', '-')}"
    message = msg.removeprefix("Value error, ")
    return message if isinstance(input, dict) else f"{key}={input}: {message}"
