"""Servers and other processes under test: started, waited for, and ended again."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
START_SECONDS = 90.0
END_SECONDS = 30.0


@contextmanager
def running(arguments: Sequence[str], ready: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """A server process: what `ready` found in what it said. It is terminated at the end."""
    with tempfile.TemporaryDirectory(prefix="headgate-bench-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-P", *arguments],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(),
            )
        try:
            yield wait_for(process, log, ready)
        finally:
            process.terminate()
            assert process.stdin is not None
            process.stdin.close()
            process.wait(END_SECONDS)


def wait_for(process: subprocess.Popen[bytes], log: Path, ready: re.Pattern[str]) -> re.Match[str]:
    ends_at = time.monotonic() + START_SECONDS
    while (match := ready.search(log.read_text(errors="replace"))) is None:
        if process.poll() is not None or time.monotonic() > ends_at:
            raise RuntimeError(f"a server under test did not start:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.1)
    return match


def environment() -> dict[str, str]:
    """Ours without settings of Headgate, so that every engine runs as it is shipped; the modules are those beside us."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HEADGATE_")}
    return kept | {"PYTHONPATH": os.fspath(ROOT)}


def module_output(*arguments: str) -> Any:
    """The JSON that a module prints as its last line."""
    command = [sys.executable, "-P", "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])
