"""Python's collector in processes of our own: a full pass over what models bring takes long."""

import gc


def freeze_heap() -> None:
    """Leave all that there is out of full collections from now on, once garbage is gone.

    Each would look at some hundred thousand objects that stay, and hold up all rows for half a
    second (docs/experiments.md). Objects that die later go as ever, but not cycles of those that
    are frozen: what replaces much of the heap calls this again. Not for a library's caller, whose
    heap it is.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
