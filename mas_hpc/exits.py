"""Exit codes: how a process has ended, so that who started it knows whether starting it again can help."""

from __future__ import annotations

import errno
import os

from mas_hpc.errors import LostPeerError, MasHpcError, RunStopped

MISTAKE = 1
"""The user can mend it, and a restart cannot: configuration, data, a method that diverged."""
UNEXPECTED = 70
"""A traceback. This and the two below are those of sysh."""
OUT_OF_MEMORY = 71
NO_DISK = 74
"""It is full, or a file system of this node has failed."""
LOST_PEER = 75
"""Another rank has ended, or is silent: the consequence of what happened there."""
NOT_FINISHED = 85
"""Ended because it was asked to, with everything kept that it goes on from. Linux has ERESTART there."""
HUNG = 124
"""Ended by the watchdog, as timeout(1) does."""
INTERRUPTED = 130
"""Ctrl-C: 128 and the number of the signal, as shells do."""
_STORE_ERRORS = ("DistError", "DistStoreError", "DistNetworkError")
_MEMORY_ERRORS = ("OutOfMemoryError", "MemoryError")
_NO_MEMORY = ("can't allocate memory", "OUT_OF_DEVICE_MEMORY", "OUT_OF_HOST_MEMORY")
"""In messages of RuntimeErrors: of torch's allocator on the CPU, of Level Zero and of SYCL."""
_NO_DISK = tuple(
    os.strerror(code)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN)
)
"""In messages of whoever tried to read or write: Python, safetensors, and errors of ours. The last four are those of a file
server that this node has lost (Lustre, NFS), which another attempt may find again."""


def exit_code(error: BaseException) -> int:
    """The code of a process that this error ends."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, RunStopped):
        return NOT_FINISHED
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, LostPeerError) or names.intersection(_STORE_ERRORS):
        return LOST_PEER
    if names.intersection(_MEMORY_ERRORS) or any(text in str(error) for text in _NO_MEMORY):
        return OUT_OF_MEMORY
    if any(text in str(error) for text in _NO_DISK):
        return NO_DISK
    return MISTAKE if isinstance(error, MasHpcError | OSError) else UNEXPECTED


def explain(error: Exception, code: int) -> str:
    """One message for the user about an error with this code, which is not UNEXPECTED."""
    if isinstance(error, MasHpcError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'file'}: {error.strerror or error}; what was written before is intact"
    if code == OUT_OF_MEMORY:
        return f"out of memory ({error}): lower rollout.kv_gib, rollout.max_rows or model.max_tree_tokens, or start more ranks"
    return f"the ranks' store is gone ({error}): another rank, or what started the ranks, has ended; look for its error"
