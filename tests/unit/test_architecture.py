"""Who may import whom. The arrows: teacher_server -> {stillhouse, lm_head} <- student_trainer."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import ROOT, child_environment

CONTRACT = ROOT / "proto" / "stillhouse"
LM_HEAD = ROOT / "lm_head"
TEACHER_SERVER = ROOT / "teacher_server"
STUDENT_TRAINER = ROOT / "student_trainer"


def imports_of(file: Path) -> set[str]:
    """Top-level packages that a file imports anywhere in it: in functions and for type checking too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively; name the package"
            found.add((node.module or "").partition(".")[0])
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(str(node.args[0].value).partition(".")[0])
    return found


def files(folder: Path) -> Iterator[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found, f"{folder} has no Python file: this test looks in the wrong place"
    return iter(found)


def importers(folder: Path, package: str) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files(folder) if package in imports_of(file)]


def outside_packages(folder: Path) -> set[str]:
    return set().union(*(imports_of(file) for file in files(folder))) - set(sys.stdlib_module_names)


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import os.path\nfrom b.c import d\ndef f():\n    import e as g\n    from h import i\n"
        "    import_module('j.k')\n    importlib.import_module('l')\n"
        "if TYPE_CHECKING:\n    import m\n# import n\n'import o'\n"
    )
    assert imports_of(tmp_path / "a.py") == {"os", "b", "e", "h", "j", "l", "m"}


def test_the_two_programs_never_import_each_other() -> None:
    assert importers(TEACHER_SERVER, "student_trainer") == []
    assert importers(STUDENT_TRAINER, "teacher_server") == []


def test_the_contract_needs_numpy_and_grpc_only() -> None:
    assert outside_packages(CONTRACT) - {"obstore"} == {"stillhouse", "numpy", "grpc", "grpc_status", "google"}
    # The bucket's library is imported when a bucket is asked for, and by one file.
    assert importers(CONTRACT, "obstore") == ["proto/stillhouse/archive_stores.py"]


def test_the_head_needs_torch_and_the_contract_only() -> None:
    assert outside_packages(LM_HEAD) <= {"torch", "transformers", "stillhouse", "lm_head"}


def test_nothing_that_is_installed_imports_tests_benchmarks_or_examples() -> None:
    for folder in (CONTRACT, LM_HEAD, TEACHER_SERVER, STUDENT_TRAINER):
        assert not outside_packages(folder) & {"tests", "benchmarks", "examples"}


@pytest.mark.parametrize("program", [TEACHER_SERVER, STUDENT_TRAINER])
def test_vllm_is_imported_by_at_most_one_file_of_a_program(program: Path) -> None:
    assert len(importers(program, "vllm")) <= 1
    assert importers(CONTRACT, "vllm") == importers(LM_HEAD, "vllm") == []


def test_the_source_root_is_no_package() -> None:
    # It would hide Google's package `proto`.
    assert not (ROOT / "proto" / "__init__.py").exists()


@pytest.mark.parametrize("module", ["archive", "client", "codec", "errors", "vocabulary", "v1.teacher_pb2_grpc"])
def test_importing_the_contract_loads_no_framework(module: str) -> None:
    heavy = ["obstore", "torch", "transformers", "vllm", "pydantic", "teacher_server", "student_trainer", "lm_head"]
    program = f"import sys, stillhouse.{module}\nprint([name for name in {heavy} if name in sys.modules])"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ended.stdout == "[]\n"
