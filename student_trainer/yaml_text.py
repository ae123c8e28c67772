"""YAML as people and programs write it today: PyYAML reads that of 2005, where 1e-6 is text and = is no value."""

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_implicit_resolver(  # YAML 1.2, 10.3.2; whole numbers are found before
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:value", yaml.SafeLoader.construct_yaml_str)


def read_yaml(text: str) -> Any:
    """The value that `text` stands for. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)
