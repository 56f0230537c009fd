"""The error of this package."""


class KernelError(RuntimeError):
    """A backend cannot be used on this machine; the message says why and what to do."""
