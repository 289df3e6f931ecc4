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
"""By kind, of which there is one each."""
JOB = ALL["Job"]["spec"]
POD = JOB["template"]["spec"]
(CONTAINER,) = POD["containers"]
SCRIPT = CONTAINER["args"].index("--") + 1
OPTIONS = dict(argument.removeprefix("--").split("=", 1) for argument in CONTAINER["args"][: SCRIPT - 1])
ENVIRON = {variable["name"]: variable for variable in CONTAINER["env"]}


@pytest.mark.parametrize("version", ["1.31", "1.34", "1.37"])
@pytest.mark.parametrize("kind", ALL)
def test_manifests_are_valid(kind: str, version: str) -> None:
    """With strict schemas: unknown fields are errors."""
    assert kubernetes_validate.validate(ALL[kind], version, strict=True).startswith(version)


def test_a_misspelt_field_is_found() -> None:
    broken = {**ALL["Job"], "spec": {**JOB, "completionmode": "Indexed"}}
    with pytest.raises(kubernetes_validate.ValidationError, match="completionmode"):
        kubernetes_validate.validate(broken, "1.31", strict=True)


def test_the_agents_meet_in_a_pod_beside_them() -> None:
    service, deployment = ALL["Service"], ALL["Deployment"]["spec"]
    (place,) = deployment["template"]["spec"]["containers"]
    (port,) = service["spec"]["ports"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"]
    assert (deployment["replicas"], deployment["strategy"]["type"]) == (1, "Recreate")
    assert place["command"] == ["shardckpt", "rendezvous", f"--port={port['port']}"]
    assert place["readinessProbe"]["tcpSocket"]["port"] == port["port"]
    assert place["image"] == CONTAINER["image"]
    assert OPTIONS["rdzv-backend"] == "c10d"
    assert OPTIONS["rdzv-endpoint"] == f"{service['metadata']['name']}:{port['port']}"
    assert "is_host=0" in OPTIONS["rdzv-conf"].split(",")


def test_what_differs_from_pod_to_pod_and_from_job_to_job() -> None:
    """A job that is over is so for its rendezvous, too: the next one has another name there. For fences it has the same."""
    names = {option: value[2:-1] for option, value in OPTIONS.items() if value.startswith("$(")}
    fields = {option: ENVIRON[name]["valueFrom"]["fieldRef"]["fieldPath"] for option, name in names.items()}
    assert fields == {"local-addr": "status.podIP", "rdzv-id": "metadata.labels['batch.kubernetes.io/controller-uid']"}
    assert ENVIRON["SHARDCKPT_RUN"]["value"] == ALL["Job"]["metadata"]["name"]


def test_as_many_pods_as_nodes_and_as_many_processes_as_gpus() -> None:
    fewest, most = map(int, OPTIONS["nnodes"].split(":"))
    assert JOB["completionMode"] == "Indexed"
    assert fewest < most == JOB["completions"] == JOB["parallelism"]
    # one that comes up when the others are done is not needed, and could not join them
    assert JOB["successPolicy"] == {"rules": [{"succeededCount": 1}]}
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == int(OPTIONS["nproc-per-node"])
    assert CONTAINER["resources"]["requests"]["memory"] == CONTAINER["resources"]["limits"]["memory"]


def test_the_example_deals_its_batch_out_to_any_of_these_numbers_of_nodes() -> None:
    arguments = dict(word.removeprefix("--").split("=") for word in CONTAINER["args"][SCRIPT + 1 :])
    fewest, most = map(int, OPTIONS["nnodes"].split(":"))
    for nodes in range(fewest, most + 1):
        assert int(arguments["batch"]) % (nodes * int(OPTIONS["nproc-per-node"])) == 0


def test_the_pod_gives_the_agent_time_to_save() -> None:
    # torchrun kills the processes before the kubelet kills torchrun
    assert int(ENVIRON["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]["value"]) + 30 <= POD["terminationGracePeriodSeconds"]
    # it is what gets the pod's signal, and no shell; but not as process 1, which would ignore it until there is a handler
    assert CONTAINER["command"] == ["shardckpt", "run"]
    assert POD["shareProcessNamespace"] is True


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
    assert (ROOT / CONTAINER["args"][SCRIPT]).is_file()
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert f"USER {POD['securityContext']['runAsUser']}\n" in (ROOT / "docker" / "Dockerfile").read_text()
