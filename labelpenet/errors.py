"""The one exception that a user is meant to read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class InputError(ValueError):
    """What the user gave cannot be used: one line that names the file and the remedy.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class DamagedError(InputError):
    """A file that this package wrote is not as it was written; who can, makes it again."""


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """One of many that cannot be used costs itself alone: the block's `InputError` becomes one of the problems."""
    try:
        yield
    except InputError as error:
        problems.append(str(error))


@contextmanager
def told(said: str | Callable[[Any], str], *kinds: type[Exception]) -> Iterator[None]:
    """An error of these kinds becomes an `InputError` with what is ``said`` of it; what is one already stays as it is,
    but where ``kinds`` name it.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, InputError) and InputError not in kinds:
            raise
        raise InputError(said if isinstance(said, str) else said(error)) from error


def reason(error: BaseException) -> str:
    """What an exception says, on one line of at most 200 characters; its kind where it says nothing."""
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(said.split())[:200] or type(error).__name__


def one_line(text: str) -> str:
    """The text with line breaks, terminal codes and other unprintable characters written as escapes.

    Names that stand in a user's files reach messages; a file must not be able to draw on the user's terminal.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
