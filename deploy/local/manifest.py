"""Adapters in a bucket, and a manifest there that names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import yaml

from lorax_serve.sources import CONFIG_FILE, WEIGHTS_FILE

__all__ = ["BUCKET", "Manifest", "credentials", "push"]

BUCKET = "adapters"
_KEY = "adapters.yaml"


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
    with closing(_client(endpoint)) as client:
        client.create_bucket(Bucket=BUCKET)
        for name, directory in adapters.items():
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                client.put_object(
                    Bucket=BUCKET, Key=f"all/{name}/{file}", Body=(directory / file).read_bytes()
                )


class Manifest:
    """The list of adapters, in the bucket beside them.

    Args:
        endpoint: of the bucket.

    Attributes:
        uri: where replicas read it.
    """

    uri = f"s3://{BUCKET}/{_KEY}"

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    def write(self, adapters: Iterable[Mapping[str, Any]]) -> None:
        """Let these entries be the manifest."""
        text = yaml.safe_dump({"adapters": [*map(dict, adapters)]})
        with closing(_client(self._endpoint)) as client:
            client.put_object(Bucket=BUCKET, Key=_KEY, Body=text.encode())


def _client(endpoint: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="local",
        aws_secret_access_key="local",
    )
