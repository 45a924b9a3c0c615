"""No search for garbage within steps, and nobody else's frozen objects are thawed by a training."""

import gc

import pytest

from armillary.engine.train.loop import _garbage_in_step


@pytest.fixture
def frozen():
    gc.freeze()
    yield gc.get_freeze_count()
    gc.unfreeze()


def test_what_is_there_is_not_searched_and_is_given_back():
    gc.unfreeze()  # what an earlier test of this process may have left
    with _garbage_in_step():
        assert gc.get_freeze_count() > 1000 and not gc.isenabled()
    assert gc.get_freeze_count() == 0 and gc.isenabled()


def test_what_others_have_frozen_stays_so(frozen):
    with pytest.raises(KeyboardInterrupt), _garbage_in_step():
        assert not gc.isenabled()
        raise KeyboardInterrupt
    assert gc.get_freeze_count() > frozen / 2 and gc.isenabled()  # some may have been let go meanwhile
