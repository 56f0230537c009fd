"""Errors a user can act on: each says what, where, what was expected and the remedy, and is printed without a traceback."""


class MasHpcError(Exception):
    """Base of every error that is reported to the user as one message."""


class ConfigError(MasHpcError, ValueError):
    """A key or value of the configuration cannot be used."""


class DataError(MasHpcError, ValueError):
    """A task set, trace file or transcript cannot be used."""


class RolloutError(MasHpcError, RuntimeError):
    """An engine cannot serve a request."""


class LaunchError(MasHpcError, RuntimeError):
    """The launcher, the ranks or their process group do not fit together."""


class LostPeerError(LaunchError, RolloutError):
    """Another rank has ended, or is silent: the consequence of what happened there."""


class CheckpointError(MasHpcError, OSError):
    """A model or checkpoint cannot be read or written."""


class RunError(MasHpcError, RuntimeError):
    """Training cannot go on."""


class RunStopped(RunError):
    """The run was asked to end before it was done; what it had is kept, and it can go on from there."""
