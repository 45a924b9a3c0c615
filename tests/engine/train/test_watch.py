"""A rank that does not come is named, before and when the process group gives up; the shorter time-out holds."""

import pytest
from two_ranks import run_on_two_ranks

pytestmark = pytest.mark.dist


def test_a_rank_that_sleeps_is_named_within_the_stated_time(tmp_path):
    def ranks(rank):
        import contextlib
        import io
        import time

        from armillary.engine.train.watch import Watch
        from armillary.engine.zero.processes import set_timeout

        watch = Watch(1.0)
        set_timeout(5 / 60)  # 5 s; the group began with half an hour
        watch.at(1, "the next step after step 6", 2 / 60)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            began = time.monotonic()
            if rank == 1:
                time.sleep(10)
            else:
                watch.at(2, "the end of step 7")
                try:
                    dist.all_reduce(torch.ones(1))  # noqa: F821
                except RuntimeError:
                    waited = time.monotonic() - began
                    assert 4.5 < waited < 9, waited  # gloo rounds down to milliseconds; a busy machine is late
                else:
                    raise AssertionError("nobody gave up")
        warning = said.getvalue()
        watch.close()
        if rank == 0:
            wanted = "rank 1 did not come to the end of step 7, where rank 0 has waited for "
            assert warning.count("WARNING") == 1 and wanted in warning, warning  # after 2 s, so before the time-out
            assert "it was last at the next step after step 6" in watch.behind()
        os._exit(0)  # noqa: F821  # the group is broken: no barrier can end it

    run_on_two_ranks(ranks, tmp_path)


def test_one_rank_has_nobody_to_watch(one_process):
    from armillary.engine.train.watch import Watch

    watch = Watch(1.0)
    watch.at(1, "step 1")
    watch.close()


def test_a_store_on_a_machine_that_is_gone_keeps_nobody(one_process, monkeypatch):
    """TCP tells of a pulled cable after a quarter of an hour; calls of the store wait as long, whatever time-out they have."""
    import threading
    import time

    from armillary.engine.train import watch as module

    class Gone:
        def set(self, *_):
            threading.Event().wait()

    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.2)
    watch = module.Watch(1.0)
    watch.world, watch._store = 2, Gone()
    watch._thread = threading.Thread(target=watch._go, daemon=True)
    watch._thread.start()
    began = time.monotonic()
    assert watch.behind() == "rank 0, which keeps the list of ranks, does not answer"
    watch.close()
    assert time.monotonic() - began < 5
