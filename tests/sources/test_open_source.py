"""From a URI to a source, and what a URI must not be."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorax_serve.errors import InvalidRequest
from lorax_serve.sources import open_object, open_source
from tests.sources.fetching import ADAPTER, fetched, write_adapter


@pytest.mark.parametrize(
    ("uri", "normalised"),
    [
        ("/data/adapters/", "file:///data/adapters"),
        ("file:///data/adapters/", "file:///data/adapters"),
        ("file://localhost/data", "file:///data"),
        ("FILE:///data/a%20b", "file:///data/a%20b"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("hf://org/", "hf://org"),
        ("hf://org/repo", "hf://org/repo"),
        ("hf://org/repo@v1/a/b/", "hf://org/repo@v1/a/b"),
        ("hf://org/repo@refs%2Fpr%2F1", "hf://org/repo@refs%2Fpr%2F1"),
    ],
)
def test_uris_are_normalised(uri: str, normalised: str) -> None:
    source = open_source(uri)
    assert source.uri == normalised
    assert open_source(source.uri).uri == normalised


@pytest.mark.parametrize("name", ["plain", "a b", "ü", "50%25", "a?b#c"])
def test_directories_by_name_and_by_uri(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    write_adapter(root / "poet")
    for number, uri in enumerate((str(root), root.as_uri())):
        assert fetched(open_source(uri), "poet", tmp_path / str(number))[0] == ADAPTER


def test_home_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_source("~/adapters").uri == f"{tmp_path.as_uri()}/adapters"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:hunter2@bucket/a",
        "S3://hunter2@bucket",
        "hf://user:hunter2@org/repo",
        "file://user:hunter2@host/data",
        "https://user:hunter2@host/data",
        "s3://bucket/a?X-Amz-Signature=hunter2",
        "hf://org/repo#hunter2",
    ],
)
def test_credentials_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        open_source(uri)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "names nothing"),
        ("a\0b", "names nothing"),
        ("gs://bucket", "unknown scheme"),
        ("http://host/a", "unknown scheme"),
        ("file://data/adapters", "names the host 'data'"),
        ("s3://", "'' is no bucket"),
        ("s3:///prefix", "'' is no bucket"),
        ("s3://buck et", "'buck et' is no bucket"),
        ("s3://bucket/a//b", "leads outside s3://bucket"),
        ("s3://bucket/../other", "leads outside s3://bucket"),
        ("hf://", "is malformed"),
        ("hf://-org", "is malformed"),
        ("hf://org/repo@", "is malformed"),
        ("hf://org/@v1", "is malformed"),
        ("hf://org/repo/../other", "leads outside hf://org"),
    ],
)
def test_malformed_uris(uri: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        open_source(uri)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("https://bucket.example/a.yaml?X-Amz-Signature=hunter2", "manifest https://...: is read"),
        ("hf://org/repo/a.yaml", "give --manifest PATH or --manifest s3://bucket/path"),
        ("file:///a.yaml", "manifest file://...: is read from a file or a bucket only"),
        ("s3://hunter2@bucket/a.yaml", "credentials do not belong into a URI"),
        ("s3://bucket/a.yaml?versionId=hunter2", "'?' and '#' mean nothing"),
        ("s3://", "manifest s3://: '' is no bucket"),
        ("s3://bucket", "manifest s3://bucket: names no file in the bucket"),
        ("s3://bucket/", "names no file in the bucket"),
        ("s3://bucket/a/", "names no file in the bucket"),
        ("s3://bucket/../a.yaml", "manifest s3://bucket/../a.yaml: path '../a.yaml' leads outside"),
    ],
)
def test_what_is_no_object(uri: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)) as caught:
        open_object(uri, "manifest")
    assert "hunter2" not in str(caught.value)


def test_an_object() -> None:
    assert open_object("S3://bucket/a/b.yaml", "manifest").uri == "s3://bucket/a/b.yaml"


@pytest.mark.parametrize("missing", ["boto3", "botocore"])
def test_without_boto3(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for module in ("s3", "s3_client", "s3_object"):
        monkeypatch.delitem(sys.modules, f"lorax_serve.sources.{module}", raising=False)
    message = rf"s3://bucket/a: needs {missing}.*; run pip install 'lorax-serve\[s3\]'"
    with pytest.raises(InvalidRequest, match=f"source {message}"):
        open_source("s3://bucket/a")
    with pytest.raises(InvalidRequest, match=f"manifest {message}"):
        open_object("s3://bucket/a", "manifest")


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    script = (
        "import sys, lorax_serve.sources as sources\n"
        "sources.open_source('/data')\n"
        "assert not {'torch', 'boto3', 'huggingface_hub'} & set(sys.modules)\n"
        "sources.open_source('s3://bucket'), sources.open_source('hf://org')\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
