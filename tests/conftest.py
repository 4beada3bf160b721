"""The fixtures of tests/fixtures.py, for every process that runs tests.

The one that only hands them out to workers (`pytest -n 2`) needs none: it would import PyTorch and transformers for ten seconds
before the workers begin.
"""

import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ or "-n" not in sys.argv:
    from tests.fixtures import *  # noqa: F403
