"""Whether DALI is installed: it comes with the package on Linux, but a machine that only runs kernels may lack it."""

from importlib.util import find_spec

import pytest


def _installed() -> bool:
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the name space
        return False


# Looked for, not imported: an installation that is broken makes the tests fail, not skip.
needs_dali = pytest.mark.skipif(not _installed(), reason="needs nvidia-dali")
