"""Compares tests/deploy/chart/custom_kinds.yaml with the definitions of a release of the projects that own the kinds.

Usage: scripts/compare_custom_kinds.py CRD.yaml ...
Prints what a file of CustomResourceDefinitions does not have, has with another type, or asks for and we do not; ends
with 1 if there is any of it.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

OURS = Path(__file__).parents[1] / "tests/deploy/chart/custom_kinds.yaml"
PLAIN = ("string", "integer", "boolean")


def differences(path: str, ours: Any, theirs: dict[str, Any]) -> list[str]:
    """Where `ours`, in the notation of the file, would take what `theirs`, a schema, does not."""
    if isinstance(ours, str):
        return _of_a_value(path, ours, theirs)
    found = []
    known = theirs.get("properties", {})
    fields = {name.rstrip("*").removesuffix("[]"): name for name in ours}
    for field, name in fields.items():
        if field not in known:
            found.append(f"{path}.{field}: does not exist")
            continue
        schema = known[field]
        if ("[]" in name) != (schema.get("type") == "array"):
            found.append(f"{path}.{field}: is {schema.get('type')}")
            continue
        found += differences(f"{path}.{field}", ours[name], schema["items"] if "[]" in name else schema)
    missing = [field for field in theirs.get("required", []) if not fields.get(field, "").endswith("*")]
    return found + [f"{path}.{field}: has to be there" for field in missing]


def _of_a_value(path: str, ours: str, theirs: dict[str, Any]) -> list[str]:
    if ours.startswith("core "):  # theirs is a copy of it, of some version
        return []
    if ours == "quantity":
        return [] if "anyOf" in theirs else [f"{path}: is {theirs.get('type')}"]
    if ours in PLAIN:
        return [] if theirs.get("type") == ours else [f"{path}: is {theirs.get('type')}"]
    if ours == "labels":
        more = theirs.get("additionalProperties")
        return [] if isinstance(more, dict) and more.get("type") == "string" else [f"{path}: is no map of strings"]
    unknown = set(ours.split("|")) - set(theirs.get("enum", ours.split("|")))
    return [f"{path}: {', '.join(sorted(unknown))} not allowed"] if unknown else []


def main(paths: list[str]) -> int:
    ours = yaml.safe_load(OURS.read_text())
    found, seen = [], set()
    for path in paths:
        for definition in yaml.safe_load_all(Path(path).read_text()):
            if not definition or definition.get("kind") != "CustomResourceDefinition":
                continue
            spec = definition["spec"]
            for version in spec["versions"]:
                kind = f"{spec['group']}/{version['name']} {spec['names']['kind']}"
                if kind in ours:
                    seen.add(kind)
                    theirs = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
                    found += differences(kind, ours[kind], theirs)
    print("\n".join(found or ["no difference"]))
    print(f"compared: {', '.join(sorted(seen)) or 'nothing'}; not compared: {', '.join(sorted(set(ours) - seen))}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
