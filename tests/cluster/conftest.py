"""A cluster for the tests of this directory, made once: a real control plane, and two nodes that run pods for real.

`make cluster-test` runs them; `make test` does not, since the control plane has to be built first.
"""

import contextlib
import os
from collections.abc import Iterator

import pytest

from tests.cluster.cluster_under_test import Cluster
from tests.cluster.control_plane import ControlPlane
from tests.cluster.node import ClusterNames, Node
from tests.deploy.pod_network import PodNetwork

collect_ignore_glob = [] if os.environ.get("STILLHOUSE_CLUSTER") else ["test_*.py"]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Of two nodes, with the files that its callers need."""
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(PodNetwork())
        plane = stack.enter_context(ControlPlane(network))
        names = stack.enter_context(ClusterNames(plane.api))
        nodes = [stack.enter_context(Node(name, plane.api, network, names)) for name in ("node-a", "node-b")]
        yield Cluster(network, plane, names, nodes, tmp_path_factory.mktemp("cluster"))
