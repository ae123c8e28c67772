import pytest
import yaml

from student_trainer.yaml_text import read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-06", 1e-06),
        ("1E3", 1000.0),
        ("-2e+5", -2e5),
        (".5e1", 5.0),
        ("1.5e-7", 1.5e-7),
        ("12", 12),
        ("1.0e-6", 1e-6),
        ('"1e-06"', "1e-06"),
        ("=", "="),
        ("e5", "e5"),
        ("1e", "1e"),
        ("0x1e5", 0x1E5),
        ("3000000", 3_000_000),
        ("{a: [1e-3, x1e-3]}", {"a": [1e-3, "x1e-3"]}),
    ],
)
def test_numbers_are_numbers_and_text_is_text(text: str, value: object) -> None:
    found = read_yaml(text)
    assert (found, type(found)) == (value, type(value))


def test_nothing_but_values_is_made() -> None:
    with pytest.raises(yaml.YAMLError):
        read_yaml("!!python/object/apply:os.getcwd []")
