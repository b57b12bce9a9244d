"""What a manifest says, and what is told of one that cannot be read."""

from __future__ import annotations

import importlib.util
import sys
import weakref
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import pytest
import yaml

from lorax_serve.errors import InvalidRequest
from lorax_serve.registry import manifest
from lorax_serve.registry.manifest import Entry, Manifest, parse_manifest

DIGEST = "0123456789abcdef" * 4
WHERE = "s3://bucket/adapters.yaml"


def parsed(text: str) -> Manifest:
    return parse_manifest(text.encode(), WHERE)


@pytest.fixture(params=["libyaml", "plain"])
def parse(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``parse_manifest`` with libyaml, and as it is where PyYAML was built without."""
    if request.param == "libyaml":
        if not yaml.__with_libyaml__:
            pytest.skip("PyYAML was built without libyaml")
        return parse_manifest
    monkeypatch.setattr(yaml, "__with_libyaml__", False)
    assert manifest.__file__ is not None
    spec = importlib.util.spec_from_file_location("plain_manifest", manifest.__file__)
    assert spec is not None
    assert spec.loader is not None
    plain = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, plain)
    spec.loader.exec_module(plain)
    assert not issubclass(plain._Loader, yaml.CSafeLoader)
    found: Callable[..., Any] = plain.parse_manifest
    return found


def test_both_parsers_say_the_same(parse: Callable[..., Any]) -> None:
    text = f"""
adapters:  # déjà vu
- &x {{name: poet, source: 's3://b/p', digest: {DIGEST}, weight: 2, pinned: yes}}
- name: pilot
  source: !!str 7
  weight: 0x10
- {{<<: {{name: merged}}, source: "\u00e9"}}
- !!set {{name, source}}
- poet
- [{{name: [deep, {{er: 2001-01-01}}]}}]
"""
    found = parse(text.encode(), WHERE)
    assert {name: astuple(entry) for name, entry in found.entries.items()} == {
        "poet": ("poet", "s3://b/p", DIGEST, 2, True),
        "pilot": ("pilot", "7", None, 16, False),
        "merged": ("merged", "é", None, 1, False),
    }
    assert [str(error).partition(": must")[2] for error in found.broken.values()] == [
        f" have the keys name and source, not be {what}"
        for what in ("a value of type set", "a text", "a list")
    ]


def test_entries() -> None:
    found = parsed(
        f"""
adapters:
  - name: poet
    source: s3://bucket/prefix/poet
    digest: sha256:{DIGEST}
    weight: 2
    pinned: true
  - {{name: pilot, source: pilot}}
"""
    )
    assert found == (
        {
            "poet": Entry("poet", "s3://bucket/prefix/poet", DIGEST, 2, True),
            "pilot": Entry("pilot", "pilot"),
        },
        {},
        True,
    )
    assert parsed("adapters: []").names == set()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have the key adapters"),
        ("[]", "must have the key adapters"),
        ("adapter: []", "must have the key adapters"),
        ("adapters: []\nmodels: []", "unknown key 'models'"),
        ("adapters: {poet: s3://b}", "adapters must be a list .* not a mapping"),
        ("adapters:", "adapters must be a list .* not nothing"),
        ("adapters: []\nadapters: []", "line 2: adapters is there twice"),
        ("adapters: [{name: a, name: b}]", "line 1: name is there twice"),
        ("adapters: [\n", "line 2: not valid YAML"),
        ("adapters: [\x07]", "not valid YAML"),
        ("adapters: &a [*a]", r"line 1: not valid YAML: \*a is an alias"),
        ("adapters: []\n<<: *a", r"line 2: not valid YAML: \*a is an alias"),
        ("adapters: " + 33 * "[", "line 1: not valid YAML: .* nested more than 32 deep"),
        ("adapters: " + 2000 * "[", "line 1: not valid YAML: .*nest"),
        ("adapters: []\n---\nadapters: []", "line 2: not valid YAML: but found another document"),
        # Ten times as many at each level: more than there is memory for.
        (
            "a: &a0 [x]\n" + "".join(f"b{n}: &a{n + 1} [{10 * f'*a{n}, '}]\n" for n in range(20)),
            r"line 2: not valid YAML: \*a0 is an alias",
        ),
        ("adapters: !!python/object:os.system []", "not valid YAML"),
    ],
)
def test_what_means_nothing_as_a_whole(text: str, message: str, parse: Callable[..., Any]) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        parse(text.encode(), WHERE)
    assert str(caught.value).startswith(f"manifest {WHERE}")


@pytest.mark.parametrize(
    ("entry", "name", "message"),
    [
        ("poet", None, "must have the keys name and source, not be a text"),
        ("{source: poet}", None, "name is missing"),
        ("{name: 7, source: poet}", None, "name must be text, found a value of type int"),
        ("{name: po/et, source: poet}", None, "name 'po/et' is not valid"),
        ("{name: poet}", "poet", "source is missing"),
        ("{name: poet, source: [a]}", "poet", "source must be text, found a list"),
        ("{name: poet, source: ''}", "poet", "source must be text"),
        ("{name: poet, source: poet, wieght: 2}", "poet", "unknown key 'wieght'; there are name"),
        ("{name: poet, source: poet, weight: 0}", "poet", r"weight must be .* \[1, 100\], found 0"),
        ("{name: poet, source: poet, weight: true}", "poet", "weight must be a whole number"),
        ("{name: poet, source: poet, weight: 1.5}", "poet", "found 1.5"),
        ("{name: poet, source: poet, pinned: 1}", "poet", "pinned must be true or false"),
        ("{name: poet, source: poet, digest: md5:1}", "poet", "digest must be sha256:"),
    ],
)
def test_one_broken_entry_is_told_of_and_the_others_count(
    entry: str, name: str | None, message: str
) -> None:
    found = parsed(f"adapters:\n- {{name: pilot, source: pilot}}\n- {entry}\n")
    assert found.entries == {"pilot": Entry("pilot", "pilot")}
    ((key, error),) = found.broken.items()
    assert key == (name or "adapters[1]")
    assert found.all_named == (name is not None)
    with pytest.raises(InvalidRequest, match=message):
        raise error
    assert f"manifest {WHERE}: adapters[1]" in str(error)


def test_a_name_that_is_there_twice_is_neither() -> None:
    found = parsed("adapters: [{name: a, source: a}, {name: b, source: b}, {name: a, source: c}]")
    assert found.entries.keys() == {"b"}
    assert "is there twice" in str(found.broken["a"])
    assert found.all_named


def test_the_nodes_of_entries_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a long manifest stop the process for as long as the garbage collector walks them."""
    made: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0
    init = yaml.MappingNode.__init__

    def counting(node: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal most
        init(node, *args, **kwargs)
        made.add(node)
        most = max(most, len(made))

    monkeypatch.setattr(yaml.MappingNode, "__init__", counting)
    entries = "".join(f"\n- {{name: a{n}, source: a}}" for n in range(1000))
    assert len(parsed("adapters:" + entries).entries) == 1000
    assert 2 <= most < 10
