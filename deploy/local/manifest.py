"""Adapters in a bucket, and a manifest that names them, swapped as Kubernetes swaps a ConfigMap."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import boto3
import yaml

from lorax_serve.sources import CONFIG_FILE, WEIGHTS_FILE

__all__ = ["BUCKET", "ManifestFile", "credentials", "push"]

BUCKET = "adapters"


def credentials(endpoint: str) -> dict[str, str]:
    """The environment in which clients find the bucket."""
    return {
        "AWS_ACCESS_KEY_ID": "local",
        "AWS_SECRET_ACCESS_KEY": "local",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL_S3": endpoint,
    }


def push(endpoint: str, adapters: Mapping[str, Path]) -> None:
    """Put adapters, by name, into the bucket, which is made if need be."""
    client: Any = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="local",
        aws_secret_access_key="local",
    )
    client.create_bucket(Bucket=BUCKET)
    for name, directory in adapters.items():
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            client.put_object(
                Bucket=BUCKET, Key=f"all/{name}/{file}", Body=(directory / file).read_bytes()
            )
    client.close()


class ManifestFile:
    """A file that is replaced as a mounted ConfigMap's is: by way of the link ``..data``.

    Args:
        directory: of the mount.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "adapters.yaml"
        self._directory = directory
        self._versions = itertools.count(1)
        directory.mkdir()
        self.path.symlink_to("..data/adapters.yaml")

    def write(self, adapters: Iterable[Mapping[str, Any]]) -> None:
        """Let these entries be the manifest."""
        version = self._directory / f"..{next(self._versions)}"
        version.mkdir()
        (version / "adapters.yaml").write_text(yaml.safe_dump({"adapters": [*map(dict, adapters)]}))
        link = self._directory / "..new"
        link.symlink_to(version.name)
        os.replace(link, self._directory / "..data")
