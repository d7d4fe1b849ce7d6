"""Errors a user can act on: each carries one line of cause, one line of remedy and a process exit
code.

Exit codes: 0 done, 2 usage or config, 3 data, 4 checkpoint, 5 non-finite or diverged, 6
environment, 7 an export that does not agree with its model, 128 + n stopped by signal n.
The command line prints cause and remedy and hides the traceback unless ``--debug`` is given.
Imports the standard library only.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class MetakdError(Exception):
    """Base of every error with an exit code.

    Args:
        cause: what is wrong, naming file, row, key or step.
        remedy: what to do about it; may be empty.
    """

    exit_code = 1

    def __init__(self, cause: str, remedy: str = ""):
        # Other libraries colour what they say, and some of it ends up in a cause.
        self.cause, self.remedy = (_COLOUR.sub("", text) for text in (cause, remedy))
        super().__init__(self.cause)

    def __reduce__(self):
        """Whole on its way to another process."""
        return type(self), (self.cause, self.remedy)


class ConfigError(MetakdError):
    """The configuration or the command line is wrong (exit code 2)."""

    exit_code = 2


class DataError(MetakdError):
    """The data cannot be used as they stand (exit code 3)."""

    exit_code = 3


class CheckpointError(MetakdError):
    """A checkpoint or a stage's output is missing or damaged (exit code 4)."""

    exit_code = 4


class DivergedError(MetakdError):
    """Training produced non-finite values (exit code 5)."""

    exit_code = 5


class UnsupportedError(MetakdError, ValueError):
    """This machine cannot do what was asked for explicitly: backend, dtype, device (exit code
    6)."""

    exit_code = 6


class ParityError(MetakdError):
    """An exported model does not answer as the model that it was made from (exit code 7)."""

    exit_code = 7


class StoppedError(MetakdError):
    """The process was asked to stop, by SIGTERM (exit code 143) or SIGINT (130)."""

    def __init__(self, cause: str, remedy: str = "", *, number: int):
        super().__init__(cause, remedy)
        self.number = number
        self.exit_code = 128 + number  # as a shell reports a process that a signal ended

    def __reduce__(self):
        """Whole on its way to another process."""
        return partial(type(self), number=self.number), (self.cause, self.remedy)


# Which extra of metakd installs what is imported by these names, the bare package being for losses.
EXTRAS = {
    **dict.fromkeys(("transformers", "tokenizers", "numpy", "safetensors", "sklearn"), "train"),
    **dict.fromkeys(("deepspeed", "datasets", "tensorboard"), "train"),
    **dict.fromkeys(("jinja2", "matplotlib", "onnx", "onnxruntime", "onnxscript"), "deploy"),
    **dict.fromkeys(("prometheus_client", "starlette", "uvicorn"), "deploy"),
    "peft": "adapters",
}


def install(extra: str) -> str:
    """The command that installs an extra of metakd."""
    return f"pip install 'metakd[{extra}]'"


@contextmanager
def naming_extras() -> Iterator[None]:
    """Turns the import of a package that an extra would have installed into an error that says
    so.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise UnsupportedError(
            f"{package} is not installed: the bare package has the losses alone",
            install(EXTRAS[package]),
        ) from error


def listing(names: Sequence[str], most: int) -> str:
    """The first of these names, and how many more there are, for a message."""
    more = f" and {len(names) - most} more" * (len(names) > most)
    return ", ".join(names[:most]) + more
