"""Every failure a user can cause or meet, each with the exit code that scripts rely on."""


class SelfsightError(Exception):
    """A failure explained in one or two lines: what was wrong, where, and what to do."""

    exit_code = 1

    @property
    def told(self) -> str:
        """What to say; a loader worker's error comes wrapped in its traceback, whose end is the message."""
        text = str(self)
        return text.strip().splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text


class UsageError(SelfsightError):
    """A wrong command line, recipe or argument."""

    exit_code = 2


class DataError(SelfsightError):
    """Shards, indexes or images that cannot be used as they are."""

    exit_code = 65


class NoShards(DataError):
    """Shards that are named and not there."""


class NumericError(SelfsightError):
    """A non-finite loss or gradient."""

    exit_code = 70


class StorageError(SelfsightError):
    """A file or checkpoint that cannot be written or trusted."""

    exit_code = 74


class Stopped(SelfsightError):
    """The run was asked to stop, saved, and continues when the same command is run again."""

    exit_code = 75


class DataGone(SelfsightError):
    """The data cannot be reached any more; the run is saved and continues when they are back."""

    exit_code = 75


class PeerLost(SelfsightError):
    """Another process of the run died, failed or went silent; the run continues when all are started again."""

    exit_code = 76
