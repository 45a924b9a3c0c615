"""A record with a seal comes back as it was, or not at all."""

import json
import math

import pytest

from armillary.engine.sealed_json import sealed, unsealed

RECORD = {"b": (1, 2.5, None), "a": {"x": [math.nan, 1e-300], "sha256": "of something else"}, "text": "\u00e9"}


def test_a_record_comes_back():
    back = unsealed(json.loads(json.dumps(sealed(RECORD), indent=1)))
    assert json.dumps(back) == json.dumps(RECORD) and list(back) == list(RECORD)
    assert unsealed(json.loads(json.dumps(RECORD))).keys() == RECORD.keys()  # of an earlier version


@pytest.mark.parametrize("changed", [{"b": [1, 2.5]}, {"c": 0}, {"sha256": "0" * 64}])
def test_a_changed_record_is_refused(changed):
    with pytest.raises(ValueError, match="its SHA-256 differs: it was damaged, or changed by hand"):
        unsealed(json.loads(json.dumps({**sealed(RECORD), **changed})))
    with pytest.raises(ValueError, match="must be an object of named entries, got a list"):
        unsealed([])
