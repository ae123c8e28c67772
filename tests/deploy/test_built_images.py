"""The CPU images, built by podman as anybody would build them, and run as Kubernetes would run them.

`make image-test` runs this: it sets STILLHOUSE_IMAGES to the images to build. It needs root, and takes five to
fifteen minutes, 10 GB below the temporary directory and Debian's and Python's package archives. Afterwards nothing is
left of it. STILLHOUSE_IMAGE_STORE=DIRECTORY keeps what was built there for the next time.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stillhouse.client import Scores, TeacherClient
from tests.deploy.container_engine import RESTRICTED, Engine, build, debian, pip_configuration
from tests.servers import ROOT, serving

WANTED = os.environ.get("STILLHOUSE_IMAGES", "").split()
pytestmark = [
    pytest.mark.skipif(not WANTED, reason="`make image-test` builds images"),
    pytest.mark.timeout(3600),
]
MODELS = ROOT / "examples" / "chain_sum" / "models"
EXAMPLE = ROOT / "examples" / "chain_sum" / "chain_sum.yaml"
TEACHERS = [name for name in WANTED if name.startswith("teacher")]
BUILT = {name: f"localhost/stillhouse/{name}:test" for name in WANTED}
READY_S, DRAIN_S = 120, 20


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    missing = [tool for tool in ("podman", "runc", "debootstrap") if not shutil.which(tool)]
    if missing or os.geteuid():
        pytest.skip(f"needs root and {', '.join(missing)}: scripts/install_image_tools.sh")
    kept = os.environ.get("STILLHOUSE_IMAGE_STORE")
    engine = Engine(Path(kept) if kept else tmp_path_factory.mktemp("engine"))
    engine("rm", "--all", "--force", "--time", "0", check=False)  # of a run that was killed
    try:
        with pip_configuration(engine.directory) as engine.pip:
            build(engine, debian(engine), engine.pip, *WANTED)
            yield engine
    finally:
        engine("rm", "--all", "--force", "--time", "0", check=False)
        if not kept:
            engine.remove()


@dataclass(frozen=True)
class Container:
    """A running teacher."""

    engine: Engine
    name: str
    said: dict[str, str]
    health: str

    def state(self, service: str) -> str:
        with grpc.insecure_channel(self.health) as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    def stop(self) -> int:
        """Sends SIGTERM to process 1 and gives the exit status."""
        self.engine("kill", "--signal", "TERM", self.name)
        return int(self.engine("wait", self.name, timeout=DRAIN_S + 30).stdout)

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(self.said["metrics"], timeout=10) as page:
            return float(re.search(rf"^{name} (\S+)$", page.read().decode(), re.MULTILINE)[1])

    @property
    def log(self) -> str:
        return self.engine("logs", self.name).stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def teacher(engine: Engine, image: str, *options: str, how: tuple[str, ...] = RESTRICTED) -> Iterator[Container]:
    """A teacher in a container, ready."""
    name = f"teacher-{free_port()}"
    health = f"127.0.0.1:{free_port()}"
    vllm = ("--engine", "vllm", "--kv-cache-bytes", str(2**28)) if "vllm" in image else ()
    # Its processes hand each other answers through /dev/shm; podman's own has 64 MiB.
    shared = ("--shm-size", "1g") if vllm else ()
    serve = ("--model", "/models/teacher", "--listen", "127.0.0.1:0", "--metrics-port", "0", "--health-listen", health)
    engine(
        *("run", "--detach", "--name", name, *how, *shared),
        *("--env", "OMP_NUM_THREADS=1", "--env", "VLLM_CPU_OMP_THREADS_BIND=nobind"),
        *("--volume", f"{MODELS}:/models:ro", image, *serve, *vllm, "--drain-s", str(DRAIN_S), *options),
    )
    try:
        end_s = time.monotonic() + READY_S
        while not (ready := re.search(r"^teacher-server ready: (.*)$", engine("logs", name).stdout, re.MULTILINE)):
            running = engine("container", "inspect", "--format", "{{.State.Running}}", name).stdout.strip()
            assert running == "true" and time.monotonic() < end_s, engine("logs", name)
            time.sleep(0.2)
        said = dict(part.split("=", 1) for part in ready[1].split())
        yield Container(engine, name, said, health)
    finally:
        engine("rm", "--force", "--time", "0", name)


def score(address: str) -> list[Scores]:
    tasks = np.random.default_rng(0).integers(0, 17, (8, 40))
    with TeacherClient([address]) as client:
        return [client.score(row.tolist(), score_start=3, top_k=6, candidates=None) for row in tasks]


def sh(engine: Engine, image: str, script: str, *, user: int = 65532) -> str:
    """What a shell says in a container of this image."""
    how = (*RESTRICTED, "--user", str(user), "--entrypoint", "/bin/sh")
    return engine("run", "--rm", *how, BUILT[image], "-c", script).stdout


# What the engine puts into every container: mount points, and its own files in /etc and /run.
ENGINES_OWN = re.compile(
    r"[AC] /(tmp|models|runs|config|etc|run|proc|sys|dev)$"
    r"|[AC] /(etc|run)/(mtab|host\w+|resolv.conf|secrets|.containerenv)$"
)


def outside_of_tmp(engine: Engine, container: str) -> list[str]:
    """What the container changed of its image's files, but for /tmp and what the engine puts there."""
    changes = engine("diff", container).stdout.splitlines()
    return [line for line in changes if not re.match(r"[ACD] /tmp/", line) and not ENGINES_OWN.match(line)]


@pytest.mark.parametrize("image", WANTED)
def test_an_image_holds_nothing_that_built_it(engine: Engine, image: str):
    tools = "pip pip3 gcc g++ cc c++ clang make git curl wget gpg" + ("" if "vllm" in image else " ninja")
    assert sh(engine, image, f"for tool in {tools}; do command -v $tool; done; true") == ""
    left = "find / -xdev -type d '(' -name pip -o -name ensurepip ')' -path '*python*'"
    assert sh(engine, image, left, user=0) == ""
    left = "find /var/lib/apt/lists /var/cache /src /wheels /opt/tools -type f 2>/dev/null; true"
    assert sh(engine, image, left, user=0) == ""
    assert sh(engine, image, "find / -xdev -type f -perm /6000", user=0) == ""
    writable = "find / -xdev -writable -not -type l -not -path '/dev/*' 2>/dev/null; true"
    assert set(sh(engine, image, writable).split()) <= {"/run/lock", "/tmp", "/var/tmp"}


@pytest.mark.parametrize("image", WANTED)
def test_the_bill_of_materials_lists_every_distribution_and_nothing_else(engine: Engine, image: str):
    listing = (
        "import importlib.metadata as m, json; print(json.dumps([[d.name, d.version] for d in m.distributions()]))"
    )
    found = json.loads(sh(engine, image, f"/opt/stillhouse/bin/python -c '{listing}'"))
    bill = json.loads(sh(engine, image, "cat /usr/share/stillhouse/sbom.cdx.json"))
    listed = [*bill["components"], bill["metadata"]["component"]]
    assert bill["bomFormat"] == "CycloneDX"
    assert sorted((part["name"], part["version"]) for part in listed) == sorted(map(tuple, found))
    assert bill == json.loads((engine.directory / "bills" / f"{image}.cdx.json").read_text())


@pytest.mark.parametrize("image", WANTED)
def test_an_image_says_what_it_is_and_runs_as_a_number(engine: Engine, image: str):
    [facts] = json.loads(engine("image", "inspect", BUILT[image]).stdout)
    assert facts["Config"]["User"] == "65532:65532"
    labels = facts["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == "0.1.0"
    assert re.match(r"[0-9a-f]{40}", labels["org.opencontainers.image.revision"])
    assert "@sha256:" in labels["org.opencontainers.image.base.name"]
    assert sh(engine, image, "id -u; id -g; cat /proc/1/comm").split() == ["65532", "65532", "sh"]
    assert "pip.conf" not in json.dumps(facts["Config"])


@pytest.mark.parametrize("image", TEACHERS)
def test_a_teacher_on_a_read_only_root_gives_the_scores_of_one_outside(engine: Engine, image: str):
    # One sequence at a time, so that rounding does not depend on what was batched together.
    alone = ("--max-batch-tokens", "1") if image == "teacher-cpu" else ()
    with teacher(engine, BUILT[image], *alone) as inside:
        assert inside.state("") == "SERVING"
        assert inside.state("liveness") == "SERVING"
        assert engine("exec", inside.name, "cat", "/proc/1/comm").stdout.strip() == "tini"
        scores = score(inside.said["listen"])
        assert outside_of_tmp(engine, inside.name) == []
        assert inside.stop() == 0
    with serving(MODELS / "teacher", *alone, engine="vllm" if "vllm" in image else "torch") as outside:
        assert inside.said["revision"] == outside.said["revision"]
        for ours, theirs in zip(scores, score(outside.said["listen"]), strict=True):
            if alone:
                np.testing.assert_array_equal(ours.top_ids, theirs.top_ids)
                np.testing.assert_array_equal(ours.sampled_logprobs, theirs.sampled_logprobs)
            np.testing.assert_allclose(ours.sampled_logprobs, theirs.sampled_logprobs, atol=1e-5)


@pytest.mark.parametrize("image", TEACHERS)
def test_a_teacher_that_is_told_to_stop_answers_what_it_admitted(engine: Engine, image: str):
    # On a root that may be written, to see that nothing would be but for the switch.
    writable = ("--cap-drop=all", "--security-opt", "no-new-privileges")
    rows = np.random.default_rng(1).integers(0, 17, (500, 60)).tolist()
    with (
        teacher(engine, BUILT[image], "--max-batch-tokens", "64", how=writable) as running,
        TeacherClient([running.said["listen"]]) as client,
    ):
        futures = [client.submit_score(row, score_start=1, top_k=4) for row in rows]
        while not (waiting := running.metric("stillhouse_teacher_requests_in_flight")):
            time.sleep(0.01)
        admitted = sum(future.done() for future in futures) + waiting
        assert running.stop() == 0
        assert sum(future.done() and not future.exception() for future in futures) >= admitted
        assert "Traceback" not in running.log
        assert outside_of_tmp(engine, running.name) == []


@pytest.mark.skipif("trainer-cpu" not in WANTED or "teacher-cpu" not in WANTED, reason="needs both images")
def test_a_trainer_on_a_read_only_root_trains_with_the_teacher(engine: Engine, tmp_path: Path):
    said = engine("run", "--rm", *RESTRICTED, BUILT["trainer-cpu"], "--help").stdout
    assert "train" in said
    runs = tmp_path / "runs"
    runs.mkdir()
    os.chown(runs, 65532, 65532)
    with teacher(engine, BUILT["teacher-cpu"]) as running:
        engine(
            *("run", "--name", "trainer", *RESTRICTED, "--env", "OMP_NUM_THREADS=1"),
            *(
                "--volume",
                f"{MODELS}:/models:ro",
                "--volume",
                f"{EXAMPLE.parent}:/config:ro",
                "--volume",
                f"{runs}:/runs",
            ),
            *(BUILT["trainer-cpu"], "train", "/config/chain_sum.yaml", "run_dir=/runs/first", "steps=2"),
            *("student.model=/models/student", f'teacher.addresses=["{running.said["listen"]}"]'),
            *("evaluation.num_prompts=8",),
        )
        assert outside_of_tmp(engine, "trainer") == []
    steps = [json.loads(line) for line in (runs / "first" / "metrics.jsonl").read_text().splitlines()]
    assert max(step["step"] for step in steps) == 2
    assert {path.stat().st_uid for path in runs.rglob("*")} == {65532}


VERIFIER = """
import sqlglot

def same_query(completion, answer, entry):
    return sqlglot.parse_one(completion) == sqlglot.parse_one(answer)
"""


@pytest.mark.skipif("trainer-cpu" not in WANTED, reason="needs the image")
def test_a_verifier_with_its_dependencies_is_added_as_the_page_says(engine: Engine, tmp_path: Path):
    (tmp_path / "rewards.py").write_text(VERIFIER)
    secrets = ("--secret", f"id=pip,src={engine.pip['PIP_CONF']}")
    if "CA" in engine.pip:
        secrets += ("--secret", f"id=ca,src={engine.pip['CA']}")
    engine(
        *("build", "--network", "host", "--file", str(ROOT / "deploy/images/verifier.Dockerfile"), *secrets),
        *("--build-arg", f"TRAINER_IMAGE={BUILT['trainer-cpu']}", "--build-arg", "PACKAGES=sqlglot==30.30.0"),
        *("--tag", "localhost/with-verifier", str(tmp_path)),
    )
    try:
        BUILT["with-verifier"] = "localhost/with-verifier"
        check = 'import rewards; print(rewards.same_query("select 1", "SELECT  1", {}))'
        said = sh(engine, "with-verifier", f"id -u; /opt/stillhouse/bin/python -c '{check}'")
        assert said.split() == ["65532", "True"]
        before = sh(engine, "trainer-cpu", "cat /usr/share/stillhouse/constraints.txt").split()
        bill = json.loads(sh(engine, "with-verifier", "cat /usr/share/stillhouse/sbom.cdx.json"))
        listed = {f"{part['name']}=={part['version']}" for part in bill["components"]}
        assert "sqlglot==30.30.0" in listed
        assert set(before) <= listed
        test_an_image_holds_nothing_that_built_it(engine, "with-verifier")
    finally:
        del BUILT["with-verifier"]


def test_the_versions_of_the_cuda_images_resolve():
    said = subprocess.run([ROOT / "deploy/images/lock_cuda.sh", "--check"], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
