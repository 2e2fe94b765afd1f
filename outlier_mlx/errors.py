"""The errors that a user can act on: the command line prints them as one line."""


class OutlierError(Exception):
    """Something is wrong with an input or with the machine; the message says what and where."""


class CheckpointError(OutlierError):
    """A checkpoint, base or tier on disk is not what it should be."""


class OutputExistsError(OutlierError):
    """The place to write to is taken, and nobody asked to replace it."""


class CheckpointWarning(UserWarning):
    """A checkpoint holds something that is ignored and that its author may have meant."""
