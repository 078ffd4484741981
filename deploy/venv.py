"""Makes a virtual environment with Headgate in it: `python3 deploy/venv.py DIRECTORY [EXTRA]`. Standard library only.

The exact versions are those of constraints.txt. torch is pinned to a release, not to a build: pip's own configuration
(an index or a folder of wheels) decides between a CPU and a CUDA build.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)


def fail(sentence):
    sys.exit(f"headgate: {sentence}")


def require_python():
    if sys.version_info < OLDEST:
        here = ".".join(map(str, sys.version_info[:3]))
        wanted = ".".join(map(str, OLDEST))
        fail(f"Python {wanted} or newer is needed, this is {here}. Name another one: make PYTHON=python{wanted} …")
    try:
        import ensurepip  # noqa: F401 (Debian ships Python without it)
        import venv  # noqa: F401
    except ImportError:
        fail("this Python has no venv module. On Debian and Ubuntu: apt install python3-venv")


def run(stage, *command):
    print(f"headgate: {stage}", flush=True)
    if subprocess.run(command, cwd=ROOT).returncode:
        fail(f"this step failed: {' '.join(map(str, command))}")


def main():
    require_python()
    directory = Path(sys.argv[1])
    extra = f"[{sys.argv[2]}]" if len(sys.argv) > 2 else ""
    python = directory / "bin" / "python"
    if not python.exists():
        run(f"making {directory}", sys.executable, "-m", "venv", os.fspath(directory))
    pip = [os.fspath(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run("installing (torch is large; a few minutes the first time)", *pip, "-c", "constraints.txt", "-e", f".{extra}")


if __name__ == "__main__":
    main()
