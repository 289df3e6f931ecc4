# SPDX-License-Identifier: Apache-2.0
"""Three hosts, and ranks on them, for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.nodes.cluster import Cluster, Launcher
from tests.nodes.network import Network, why_not

HOSTS = 3


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("network")
    network = Network(HOSTS, directory)
    try:
        launcher = Launcher(network, directory)
        yield launcher
        launcher.close()
    finally:
        network.close()


@pytest.fixture(scope="session")
def cluster(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(launcher.network, launcher, tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()
