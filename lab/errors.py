"""What goes wrong by a user's hand: told without a traceback, with the exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend; the message says what arrived, what is allowed, and how."""

    exit_code = 2


def plain(text: str) -> str:
    """Text whose control characters are shown, not obeyed; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
