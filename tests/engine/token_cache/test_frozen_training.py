"""Whole runs on cached tokens in real processes: the losses of runs without, also resumed, on two ranks, after a kill."""

import signal
from pathlib import Path

import pytest
from frozen_toy import make_survey

pytestmark = [pytest.mark.dist, pytest.mark.slow]
SCRIPT = Path(__file__).parents[2] / "support" / "frozen_toy.py"
CHUNK = str(3 * 4 * 12 * (4 + 8))  # three samples


@pytest.fixture(scope="module")
def start(site, tmp_path_factory):
    """Runs the recipe to its end: start(name, *arguments, **options)."""
    survey = make_survey(tmp_path_factory.mktemp("pairs") / "survey")

    def go(name, *arguments, **options):
        where = {"FROZEN_OUT": str(site.runs), "FROZEN_SURVEY": str(survey), "CHUNK_BYTES": CHUNK}
        return site.go("--name", name, *arguments, script=SCRIPT, **where, **options)

    return go


def losses(site, name):
    return [line["loss"] for line in site.metrics(name)]


def test_losses_are_bitwise_those_without_a_cache_also_resumed(site, start, tmp_path):
    assert start("plain", world=0).code == 0
    cached = ("--data.token-cache", str(tmp_path / "tokens"))
    half = start("cached", *cached, "--train.steps", "6", world=0)  # an epoch has 4 steps
    assert half.code == 0 and "samples in" in half.output, half.output
    rest = start("cached", *cached, world=0)
    assert rest.code == 0 and "continuing" in rest.output and "token cache:" not in rest.output, rest.output
    assert losses(site, "cached") == losses(site, "plain")
    other = start("other", *cached, "--views.image.stretch.Q", "9", world=0)
    assert other.code == 2 and "views.image.stretch.Q 20" in other.output and "Traceback" not in other.output, (
        other.output
    )


def test_two_ranks_fill_together_and_go_on_after_a_kill(site, start, tmp_path):
    plain = start("plain-2")
    assert plain.code == 0, plain.output
    cached = ("--data.token-cache", str(tmp_path / "tokens"))
    died = start("cached-2", *cached, FAULT_CHUNK="5", FAULT_RANK="1", FAULT_SIGNAL=str(int(signal.SIGKILL)))
    assert -signal.SIGKILL in died.codes
    marks = sorted(p.name for p in (tmp_path / "tokens" / ".fill").glob("chunk-*"))
    assert "chunk-000003" in marks and "chunk-000005" not in marks
    asked = start("cached-2", *cached, FAULT_CHUNK="6", FAULT_RANK="1", FAULT_SIGNAL=str(int(signal.SIGTERM)))
    assert asked.code == 75 and "stopped by a signal while filling data.token_cache" in asked.output, asked.output
    done = start("cached-2", *cached)
    assert done.code == 0, done.output
    assert losses(site, "cached-2") == losses(site, "plain-2")
