"""Device slots: true bytes, pins, and who is evicted."""

from __future__ import annotations

from lorax_serve.engine.adapter_slots import AdapterSlots, Pinned

SIZES = {1: 4, 2: 4, 3: 8, 4: 1}


def sized(capacity: int, max_bytes: int | None) -> AdapterSlots:
    return AdapterSlots(capacity, max_bytes, SIZES.get)


def test_a_slot_is_kept_after_its_pins() -> None:
    slots = sized(2, None)
    assert slots.pin(1) == Pinned(0, is_new=True)
    slots.unpin(1)
    assert slots.pin(1) == Pinned(0, is_new=False)
    assert (len(slots), slots.nbytes, list(slots.pinned)) == (1, 4, [1])
    assert slots.problems({1: 1}) == []


def test_a_large_adapter_takes_the_room_of_several_small_ones() -> None:
    slots = sized(4, 10)
    for version in (1, 2):
        slots.pin(version)
        slots.unpin(version)
    slots.pin(4)
    assert slots.pin(3) == Pinned(1, is_new=True)
    assert sorted(slots) == [3, 4]
    assert slots.take_emptied() == [0, 1]
    assert slots.take_emptied() == []
    assert (slots.nbytes, slots.evictions) == (9, 2)
    assert slots.problems({3: 1, 4: 1}) == []


def test_the_least_recently_pinned_goes_first() -> None:
    slots = sized(2, None)
    for version in (1, 2, 1):
        slots.pin(version)
        slots.unpin(version)
    slots.pin(4)
    assert 2 not in slots
    assert 1 in slots


def test_pinned_ones_stay_and_the_shortage_is_told() -> None:
    slots = sized(4, 8)
    slots.pin(1)
    assert slots.pin(3) is None
    assert slots.short
    assert slots.pin(2) is not None
    assert slots.pin(4) is None
    assert slots.take_refused() == [3, 4]
    assert slots.take_refused() == []
    slots.unpin(1)
    slots.unpin(2)
    assert slots.pin(3) is not None
    assert slots.problems({3: 1}) == []


def test_weights_on_disk_only_are_refused_without_a_shortage() -> None:
    slots = sized(1, None)
    assert slots.pin(99) is None
    assert (slots.take_refused(), slots.short, len(slots)) == ([99], False, 0)


def test_lost_accounts_are_found() -> None:
    slots = sized(2, 100)
    slots.pin(1)
    assert "pins" in slots.problems({})[0]
    slots.nbytes += 1
    assert "device bytes are 5, 4 of them pinned, not 4 and 4" in slots.problems({1: 1})
