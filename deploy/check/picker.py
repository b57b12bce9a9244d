"""Whether llm-d's router takes the configuration of its endpoint picker.

No package has its schema. What is known here is what of it we use, by the source of llm-d-router:
``apix/config/v1alpha1``, the plugins that ``cmd/epp/runner/runner.go`` registers, and the
parameters in their factories. What it knows beside these is to be added when we use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deploy.check.custom import errors

__all__ = ["problems"]


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(required),
        "properties": required | (optional or {}),
        "additionalProperties": False,
    }


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


_TEXT = {"type": "string", "minLength": 1}
_REFERENCE = _object({"pluginRef": _TEXT})
_NOTHING = _object({})
_ENGINE = _object(
    {"name": _TEXT},
    dict.fromkeys(("queuedRequestsSpec", "runningRequestsSpec", "kvUsageSpec", "loraSpec"), _TEXT),
)
_PLUGINS: dict[str, tuple[str, dict[str, Any]]] = {
    "passthrough-parser": ("parser", _NOTHING),
    "queue-scorer": ("scheduling", _NOTHING),
    "kv-cache-utilization-scorer": ("scheduling", _NOTHING),
    "active-request-scorer": ("scheduling", _NOTHING),
    "lora-affinity-scorer": ("scheduling", _NOTHING),
    "max-score-picker": ("scheduling", _NOTHING),
    "single-profile-handler": ("handler", _NOTHING),
    "metrics-data-source": (
        "source",
        _object(
            {},
            {
                "scheme": {"enum": ["http", "https"]},
                "path": _TEXT,
                "port": {"type": "integer", "minimum": 1, "maximum": 65535},
            },
        ),
    ),
    "core-metrics-extractor": (
        "extractor",
        _object(
            {},
            {"engineLabelKey": _TEXT, "defaultEngine": _TEXT, "engineConfigs": _list(_ENGINE)},
        ),
    ),
}
"""What each plugin is for, and the schema of its parameters."""

_CONFIG = _object(
    {
        "apiVersion": {"enum": ["llm-d.ai/v1alpha1"]},
        "kind": {"enum": ["EndpointPickerConfig"]},
        "plugins": _list(
            _object(
                {"type": {"enum": list(_PLUGINS)}},
                {"name": _TEXT, "parameters": {"type": "object"}},
            )
        ),
        "schedulingProfiles": _list(
            _object(
                {
                    "name": _TEXT,
                    "plugins": _list(
                        _object({"pluginRef": _TEXT}, {"weight": {"type": "number", "minimum": 0}})
                    ),
                }
            )
        ),
    },
    {
        "requestHandler": _object({"parsers": _list(_REFERENCE)}),
        "dataLayer": _object(
            {"sources": _list(_object({"pluginRef": _TEXT, "extractors": _list(_REFERENCE)}))}
        ),
    },
)


def problems(config: Any) -> list[str]:
    """What is wrong with an ``EndpointPickerConfig``."""
    wrong = list(errors(config, _CONFIG))
    return [f"EndpointPickerConfig: {each}" for each in wrong or _plugins(config)]


def _plugins(config: Any) -> Iterator[str]:
    """Parameters that a plugin does not take, and references to none or to one of another use."""
    uses: dict[str, str] = {}
    for plugin in config["plugins"]:
        name = plugin.get("name", plugin["type"])
        if name in uses:
            yield f"plugins: {name} is there twice"
        uses[name], schema = _PLUGINS[plugin["type"]]
        parameters = plugin.get("parameters", {})
        yield from (f"{name}.{error}" for error in errors(parameters, schema))
        engines = [each["name"] for each in parameters.get("engineConfigs", ()) if "name" in each]
        # vllm is built in, as others are that we have no use for.
        if parameters.get("defaultEngine", "vllm") not in ("vllm", *engines):
            yield f"{name}.defaultEngine: {parameters['defaultEngine']} is not in engineConfigs"
    for use, name in _references(config):
        if uses.get(name) != use:
            yield f"{name} is no {use} plugin in plugins"


def _references(config: Any) -> Iterator[tuple[str, str]]:
    """The use and the name of each plugin that is referred to."""
    for profile in config["schedulingProfiles"]:
        yield from (("scheduling", each["pluginRef"]) for each in profile["plugins"])
    for parser in config.get("requestHandler", {}).get("parsers", ()):
        yield "parser", parser["pluginRef"]
    for source in config.get("dataLayer", {}).get("sources", ()):
        yield "source", source["pluginRef"]
        yield from (("extractor", each["pluginRef"]) for each in source["extractors"])
