"""Errors for what a user can fix: the command line turns each into one line."""


class RefBNError(ValueError):
    """Something that the user can fix; the message says what and how."""


class ConfigError(RefBNError):
    """A config key or an argument has a value that is not allowed."""


class DataError(RefBNError):
    """A dataset, a picture or a table of results cannot be used as it is."""


class CheckpointError(RefBNError):
    """A checkpoint cannot be read, or does not fit the model."""
