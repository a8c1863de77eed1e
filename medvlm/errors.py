"""Every error that medvlm raises on purpose, as one tree.

    MedVLMError
    ├── InputError          a file given by the user is missing, malformed or empty
    ├── RecipeError         a recipe does not exist or does not validate
    ├── StoreError          an object store cannot be reached or refuses
    ├── EndpointError       a chat endpoint is not configured, cannot be reached or refuses
    ├── WorkspaceError      the workspace is read-only, full, locked, or lacks a step's output
    ├── ContractBroken      a dataset does not hold its contract
    ├── CheckpointError     a checkpoint is absent, incomplete, or does not fit the model
    ├── TrainingError       a training job cannot go on
    │   ├── NonFiniteLoss   the loss became NaN or infinite
    │   └── OutOfMemory     a setting has to shrink
    ├── ImageTokenMismatch  text and images of a batch do not belong together
    ├── PredictionMismatch  predictions and benchmark items do not join one to one
    └── ReleaseRefused      a release may not be promoted, or the registry would not take it

A bad *record* is never an exception: it is a row with a status and a reason. These are for a
broken *run*. Each says what happened with the value, where, and what to do next.
"""

__all__ = [
    "CheckpointError",
    "ContractBroken",
    "EndpointError",
    "ImageTokenMismatch",
    "InputError",
    "MedVLMError",
    "NonFiniteLoss",
    "OutOfMemory",
    "PredictionMismatch",
    "RecipeError",
    "ReleaseRefused",
    "StoreError",
    "TrainingError",
    "WorkspaceError",
]


class MedVLMError(Exception):
    """What happened, where, and the next step.

    Args:
        what: One sentence with the offending value in it. Never a secret.
        where: The file, row, field, URL or setting concerned.
        hint: What to run or change next.
    """

    def __init__(self, what: str, *, where: str, hint: str) -> None:
        super().__init__(what, where, hint)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}\n  next:  {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive Exception's own pickling, and errors cross processes.
        return (_rebuild, (type(self), self.what, self.where, self.hint))


def _rebuild(kind: type[MedVLMError], what: str, where: str, hint: str) -> MedVLMError:
    return kind(what, where=where, hint=hint)


class InputError(MedVLMError):
    """A file given by the user is missing, malformed or empty."""


class RecipeError(MedVLMError):
    """A recipe does not exist or does not validate."""


class StoreError(MedVLMError):
    """An object store cannot be reached or refuses."""


class EndpointError(MedVLMError):
    """A chat endpoint is not configured, cannot be reached, or refuses."""


class WorkspaceError(MedVLMError):
    """The workspace is read-only, full, locked, or lacks a step's output."""


class ContractBroken(MedVLMError):
    """A dataset does not hold its contract."""


class CheckpointError(MedVLMError):
    """A checkpoint is absent, incomplete, or does not fit the model."""


class TrainingError(MedVLMError):
    """A training job cannot go on."""


class NonFiniteLoss(TrainingError):
    """The loss became NaN or infinite."""


class OutOfMemory(TrainingError):
    """A setting has to shrink before the job fits."""


class ImageTokenMismatch(MedVLMError):
    """Text and images of a batch do not belong together."""


class PredictionMismatch(MedVLMError):
    """Predictions and benchmark items do not join one to one."""


class ReleaseRefused(MedVLMError):
    """A release may not be promoted, or the registry would not take it."""
