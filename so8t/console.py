"""What the entry points share: errors told in one line, third-party chatter turned down."""

import logging
import os
import sys
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
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
        raise SystemExit(141) from None  # as a shell tells of SIGPIPE
    except (SO8TError, OSError) as error:
        if os.environ.get("SO8T_TRACEBACK") or getattr(error, "errno", 0) is None:  # not from the system: a bug
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(told(error))}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped")
        raise SystemExit(130) from None


def told(error: SO8TError | OSError) -> str:
    """In one line."""
    if isinstance(error, SO8TError):
        return str(error)
    return ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)


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
