"""The one error a user is meant to read. Raised anywhere, printed by the command line without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: the message names what was given, what was expected and what to do next."""
