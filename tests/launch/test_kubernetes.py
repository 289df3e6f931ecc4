# SPDX-License-Identifier: Apache-2.0
"""The manifests for Kubernetes: valid by its own schemas, and their parts fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.launch.test_slurm import ROOT

FILES = sorted((ROOT / "launch" / "kubernetes").glob("*.yaml"))


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


ALL = {document["kind"]: document for file in FILES for document in documents(file)}
JOB = ALL["Job"]["spec"]
POD = JOB["template"]["spec"]
(CONTAINER,) = POD["containers"]
OPTIONS = dict(argument.removeprefix("--").split("=", 1) for argument in CONTAINER["args"] if argument.startswith("--"))


@pytest.mark.parametrize("version", ["1.31", "1.34", "1.37"])
@pytest.mark.parametrize("kind", ALL)
def test_manifests_are_valid(kind: str, version: str) -> None:
    """With strict schemas: unknown fields are errors."""
    assert kubernetes_validate.validate(ALL[kind], version, strict=True).startswith(version)


def test_a_misspelt_field_is_found() -> None:
    broken = {**ALL["Job"], "spec": {**JOB, "completionmode": "Indexed"}}
    with pytest.raises(kubernetes_validate.ValidationError, match="completionmode"):
        kubernetes_validate.validate(broken, "1.31", strict=True)


def test_the_pods_find_each_other() -> None:
    service = ALL["Service"]
    name = ALL["Job"]["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert JOB["completionMode"] == "Indexed"
    assert POD["subdomain"] == service["metadata"]["name"]
    # the host name of the first pod of an indexed job, in that domain
    assert OPTIONS["rdzv-endpoint"] == f"{name}-0.{POD['subdomain']}:{service['spec']['ports'][0]['port']}"


def test_as_many_pods_as_nodes_and_as_many_processes_as_gpus() -> None:
    assert JOB["completions"] == JOB["parallelism"] == int(OPTIONS["nnodes"])
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == int(OPTIONS["nproc-per-node"])
    assert CONTAINER["resources"]["requests"]["memory"] == CONTAINER["resources"]["limits"]["memory"]


def test_the_pod_gives_torchrun_time_to_save() -> None:
    environ = {variable["name"]: variable["value"] for variable in CONTAINER["env"]}
    # torchrun kills the processes before the kubelet kills torchrun
    assert int(environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) + 30 <= POD["terminationGracePeriodSeconds"]
    # it is the first process of the pod, which gets the signal, and no shell
    assert CONTAINER["command"] == ["torchrun"]


def test_checkpoints_are_on_the_shared_volume() -> None:
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    (mount,) = (mount for mount in CONTAINER["volumeMounts"] if OPTIONS["root"].startswith(f"{mount['mountPath']}/"))
    claim = ALL["PersistentVolumeClaim"]
    assert volumes[mount["name"]]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_pods_that_the_cluster_takes_away_are_not_counted_as_failures() -> None:
    (rule,) = JOB["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onPodConditions"]) == ("Ignore", [{"type": "DisruptionTarget", "status": "True"}])
    assert POD["restartPolicy"] == "Never"


def test_what_it_starts_is_in_the_image() -> None:
    script = next(argument for argument in CONTAINER["args"] if not argument.startswith("--"))
    assert (ROOT / script).is_file()
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert f"USER {POD['securityContext']['runAsUser']}\n" in (ROOT / "docker" / "Dockerfile").read_text()
