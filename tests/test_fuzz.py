"""A sample of tests/fuzz.py: damage is refused in a sentence, or read as others read it."""
import fuzz


def test_damaged_inputs_are_refused_or_read_right():
    found, failures = fuzz.campaign(inputs=500, seed=0)
    assert failures == []
    refused = {kind for kind, verdict in found if verdict == "refused"}
    assert sum(found.values()) == 500 and len(refused) == 17
    assert sum(count for (_, verdict), count in found.items() if verdict == "read") > 80
