"""What the entry points share: errors told in one line, third-party chatter turned down."""

import logging
import os
import select
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from so8t.errors import SO8TError


@contextmanager
def reported() -> Iterator[None]:
    """Errors made for people, and what the system does not let one do (write there, a full disk), end the program with one line
    and code 2; set SO8T_TRACEBACK=1 to see where they rose. A reader who has seen enough, as `head` has, ends it silently."""
    try:
        yield
        sys.stdout.flush()
    except (SO8TError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise SystemExit(141) from None  # as a shell tells of SIGPIPE
        if os.environ.get("SO8T_TRACEBACK") or getattr(error, "errno", 0) is None:  # not from the system: a bug
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(told(error))}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped")
        raise SystemExit(130) from None


def _nobody_reads() -> bool:
    """Whether standard output's reader has left; then nothing more is written there, nor does Python complain at its end."""
    if not hasattr(select, "poll"):  # Windows, where a pipe that nobody reads is another error
        return False
    output, poll = 1, select.poll()
    poll.register(output, 0)  # what is wrong with it is told without asking
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def told(error: SO8TError | OSError) -> str:
    """In one line."""
    if isinstance(error, SO8TError):
        return str(error)
    return ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)


def visible(text: str) -> str:
    """A stranger's text for a terminal: control and format characters, which can hide or overwrite what stands beside them, are
    spelled out, but for line ends, tabs and the joiners that some scripts need."""
    kept, hidden = "\n\t\u200c\u200d", ("Cc", "Cf")
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in hidden and c not in kept else c for c in text)


def quieten() -> None:
    """Third-party notices that say nothing about this run."""
    for pattern in (
        ".*does not have many workers.*",
        ".*Trying to infer the `batch_size`.*",
        ".*LeafSpec.*",
        ".*isinstance.treespec.*",
        ".*in eval mode at the start of training.*",  # the frozen base, and that is intended
        ".*your dataloader is not resumable.*",  # the sampler goes on with the next batch
    ):
        warnings.filterwarnings("ignore", pattern)
    for name in ("bitsandbytes", "transformers", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
