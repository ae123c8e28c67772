"""Where weights come from; the download of the init container is run for real."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.rendering import (
    container_of,
    environment_of,
    of_kind,
    pod,
    render,
    volume,
)
from tests.deploy.value_sets import ALL, COMMIT, MINIMAL, example

Object = dict[str, Any]


def test_weights_of_a_volume_are_mounted_and_never_written() -> None:
    assert volume(MINIMAL, "models")["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    assert "initContainers" not in pod(MINIMAL)


def test_weights_from_the_hub_are_kept_in_the_cache_or_with_the_pod() -> None:
    assert volume(ALL["from the hub"], "models")["emptyDir"] == {}
    assert volume(ALL["a cache that is there"], "models")["persistentVolumeClaim"] == {"claimName": "weights"}
    assert volume(ALL["a cache that is made"], "models")["persistentVolumeClaim"] == {"claimName": "pool-models"}


def test_the_cache_outlives_the_release() -> None:
    claim = of_kind(render(ALL["a cache that is made"]), "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert claim["spec"] == {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Ti"}}}
    assert of_kind(render(example("pool")), "PersistentVolumeClaim")["spec"]["storageClassName"] == "shared"


def test_the_server_cannot_write_what_was_downloaded() -> None:
    deployment = of_kind(render(ALL["from the hub"]), "Deployment")
    for name, writes in (("download", True), ("teacher", False)):
        mounts = container_of(deployment, name)["volumeMounts"]
        (models,) = [each for each in mounts if each["name"] == "models"]
        assert models.get("readOnly", False) is not writes


def test_the_token_of_the_hub_is_a_file_for_the_download_alone() -> None:
    deployment = of_kind(render(ALL["from the hub, with a token"]), "Deployment")
    container = container_of(deployment, "download")
    path = environment_of(container)["HF_TOKEN_PATH"]
    assert {"name": "hub", "mountPath": str(Path(path).parent), "readOnly": True} in container["volumeMounts"]
    secret = volume(ALL["from the hub, with a token"], "hub")["secret"]
    assert (secret["secretName"], secret["optional"]) == ("hub", True)
    assert "hub" not in [each["name"] for each in container_of(deployment, "teacher")["volumeMounts"]]


HUB_PROGRAM = """#!/bin/sh
# Stands in for the hub's program, which writes beside and renames, as the real one does.
echo "$@" >> "$CALLS"
test "$1" = download && test "$3" = --revision && test "$5" = --local-dir || exit 64
mkdir -p "$6"
test -z "$SLOW" || sleep "$SLOW"
echo weights of "$2" at "$4" > "$6/part.$$" && mv "$6/part.$$" "$6/model.safetensors"
exit "${ENDS_WITH:-0}"
"""


@pytest.fixture
def download(tmp_path: Path) -> Any:
    """Starts the command of the init container with a hub's program that is ours."""
    container = container_of(of_kind(render(ALL["from the hub"]), "Deployment"), "download")
    program = tmp_path / "bin/hf"
    program.parent.mkdir()
    program.write_text(HUB_PROGRAM)
    program.chmod(0o755)
    environment = environment_of(container)
    environment["DIRECTORY"] = str(tmp_path / environment["DIRECTORY"].lstrip("/"))
    calls = tmp_path / "calls"
    calls.touch()

    def start(**more: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            container["command"] + container["args"],
            env={"PATH": f"{program.parent}:{os.environ['PATH']}", "CALLS": str(calls)} | environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start, Path(environment["DIRECTORY"]), calls


def test_weights_are_downloaded_once_at_the_commit(download: Any) -> None:
    start, directory, calls = download
    first = start()
    said = first.communicate()[0]
    assert first.returncode == 0
    assert COMMIT in said
    assert calls.read_text() == f"download Qwen/Qwen3-32B --revision {COMMIT} --local-dir {directory}\n"
    assert (directory / "model.safetensors").exists()
    assert start().wait() == 0
    assert len(calls.read_text().splitlines()) == 1


def test_a_download_that_fails_fails_the_pod_and_is_tried_again(download: Any) -> None:
    start, directory, calls = download
    assert start(ENDS_WITH="3").wait() != 0
    assert not (directory / ".complete").exists()
    assert start().wait() == 0
    assert len(calls.read_text().splitlines()) == 2
    assert (directory / ".complete").exists()


def test_pods_that_download_at_once_to_one_volume_all_get_whole_weights(download: Any) -> None:
    start, directory, _ = download
    pods = [start(SLOW=seconds) for seconds in ("0.1", "0.3", "0.2")]
    assert [each.wait() for each in pods] == [0, 0, 0]
    assert (directory / "model.safetensors").read_text() == f"weights of Qwen/Qwen3-32B at {COMMIT}\n"


def test_the_hubs_own_program_takes_these_arguments_and_fails_loudly_without_a_hub(download: Any) -> None:
    start, directory, _ = download
    programs = Path(sys.executable).parent
    assert (programs / "hf").exists()
    process = start(PATH=f"{programs}:{os.environ['PATH']}", HF_HUB_OFFLINE="1")
    said = process.communicate()[0]
    assert process.returncode != 0
    assert "offline" in said.lower(), said
    assert not (directory / ".complete").exists()
