"""Every error that ttspec raises on purpose.

```
TtspecError
├── OptionError        an option or argument has a value that is not allowed
├── TargetError        the target cannot be found, loaded or used
├── CheckpointError    a drafter's files are missing, damaged or do not fit
├── DataError          prompts, training data or another input file is unusable
├── ResourceError      no network, no disk space, no memory, no such device
└── TrainingError      training cannot go on
```

A message says what was given, what is allowed and what to do, in one or two lines.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TtspecError(Exception):
    """Root of the errors that a user can cause and mend."""


class OptionError(TtspecError, ValueError):
    """An option or argument has a value that is not allowed."""


class TargetError(TtspecError):
    """The target cannot be found, loaded or used."""


class CheckpointError(TtspecError):
    """A drafter's files are missing, damaged or do not fit the target."""


class DataError(TtspecError):
    """Prompts, training data or another input file is unusable."""


class ResourceError(TtspecError):
    """Network, disk, memory or device is not available."""


class TrainingError(TtspecError):
    """Training cannot go on."""


def require_writable(path: Path) -> None:
    """Refuse a place that cannot be made or written, before the work whose outcome goes there.

    Raises:
        OSError: Names what of it is no folder, or is closed to this user.
    """
    place = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return
    number = errno.EACCES if place.is_dir() else errno.EEXIST
    raise OSError(number, os.strerror(number), str(place))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, an error of the disk is an `OSError` that names a file, safetensors' own ones too."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except Exception as error:
        if not (code := re.search(r"os error (\d+)", str(error))):
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(path)) from error
