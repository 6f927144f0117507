"""The errors that tell a person what to change. Anything else that is raised is a defect of ours."""


class SoftprefError(ValueError):
    """Base of the errors that a person can mend; the console prints their message without a traceback."""

    def __init__(self, message: str = "") -> None:
        # a file's name need not be UTF-8, and no log or result could hold it as it is
        super().__init__(message.encode(errors="backslashreplace").decode())


class ConfigError(SoftprefError):
    """A parameter, a configuration file or a model path is wrong: what, where, and what would be right."""


class DataError(SoftprefError):
    """Preference data is unusable: which file or row, what was found, and what was expected."""


class DiskError(SoftprefError):
    """A disk takes no more, or is not to be written to: which folder, what happened, and what to do."""
