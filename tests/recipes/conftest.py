"""What the tests of all recipes share."""

import processes
import pytest


@pytest.fixture(scope="module")
def presets(request):
    """The recipe that the file of tests is named after, and its presets: name of the constant -> Run."""
    return processes.presets(request.path.stem.removeprefix("test_"))
