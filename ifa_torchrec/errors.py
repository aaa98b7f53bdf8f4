"""What is raised where the user, not the program, is at fault.

A command prints the message of a UserError and ends; every other exception keeps its traceback.
"""


class UserError(Exception):
    """What was given cannot be used; the message names it and says what would be right.

    Raised where input enters: a file, an option, a request, an argument. Its subclasses are a
    ValueError or a RuntimeError too, whichever a caller in Python would expect.

    Example:
        >>> from ifa_torchrec.data import LogError
        >>> from ifa_torchrec.errors import UserError
        >>> issubclass(LogError, UserError), issubclass(LogError, ValueError)
        (True, True)
    """


class ConfigError(UserError, ValueError):
    """A value of a configuration, or of a command's option, is not one that it can have.

    Example:
        >>> from ifa_torchrec import IFAConfig
        >>> IFAConfig(embedding_dim=0)
        Traceback (most recent call last):
        ifa_torchrec.errors.ConfigError: IFAConfig: embedding_dim must be positive, got 0
    """
