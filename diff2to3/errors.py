"""The errors that this package raises on purpose.

Diff2to3Error
├── InputError              also a ValueError; commands print its message as one line and exit with code 2
├── MissingDependencyError  also an ImportError
└── those of training, workers and kernels, beside the code that raises them
"""


class Diff2to3Error(Exception):
    """The base of every error that this package raises on purpose."""


class InputError(Diff2to3Error, ValueError):
    """Something the user gave cannot be used. The message says what, which input, and what to do."""


class MissingDependencyError(Diff2to3Error, ImportError):
    """An optional package is needed and not installed. The message is the one line that adds it."""

    def __init__(self, package: str, extra: str | None = None, hint: str | None = None) -> None:
        fix = hint or f'pip install "diff2to3[{extra}]"'
        super().__init__(f"{package} is not installed; add it with: {fix}")
