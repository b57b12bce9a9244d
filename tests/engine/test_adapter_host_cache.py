"""Host memory: who is read, who is evicted, in plain integers."""

from __future__ import annotations

from lorax_serve.engine.host_cache import HostCache


def filled(max_bytes: int, *sizes: int) -> HostCache:
    cache = HostCache(max_bytes)
    for version, size in enumerate(sizes, 1):
        cache.add(version, size, ())
    assert cache.problems() == []
    return cache


def resident(cache: HostCache, upto: int = 9) -> list[int]:
    return [version for version in range(1, upto) if version in cache]


def test_a_new_adapter_evicts_the_least_recently_used() -> None:
    cache = filled(3, 1, 1, 1)
    assert cache.use(1) == 1
    assert cache.add(4, 2, ()) == [2, 3]
    assert (resident(cache), cache.nbytes, cache.known, cache.evictions) == ([1, 4], 3, 4, 2)
    assert cache.use(2) is None


def test_a_new_adapter_stays_on_disk_if_the_others_are_pinned() -> None:
    cache = filled(3, 1, 1, 1)
    assert cache.add(4, 2, {1, 2}) == []
    assert (resident(cache), cache.known) == ([1, 2, 3], 4)


def test_the_working_set_is_read_in_order_and_kept() -> None:
    cache = filled(3, 1, 1, 1, 1, 1, 1)
    assert resident(cache) == [4, 5, 6]
    plan = cache.plan([1, 5, 2, 3], in_use=())
    assert plan == ([4, 6], [1, 2], True, True)
    assert (cache.nbytes, cache.reading) == (3, 2)
    # Nothing is evicted or read twice while that goes on.
    assert cache.plan([1, 5, 2, 3], in_use=()) == ([], [], True, True)
    assert cache.arrived(2)
    assert cache.arrived(1)
    assert resident(cache) == [1, 2, 5]
    assert cache.problems() == []


def test_the_first_wanted_gets_in_before_those_that_are_there() -> None:
    """A prefetched adapter may not bar the one whose turn it is."""
    cache = filled(2, 1, 1, 1)
    assert cache.plan([1, 2, 3], in_use=()).evict == [3]
    cache.arrived(1)
    assert cache.plan([3, 1, 2], in_use=()) == ([2], [3], True, True)


def test_a_small_adapter_may_not_pass_a_large_one_that_waits_for_room() -> None:
    cache = filled(4, 4, 1, 1, 1)
    assert resident(cache) == [2, 3, 4]
    plan = cache.plan([1, 2], in_use={2, 3})
    assert plan == ([], [], True, True)
    assert cache.plan([1, 2], in_use=()) == ([2, 3, 4], [1], True, True)


def test_only_a_few_are_read_at_once() -> None:
    cache = filled(8, *[1] * 16)
    plan = cache.plan(range(1, 9), in_use=())
    assert (plan.read, plan.settled) == ([1, 2, 3, 4], False)
    for version in plan.read:
        cache.arrived(version)
    assert cache.plan(range(1, 9), in_use=()).read == [5, 6, 7, 8]


def test_a_failed_or_dropped_read_gives_its_bytes_back() -> None:
    cache = filled(2, 1, 1, 1, 1)
    assert cache.plan([1, 2], in_use=()).read == [1, 2]
    assert cache.lost(1)
    assert cache.drop(2) == 1
    assert not cache.arrived(2)
    assert not cache.lost(2)
    assert (cache.nbytes, cache.reading, cache.known) == (0, 0, 3)
    assert cache.drop(1) == 0
    assert cache.problems() == []


def test_lost_accounts_are_found() -> None:
    cache = filled(3, 1, 1)
    cache.nbytes = 4
    assert cache.problems() == [
        "adapter bytes are 4, not 2",
        "adapters take 4 of 3 host bytes",
    ]


def test_what_is_pinned_is_not_evicted() -> None:
    cache = filled(3, 1, 1, 1)
    assert cache.pin(1) is None
    assert cache.add(4, 1, ()) == [2]
    assert cache.plan([2], in_use=()).evict == [3]
    cache.unpin(1)
    cache.arrived(2)
    assert cache.add(5, 1, ()) == [1]


def test_what_is_pinned_is_read() -> None:
    cache = filled(2, 1, 1, 1)
    assert cache.pin(1) is None
    assert cache.missing == [1]
    assert cache.plan(cache.missing, in_use=()) == ([2], [1], False, True)
    assert cache.missing == []
    cache.arrived(1)
    assert cache.plan([2, 3], in_use=()) == ([3], [2], True, True)


def test_pins_leave_room_for_the_largest_other() -> None:
    cache = filled(8, 2, 2, 4, 1)
    assert cache.pin(1) is None
    assert cache.pin(2) is None, "4 bytes are pinned, 4 are left for the third"
    assert cache.pin(4) == 1, "5 would be pinned"
    assert cache.pin(4, instead_of=1) is None
    assert cache.pin(3) == 1, "2 + 2 + 4 + 1 are pinned then"
    assert cache.drop(2) == 2
    assert cache.pinned_bytes == 3
    assert cache.problems() == []
