"""A child process ends when the supervisor is gone, however it went.

The supervisor holds the writing end of a pipe and never writes; the kernel closes it with the process. This works where
`prctl` does not (macOS), and a child that is busy or stuck in its event loop ends all the same.
"""

from __future__ import annotations

import os
import shutil
import threading


def watch(fd: int, runtime_folder: str) -> None:
    """Ends this process at once when the other end of `fd` closes, and takes the sockets' folder with it."""

    def wait() -> None:
        while os.read(fd, 1):
            pass
        shutil.rmtree(runtime_folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
