"""What the entry points share: errors told in one line, third-party chatter turned down."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from so8t.errors import SO8TError


@contextmanager
def reported() -> Iterator[None]:
    """Errors made for people end the program with one line and code 2; set SO8T_TRACEBACK=1 to see where they rose."""
    try:
        yield
    except SO8TError as error:
        if os.environ.get("SO8T_TRACEBACK"):
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped")
        raise SystemExit(130) from None


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
