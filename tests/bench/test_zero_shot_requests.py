"""bench/zero_shot.py's requests: alike for every arm, in the shape of a task's."""

import zero_shot


def test_requests_have_the_shape_of_their_kind():
    for kind in zero_shot.KINDS.values():
        requests = zero_shot.requests_of(kind, 100, 1024)
        assert requests == zero_shot.requests_of(kind, 100, 1024)
        assert len(requests) == kind.groups * kind.choices
        assert len({tuple(prefix) for _, prefix, _ in requests}) == kind.groups
        assert all(kind.prefix[0] <= len(prefix) <= kind.prefix[1] for _, prefix, _ in requests)
        assert all(kind.continuation[0] <= len(more) <= kind.continuation[1] for _, _, more in requests)
    short = zero_shot.requests_of(zero_shot.KINDS["choices10"], 100, 32)
    assert max(len(prefix) + len(more) for _, prefix, more in short) <= 32
