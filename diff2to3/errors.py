"""The one error type that commands turn into a single line and exit code 2."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what, which input, and what to do."""


class MissingDependencyError(ImportError):
    """An optional package is needed and not installed. The message is the one line that adds it."""

    def __init__(self, package: str, extra: str | None = None, hint: str | None = None) -> None:
        fix = hint or f'pip install "diff2to3[{extra}]"'
        super().__init__(f"{package} is not installed; add it with: {fix}")
