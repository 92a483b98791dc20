"""Exceptions for users: each reports what is wrong, where it is, and what to do about it."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can correct; entry points print it as one line and exit with `EXIT_USER_ERROR`.

    Args:
        what: what is wrong, with the offending values.
        where: file and line, configuration key, or rank; left out when `what` already contains it.
        fix: what to do about it.
    """

    def __init__(self, what: str, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what, where, fix)
        self.is_reported_here: bool | None = None
        """Whether this rank is the first of those that have the same error, None if that is not known."""
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        text = self.what
        if self.where:
            text += f" [{self.where}]"
        if self.fix:
            text += f" -- {self.fix}"
        return " ".join(text.split())


class ConfigError(UserError):
    """The configuration is incomplete, contradictory, or asks for a layout that does not fit."""


class DataError(UserError):
    """A data file, row, image or conversation cannot be used."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, of another model, or would be overwritten."""


class LaunchError(UserError):
    """The processes were not started as the configuration needs them."""


class DivergenceError(UserError):
    """A step's loss or gradients are not finite, or a spike, and the run is configured to stop for that."""


EXIT_USER_ERROR = 2


def combine(error_type: type[UserError], problems: list[UserError]) -> UserError:
    """Build one error of `error_type` that lists all `problems`; a single problem keeps its own parts."""
    if len(problems) == 1:
        return error_type(problems[0].what, problems[0].where, problems[0].fix)
    numbered = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems, start=1))
    return error_type(f"{len(problems)} problems: {numbered}")
