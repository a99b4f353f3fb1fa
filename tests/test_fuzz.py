"""A sample of tests/fuzz.py: nothing that is read from outside ends in a traceback."""
import fuzz


def test_damaged_inputs_are_refused_or_read():
    found, failures = fuzz.campaign(inputs=500, seed=0)
    assert failures == []
    assert sum(found.values()) == 500 and len({kind for kind, _ in found}) == 11
    assert sum(count for (_, verdict), count in found.items() if verdict == "refused") > 150
