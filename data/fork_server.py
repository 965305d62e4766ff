"""Imported by the fork server of loader workers, and by nobody else: signals that are meant for the trainer pass it by.

It would die of them, and workers whose server is gone cannot be told from dead ones.
"""

import os
import signal

import selfsight.data.loader  # noqa: F401 - what every worker needs, imported once

os.setpgid(0, 0)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
