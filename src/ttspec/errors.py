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
