"""Whether objects are what Kubernetes and the operators of custom ones take: no field unknown."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule, ServiceMonitor
from pydantic import BaseModel, ValidationError

from deploy.check import custom

__all__ = ["KUBERNETES", "problems"]

KUBERNETES = ("1.32", "1.37")
"""The minor versions that objects are checked against."""

_CUSTOM: dict[str, type[BaseModel]] = {
    "ScaledObject": ScaledObject,
    "PodMonitor": PodMonitor,
    "ServiceMonitor": ServiceMonitor,
    "PrometheusRule": PrometheusRule,
}


def problems(found: Any, version: str) -> list[str]:
    """What is wrong with an object; of custom ones, metadata and pods are Kubernetes's."""
    kind = found["kind"]
    if f"{found['apiVersion']}/{kind}" in custom.KINDS:
        parts = [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": found["metadata"]}]
        if kind == "PyTorchJob":
            parts += map(_pod, found["spec"]["pytorchReplicaSpecs"].values())
        return [*custom.problems(found), *(p for part in parts for p in problems(part, version))]
    if kind in _CUSTOM:
        return _custom(found, _CUSTOM[kind])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kubernetes_validate.validate(found, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{kind}: {'.'.join(str(part) for part in error.path)}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"{kind}: Kubernetes {version} has no {found['apiVersion']}"]
    return []


def _pod(replica: Any) -> Any:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "pod"},
        **replica["template"],
    }


def _custom(found: Any, model: type[BaseModel]) -> list[str]:
    try:
        known = model.model_validate(found)
    except ValidationError as error:
        return [f"{found['kind']}: {line}" for line in str(error).splitlines()]
    read = known.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return [f"{found['kind']}: {path} is unknown" for path in _lost(found, read, "")]


def _lost(given: Any, read: Any, path: str) -> Iterator[str]:
    """The fields of ``given`` that the model has dropped."""
    if isinstance(given, dict) and isinstance(read, dict):
        for key, value in given.items():
            if key not in read:
                yield f"{path}.{key}"
            else:
                yield from _lost(value, read[key], f"{path}.{key}")
    elif isinstance(given, list) and isinstance(read, list):
        for index, (one, other) in enumerate(zip(given, read, strict=True)):
            yield from _lost(one, other, f"{path}[{index}]")
