# SPDX-License-Identifier: Apache-2.0
"""Environment variables that stand in for arguments, so that a launcher can hand them to a script; arguments win.

======================  =============================================================================================
``SHARDCKPT_ROOT``      ``root`` of `Checkpointer`
``SHARDCKPT_TIMEOUT``   ``Options.timeout``, in seconds
``SHARDCKPT_SIGNAL``    the signals of `Checkpointer.on_signal` when it is called with none: names or numbers, with commas
``SHARDCKPT_RUN``       name of the run, the same in all its starts (see `shardckpt.fencing`); else torchrun's ``--rdzv-id``;
                        ``none`` for a process that is no start of the run, such as one that evaluates beside it
``SHARDCKPT_ANNOUNCE``  when not empty, rank 0 writes one line to stderr when it restores: from which step, on how many ranks
======================  =============================================================================================
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping

from .errors import ConfigError

ROOT, TIMEOUT, SIGNAL = "SHARDCKPT_ROOT", "SHARDCKPT_TIMEOUT", "SHARDCKPT_SIGNAL"
RUN, ANNOUNCE = "SHARDCKPT_RUN", "SHARDCKPT_ANNOUNCE"
TIMEOUT_SECONDS = 600.0
_TORCHRUN = "TORCHELASTIC_RUN_ID"
NAMELESS = ("", "none")
"""What torchrun calls a run that was given no name."""


def default_root(environ: Mapping[str, str] = os.environ) -> str:
    """The root of a `Checkpointer` that is given none; raises `ConfigError` when the environment has none either."""
    if not environ.get(ROOT):
        raise ConfigError(f"a Checkpointer needs a root: Checkpointer('/ckpts/run42'), or the environment variable {ROOT}")
    return environ[ROOT]


def default_timeout(environ: Mapping[str, str] = os.environ) -> float:
    """``Options.timeout`` where it is not given, in seconds."""
    text = environ.get(TIMEOUT, "")
    try:
        return float(text) if text else TIMEOUT_SECONDS
    except ValueError:
        raise ConfigError(f"{TIMEOUT}={text!r} is not a number of seconds") from None


def default_signals(environ: Mapping[str, str] = os.environ) -> tuple[int, ...]:
    """The signals of an ``on_signal`` that is given none."""
    return parse_signals(environ.get(SIGNAL, ""), SIGNAL)


def parse_signals(text: str, source: str) -> tuple[int, ...]:
    """Numbers of the signals in ``SIGTERM,USR1,15``; ``source`` is named by the `ConfigError` for what is none."""
    numbers = []
    for word in filter(None, (part.strip().upper() for part in text.split(","))):
        name = word if word.startswith("SIG") else f"SIG{word}"
        if word.isdecimal() and int(word) in signal.valid_signals():
            numbers.append(int(word))
        elif name in signal.Signals.__members__:
            numbers.append(int(signal.Signals[name]))
        else:
            raise ConfigError(f"{source}={text!r}: {word!r} is no signal; write SIGTERM or SIGUSR1, several with commas")
    return tuple(dict.fromkeys(numbers))


def run_name(environ: Mapping[str, str] = os.environ) -> str | None:
    """The name of the run that this process is of; None when nobody has given it one."""
    name = environ.get(RUN) or environ.get(_TORCHRUN, "")
    return None if name in NAMELESS else name


def start_logger(environ: Mapping[str, str] = os.environ) -> logging.Logger:
    """Where it is told what a start of a run resumes from: on stderr if the launcher wishes so, else like the other logs."""
    logger = logging.getLogger("shardckpt.start")
    if environ.get(ANNOUNCE) and not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("shardckpt: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger
