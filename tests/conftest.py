"""The fixtures of tests/fixtures.py, for every process that runs tests.

The one that only hands them out to workers (`pytest -n 2`) needs none: it would import PyTorch and transformers for ten seconds
before the workers begin.
"""

import gc
import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ or "-n" not in sys.argv:
    gc.disable()  # until everything is imported
    from tests.fixtures import *  # noqa: F403
