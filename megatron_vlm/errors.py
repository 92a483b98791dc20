"""Exceptions for users: each reports what is wrong, where it is, and what to do about it."""

from __future__ import annotations

LONGEST_DESCRIPTION = 500


class UserError(Exception):
    """A mistake that the user can correct; entry points print it as one line and exit with `EXIT_USER_ERROR`.

    Args:
        what: what is wrong, with the offending values; cut where these are long.
        where: file and line, configuration key, or rank; left out when `what` already contains it.
        fix: what to do about it.

    Attributes:
        problems: several mistakes that one error reports, each with its own parts; they are printed on lines of their
            own.
    """

    problems: tuple[UserError, ...] = ()

    def __init__(self, what: str, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what, where, fix)
        what = what if len(what) <= LONGEST_DESCRIPTION else f"{what[:LONGEST_DESCRIPTION]}..."
        self.is_reported_here: bool | None = None
        """Whether this rank is the first of those that have the same error, None if that is not known."""
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        if self.problems:
            return "\n".join([f"{self.what}:", *(f"  ({n}) {problem}" for n, problem in enumerate(self.problems, 1))])
        text = self.what
        if self.where:
            text += f" [{self.where}]"
        if self.fix:
            text += f" -- {self.fix}"
        # Names of files and texts of rows may hold halves of characters, which a terminal or a file refuses.
        return " ".join(text.split()).encode(errors="backslashreplace").decode()


class ConfigError(UserError):
    """The configuration is incomplete, contradictory, or asks for a layout that does not fit."""


class DataError(UserError):
    """A data file, row, image or conversation cannot be used."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, of another model, or would be overwritten."""


class SaveError(CheckpointError):
    """A checkpoint of a run could not be written; what was saved before is intact, and a later one may succeed."""


class LaunchError(UserError):
    """The processes were not started as the configuration needs them."""


class DivergenceError(UserError):
    """A step's loss or gradients are not finite, or a spike, and the run is configured to stop for that."""


EXIT_USER_ERROR = 2


def combine(error_type: type[UserError], problems: list[UserError]) -> UserError:
    """Build one error of `error_type` that lists all `problems`; a single problem keeps its own parts."""
    single = [each for problem in problems for each in problem.problems or (problem,)]
    if len(single) == 1:
        return error_type(single[0].what, single[0].where, single[0].fix)
    combined = error_type(f"{len(single)} problems")
    combined.problems = tuple(single)
    return combined
