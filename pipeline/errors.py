"""The exceptions a user can meet. Every message says what happened, where, why, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


class PipelineError(Exception):
    """Base of all errors meant for the user; the command line prints it without a traceback.

    Args:
        what: one sentence, what could not be done.
        where: the file, folder, key or name concerned.
        why: the cause, as far as it is known.
        remedy: what the user can do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, why: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.why, self.remedy = what, where, why, remedy
        super().__init__(what)

    def __str__(self) -> str:
        details = (("where", self.where), ("why", self.why), ("remedy", self.remedy))
        lines = [f"  {name}: {value}" for name, value in details if value is not None]
        return "\n".join([self.what, *lines]).replace(": \n", ":\n")

    def as_dict(self) -> dict[str, object]:
        """The error as the ``error`` object of ``--json``."""
        fields = {"what": self.what, "where": self.where, "why": self.why, "remedy": self.remedy}
        known = {name: str(value) for name, value in fields.items() if value is not None}
        return {"type": type(self).__name__, **known}


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the params: the dotted ``key``, the ``rule`` it breaks, what was ``got``.

    ``origin`` is the option that gave it (``-s``), where it was not the file.
    """

    key: str
    rule: str
    got: str
    hint: str | None = None
    origin: str | None = None

    def __str__(self) -> str:
        hint = f" {self.hint}" if self.hint else ""
        origin = f"{self.origin} " if self.origin else ""
        return f"{origin}{self.key}: {self.rule}; got {self.got}.{hint}"


class ParamsError(PipelineError):
    """params.yaml or a ``-s`` option is wrong; carries every problem at once."""

    exit_code = 2

    def __init__(self, where: object, problems: list[Problem], *, remedy: str | None = None) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            f"The params have {count}.",
            where=where,
            why="\n    " + "\n    ".join(str(problem) for problem in problems),
            remedy=remedy or "correct the keys named above",
        )

    def as_dict(self) -> dict[str, object]:
        return {**super().as_dict(), "problems": [vars(problem) for problem in self.problems]}


class UsageError(PipelineError):
    """The command line asks for something that does not exist or does not fit together."""

    exit_code = 2


class DataError(PipelineError):
    """The image folder cannot be used as it is."""


class BadImagesError(DataError):
    """Images were unreadable and ``data.on_bad_image`` is ``raise``."""


class BackboneError(PipelineError):
    """A backbone name, layer or pooling that does not exist or does not fit."""


class WeightsError(BackboneError):
    """Weights that cannot be found, downloaded, read or matched to the architecture."""


class CacheError(PipelineError):
    """The feature cache cannot be read or written."""


class MissingFeaturesError(CacheError):
    """Samples without a cached feature; they are named, never replaced."""


class NotFiniteError(CacheError):
    """Features that hold NaN or infinity; they are in no cache."""


class DriftError(CacheError):
    """The decoder now yields other pixels than those the cached features were computed from."""


class VerifyError(CacheError):
    """The feature cache was verified and is not as it should be; carries the ``report``."""

    def __init__(self, what: str, *, where: object, why: str, remedy: str, report: dict[str, object]) -> None:
        self.report = report
        super().__init__(what, where=where, why=why, remedy=remedy)

    def as_dict(self) -> dict[str, object]:
        return {**super().as_dict(), "report": self.report}


class DeviceError(PipelineError):
    """A device or precision that this machine does not have."""


class HeadError(PipelineError):
    """A head that does not exist, cannot be configured or cannot be fitted to these features."""


class RunError(PipelineError):
    """A run folder that is missing, damaged or made by something else."""


class FinetuneError(PipelineError):
    """Fine-tuning cannot start or go on."""


class ExportError(PipelineError):
    """A run that cannot become one file, or a file that does not give what its run gave."""


class Interrupted(PipelineError):
    """The user pressed Ctrl-C; finished work is kept."""

    exit_code = 130
