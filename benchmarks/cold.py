"""Run a command whose shards come from storage every time: while it runs, the page cache is made to forget them.

python benchmarks/cold.py SHARDS -- COMMAND

What the storage keeps in a memory of its own stays there, and what lies in /dev/shm is never elsewhere; gpu.py tells how many
bytes disks gave while a part ran. Ends with the command's exit code.
"""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from selfsight.data.spec import find_shards

EVERY = 0.1  # seconds, in which a machine reads a few hundred photographs


def main() -> int:
    """Run it, and forget."""
    if sys.argv[2:3] != ["--"] or not sys.argv[3:]:
        print(__doc__, file=sys.stderr)
        return 2
    files = [os.open(path, os.O_RDONLY) for path in find_shards(sys.argv[1]) if isinstance(path, Path)]
    if not files:
        print(f"{sys.argv[1]}: no shards on a disk of this machine, so nothing to forget", file=sys.stderr)
        return 2
    process = subprocess.Popen(sys.argv[3:])
    try:
        while process.poll() is None:
            for file in files:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=EVERY)
        return process.returncode
    except KeyboardInterrupt:  # the command was told, too
        return process.wait()


if __name__ == "__main__":
    sys.exit(main())
