"""What is wrong with a file or an item, in one line that begins with its name."""

from contextlib import contextmanager


class DataError(ValueError):
    """An item that cannot be read; the message names it and says why."""


def require(holds, reason):
    """DataError with this reason unless something holds."""
    if not holds:
        raise DataError(reason)


@contextmanager
def errors_named(item):
    """Turns any exception while an item is prepared into a DataError: one line that begins with its name."""
    name = " ".join(str(item)[:200].split()) or "no name"
    try:
        yield
    except Exception as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        reason = " ".join(reason[:1000].split()) or type(error).__name__
        if not reason.startswith(f"{name}: "):  # a nested errors_named may have named it
            reason = f"{name}: {reason}"
        raise DataError(reason) from error
