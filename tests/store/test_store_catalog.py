"""The catalogue: names, histories and numbers, each change once and for good."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_serve.errors import AdapterConflict, AdapterNotFound, InvalidRequest
from lorax_serve.store.catalog import Catalog, NameRecord, Recorded
from tests.store.sample import CATALOG, Model, contents_of, digest, quick_directory

A, B, C, D = (digest(number) for number in range(4))


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    """Keeps two earlier versions; its clock ticks once a load."""
    ticks = itertools.count(1000)
    with Catalog(tmp_path / CATALOG, history=2, clock=lambda: float(next(ticks))) as opened:
        yield opened


def test_what_is_recorded_is_read(catalog: Catalog, tmp_path: Path) -> None:
    recorded = catalog.record_load(
        "poet", A, source="file:///x", path="a/é", signature="etag", weight=7, pinned=True
    )
    assert recorded == Recorded(1, frozenset())
    catalog.record_load("beta", B)
    poet = NameRecord("poet", A, 1, "file:///x", "a/é", "etag", 7, True, 1000.0, A)
    beta = NameRecord("beta", B, 2, None, "", "", 1, False, 1001.0)
    for opened in (catalog, Catalog(tmp_path / CATALOG)):
        assert opened.names() == [beta, poet]
        assert opened.get("poet") == poet
        assert opened.get("nobody") is None
        assert opened.history("poet") == opened.history("nobody") == []
        assert opened.referenced() == {A, B}
        assert opened.is_referenced(A)
        assert not opened.is_referenced(C)
    opened.close()


def test_loading_again_keeps_history(catalog: Catalog) -> None:
    assert catalog.record_load("poet", A).unreferenced == set()
    assert catalog.record_load("poet", B).unreferenced == set()
    assert catalog.record_load("poet", C).unreferenced == set()
    assert catalog.history("poet") == [(B, 2, 1001.0), (A, 1, 1000.0)]
    assert catalog.record_load("poet", D) == Recorded(4, frozenset({A}))
    assert catalog.history("poet") == [(C, 3, 1002.0), (B, 2, 1001.0)]
    # Its own content again, and one of its history: neither is in the history twice.
    assert catalog.record_load("poet", D) == Recorded(5, frozenset())
    assert catalog.record_load("poet", B) == Recorded(6, frozenset())
    assert catalog.history("poet") == [(D, 5, 1004.0), (C, 3, 1002.0)]


def test_what_another_name_needs_is_not_unreferenced(catalog: Catalog) -> None:
    catalog.record_load("one", A)
    catalog.record_load("two", B)
    catalog.record_load("two", A)
    assert catalog.record_unload("one") == set()
    assert catalog.record_unload("two") == {A, B}
    assert catalog.names() == []
    assert catalog.history("two") == []
    assert catalog.record_load("one", A).sequence == 4


def test_a_load_sets_everything_anew(catalog: Catalog) -> None:
    catalog.record_load("poet", A, source="file:///x", path="a", signature="s", weight=3)
    catalog.record_load("poet", B)
    assert catalog.get("poet") == NameRecord("poet", B, 2, None, "", "", 1, False, 1001.0)


def test_rolling_back(catalog: Catalog) -> None:
    for content in (A, B):
        catalog.record_load("poet", content, source=f"file:{content}", signature="s", weight=5)
    catalog.record_load("poet", C, source="file:c", signature="t", weight=5, pinned=True)
    back = catalog.roll_back("poet")
    # What the source had is still known, or the next look at it would undo this.
    assert back == NameRecord("poet", B, 4, "file:c", "", "t", 5, True, 1003.0, C)
    assert catalog.get("poet") == back
    assert catalog.history("poet") == [(C, 3, 1002.0), (A, 1, 1000.0)]
    assert catalog.roll_back("poet", A).sequence == 5
    assert catalog.history("poet") == [(B, 4, 1003.0), (C, 3, 1002.0)]
    assert catalog.roll_back("poet").digest == B
    assert catalog.roll_back("poet").digest == A
    assert catalog.referenced() == {A, B, C}


def test_rolling_back_to_what_is_not_there(catalog: Catalog) -> None:
    with pytest.raises(AdapterNotFound, match="'poet'"):
        catalog.roll_back("poet")
    catalog.record_load("poet", A)
    with pytest.raises(AdapterConflict, match="'poet' has no earlier version"):
        catalog.roll_back("poet")
    catalog.record_load("poet", B)
    with pytest.raises(AdapterConflict, match=f"{C}.*these are: {A}"):
        catalog.roll_back("poet", C)
    with pytest.raises(AdapterConflict, match=f"{B}.*not an earlier version of it now"):
        catalog.roll_back("poet", B)
    assert catalog.record_load("poet", C).sequence == 3


def test_weight_and_pin(catalog: Catalog) -> None:
    catalog.record_load("poet", A)
    catalog.record_load("other", A)
    catalog.set_weight("poet", 100)
    catalog.set_pinned("poet", True)
    assert catalog.get("poet") == NameRecord("poet", A, 1, None, "", "", 100, True, 1000.0)
    assert catalog.get("other") == NameRecord("other", A, 2, None, "", "", 1, False, 1001.0)
    catalog.set_pinned("poet", False)
    assert [record.pinned for record in catalog.names()] == [False, False]
    for weight in (0, 101):
        with pytest.raises(InvalidRequest, match="weight must be 1 to 100"):
            catalog.set_weight("poet", weight)
        with pytest.raises(InvalidRequest, match="weight must be 1 to 100"):
            catalog.record_load("poet", A, weight=weight)
    with pytest.raises(AdapterNotFound, match="'nobody'"):
        catalog.set_weight("nobody", 2)
    with pytest.raises(AdapterNotFound, match="'nobody'"):
        catalog.set_pinned("nobody", True)
    with pytest.raises(AdapterNotFound, match="'nobody'"):
        catalog.record_unload("nobody")


def test_where_content_was_found_is_no_load(catalog: Catalog) -> None:
    catalog.record_load("poet", A, source="file:///x", path="a", signature="s", weight=3)
    catalog.record_load("poet", B, source="file:///x", path="a", signature="s", weight=3)
    catalog.set_origin("poet", "file:///y", "b", "t")
    assert catalog.get("poet") == NameRecord(
        "poet", B, 2, "file:///y", "b", "t", 3, False, 1001.0, B
    )
    assert catalog.history("poet") == [(A, 1, 1000.0)]
    with pytest.raises(AdapterNotFound, match="'nobody'"):
        catalog.set_origin("nobody", None, "", "")
    with pytest.raises(InvalidRequest, match="UTF-8"):
        catalog.set_origin("poet", None, "\ud800", "")


def test_odd_texts(catalog: Catalog) -> None:
    name = "it's\0\"; DROP TABLE names; --\N{SNOWMAN}"
    catalog.record_load(name, A, source=name, path=name, signature=name)
    record = catalog.get(name)
    assert record is not None
    assert record[0] == record.source == record.path == record.signature == name
    with pytest.raises(InvalidRequest, match="cannot be stored as UTF-8"):
        catalog.record_load("bytes", A, path="\udcff")
    assert catalog.get("bytes") is None
    assert catalog.record_unload(name) == {A}


def test_numbers_are_not_used_again(tmp_path: Path) -> None:
    for expected in range(1, 5):
        with Catalog(tmp_path / CATALOG) as catalog:
            assert catalog.created == (expected == 1)
            assert catalog.record_load("poet", A).sequence == expected
            catalog.record_unload("poet")


def test_a_shorter_history_is_cut_at_opening(tmp_path: Path) -> None:
    with Catalog(tmp_path / CATALOG, history=3) as catalog:
        for name in ("one", "two"):
            for content in (A, B, C, D):
                catalog.record_load(name, content)
    with Catalog(tmp_path / CATALOG, history=1) as catalog:
        assert [version.digest for version in catalog.history("one")] == [C]
        assert [version.digest for version in catalog.history("two")] == [C]
        assert catalog.referenced() == {C, D}
    with Catalog(tmp_path / CATALOG, history=0) as catalog:
        assert catalog.record_load("one", A) == Recorded(9, frozenset())
        assert catalog.record_load("two", A) == Recorded(10, frozenset({D}))


def test_threads_take_turns(catalog: Catalog) -> None:
    sequences: list[int] = []

    def work(name: str) -> None:
        sequences.extend(catalog.record_load(name, content).sequence for content in (A, B, C))

    threads = [threading.Thread(target=work, args=(f"name{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sequences) == list(range(1, 13))
    assert [record.digest for record in catalog.names()] == [C] * 4


NAMES = st.sampled_from(["a", "b", "c"])
OPERATIONS = st.one_of(
    st.tuples(st.just("load"), NAMES, st.integers(0, 4)),
    st.tuples(st.just("unload"), NAMES, st.just(0)),
    st.tuples(st.just("roll back"), NAMES, st.integers(0, 3)),
    st.tuples(st.just("reopen"), NAMES, st.just(0)),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(history=st.integers(0, 3), operations=st.lists(OPERATIONS, max_size=30))
def test_any_operations_do_what_the_model_says(
    history: int, operations: list[tuple[str, str, int]]
) -> None:
    with quick_directory() as directory:
        model, sequence = Model(history), 0
        catalog = Catalog(directory / CATALOG, history)
        for kind, name, number in operations:
            before = model.referenced()
            left: frozenset[str] = frozenset()
            versions = model.names.get(name, [])
            if kind == "load":
                sequence += 1
                model.load(name, digest(number), sequence)
                recorded = catalog.record_load(name, digest(number))
                assert recorded.sequence == sequence
                left = recorded.unreferenced
            elif kind == "reopen":
                catalog.close()
                catalog = Catalog(directory / CATALOG, history)
            elif not versions:
                with pytest.raises(AdapterNotFound):
                    (catalog.record_unload if kind == "unload" else catalog.roll_back)(name)
            elif kind == "unload":
                model.unload(name)
                left = catalog.record_unload(name)
            elif not 0 < max(number, 1) < len(versions):
                with pytest.raises(AdapterConflict):
                    catalog.roll_back(name, digest(9) if number else None)
            else:
                sequence += 1
                to = versions[number][0] if number else None
                model.roll_back(name, sequence, max(number, 1))
                assert catalog.roll_back(name, to).sequence == sequence
            assert contents_of(catalog) == model.names
            assert catalog.referenced() == model.referenced()
            assert left == before - model.referenced()
        catalog.close()


def test_what_was_unloaded_is_remembered_until_it_is_loaded_again(tmp_path: Path) -> None:
    with Catalog(tmp_path / "catalog.db") as catalog:
        catalog.record_load("own", A, source="s3://b", path="own", signature="1")
        catalog.record_load("alias", B, source="s3://b", path="other", signature="2")
        catalog.record_load("uploaded", C)
        for name in ("own", "alias", "uploaded"):
            catalog.record_unload(name)
        assert {each.name: each[1:] for each in catalog.unloaded()} == {
            "own": ("s3://b", "1", A),
            "alias": ("s3://b", None, None),
            "uploaded": (None, None, None),
        }
        catalog.set_unloaded("alias", "s3://b", "3")
        catalog.record_load("own", A, source="s3://b", path="own", signature="4")
    with Catalog(tmp_path / "catalog.db") as catalog:
        unloaded = {each.name: each[1:] for each in catalog.unloaded()}
        assert unloaded == {"alias": ("s3://b", "3", None), "uploaded": (None, None, None)}


def test_what_a_name_was_rolled_back_from_is_turned_down(catalog: Catalog) -> None:
    for content in (A, B):
        catalog.record_load("poet", content, source="s3://b", path="poet", signature="1")
        assert not catalog.turns_down("poet", content, "s3://b", "2")
    catalog.roll_back("poet")
    assert not catalog.turns_down("poet", A, "s3://b", "2")
    assert not catalog.turns_down("poet", C, "s3://b", "2")
    assert catalog.turns_down("poet", B, "s3://b", "2")
    record = catalog.get("poet")
    assert record is not None
    assert (record.digest, record.signature, record.fetched) == (A, "2", B)
    catalog.set_origin("poet", "s3://b", "poet", "3")
    assert not catalog.turns_down("poet", B, "s3://b", "4"), "the source had other content"


def test_what_was_unloaded_is_turned_down(catalog: Catalog) -> None:
    catalog.record_load("poet", A, source="s3://b", path="poet", signature="1")
    catalog.record_unload("poet")
    assert not catalog.turns_down("poet", B, "s3://b", "2")
    assert catalog.turns_down("poet", A, "s3://b", "2")
    assert catalog.unloaded() == [("poet", "s3://b", "2", A)]
    assert not catalog.turns_down("pilot", A, "s3://b", "2")
