"""Is an object what a Kubernetes API server of some version takes? Unknown kinds and unknown fields are faults.

Kubernetes' own kinds: the strict schemas of kubernetes-validate. Other projects' kinds: `chart/custom_kinds.yaml`, in
which pod templates and the like are those of Kubernetes again.
"""

import functools
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from kubernetes_validate.utils import major_minor, schema_contents
from referencing import Registry, Resource

OLDEST = "1.27"
NEWEST = major_minor(kubernetes_validate.latest_version())
CUSTOM_KINDS = Path(__file__).parent / "chart/custom_kinds.yaml"

_DEFINITIONS = "https://kubernetes.io/api/_definitions.json"
Schema = dict[str, Any]


def faults(found: dict[str, Any], kubernetes: str) -> list[str]:
    """Of one object, each with its place; none if it is good."""
    schema = _schema(found["apiVersion"], found["kind"], kubernetes)
    kind = f"{found['apiVersion']} {found['kind']}"
    if schema is None:
        return [f"{kind}: is not known to Kubernetes {kubernetes}"]
    validator = jsonschema.Draft202012Validator(schema, registry=_definitions(kubernetes))
    errors = validator.iter_errors(found)
    return [f"{kind} {found['metadata']['name']}: {error.json_path}: {error.message}" for error in errors]


@functools.cache
def _schema(api_version: str, kind: str, kubernetes: str) -> Schema | None:
    spec = yaml.safe_load(CUSTOM_KINDS.read_text()).get(f"{api_version} {kind}")
    if spec is not None:
        schema = _object({"apiVersion*": "string", "kind*": "string", "spec*": spec})
        metadata = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
        schema["properties"]["metadata"] = {"$ref": f"{_DEFINITIONS}#/$defs/{metadata}"}
        return schema
    group, _, version = api_version.rpartition("/")
    name = "-".join(part for part in (kind.lower(), group.partition(".")[0], version) if part)
    try:
        return _contents(name, kubernetes)
    except FileNotFoundError:
        return None


@functools.cache
def _definitions(kubernetes: str) -> Registry:
    return Registry().with_resource(_DEFINITIONS, Resource.from_contents(_contents("_definitions", kubernetes))).crawl()


def _contents(name: str, kubernetes: str) -> Schema:
    # The library's own `validate` reads a megabyte for every object, and only warns of kinds that it does not know.
    return schema_contents(f"kubernetes-json-schema/v{kubernetes}.0-local-strict/{name}.json", kubernetes)


def _object(fields: dict[str, Any]) -> Schema:
    properties, required = {}, []
    for name, what in fields.items():
        field = name.rstrip("*").removesuffix("[]")
        properties[field] = {"type": "array", "items": _value(what)} if "[]" in name else _value(what)
        if name.endswith("*"):
            required.append(field)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _value(what: Any) -> Schema:
    if isinstance(what, dict):
        return _object(what)
    if what.startswith("core "):
        return {"$ref": f"{_DEFINITIONS}#/$defs/{what.removeprefix('core ')}"}
    if what == "labels":
        return {"type": "object", "additionalProperties": {"type": "string"}}
    if what == "quantity":
        return {"type": ["integer", "string"]}
    if what in ("string", "integer", "boolean"):
        return {"type": what}
    return {"enum": what.split("|")}
