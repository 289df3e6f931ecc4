# SPDX-License-Identifier: Apache-2.0
"""The image: linted, its steps carried out in a directory, its compose file valid, and its healthcheck right."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.elastic_proof import prove_directory, read
from launch.elastic_train import BATCH
from tests.engine.waiting import until
from tests.launch.dockerfile import Build, InRoot, ignored, parse
from tests.launch.test_slurm import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
TEXT = DOCKERFILE.read_text()
COMPOSE = ROOT / "docker" / "compose.yaml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
NODES = {name: service for name, service in SERVICES.items() if name.startswith("node")}
RULES = (ROOT / ".dockerignore").read_text()
NO_BYTECODE = {"PIP_NO_COMPILE": "0"}
"""Most of it would never be used here. pip takes the option to be one that is switched off."""


def tool(name: str) -> Path:
    return Path(sys.executable).with_name(name)


def run(*command: str | Path) -> str:
    """What a command that succeeds prints."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_hadolint_finds_nothing() -> None:
    assert run(tool("hadolint"), "--failure-threshold", "style", DOCKERFILE) == ""


def test_compose_file_is_valid() -> None:
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_the_image_is_pinned_and_not_of_root() -> None:
    instructions = parse(TEXT)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", dict(instructions)["FROM"])
    assert [rest for word, rest in instructions if word == "USER"] == ["1000"]
    pips = [rest for word, rest in instructions if word == "RUN" and "pip install" in rest]
    assert len(pips) == 2
    assert all("--constraint launch/constraints.txt" in rest for rest in pips)


def test_all_that_is_copied_reaches_the_builder_and_nothing_else_of_weight() -> None:
    for word, rest in parse(TEXT):
        if word == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists()
                assert not ignored(source, RULES)
    assert not ignored("shardckpt/cli/app.py", RULES)
    for left_out in (
        ".git/config",
        ".venv/bin/python",
        "tests/ranks.py",
        "shardckpt/cli/__pycache__/app.pyc",
        "docker/Dockerfile",
    ):
        assert ignored(left_out, RULES)


def test_compose_starts_two_nodes_that_meet_and_share_their_checkpoints() -> None:
    assert set(NODES) == {"node0", "node1"}
    meeting = SERVICES["rendezvous"]
    assert set(SERVICES) == {"rendezvous", *NODES}
    # once: two builds of one tag at a time are an error
    assert [name for name, service in SERVICES.items() if "build" in service] == ["rendezvous"]
    assert (COMPOSE.parent / meeting["build"]["context"] / meeting["build"]["dockerfile"]).resolve() == DOCKERFILE
    assert f"ARG {next(iter(meeting['build']['args']))}=" in TEXT
    for name, node in NODES.items():
        command = node["command"]
        options = dict(
            word.removeprefix("--").split("=", 1) for word in command[: command.index("--")] if word.startswith("--")
        )
        assert node["hostname"] == name
        assert options["nnodes"] == "1:2"
        assert options["rdzv-endpoint"] == f"rendezvous:{meeting['command'][-1].removeprefix('--port=')}"
        assert options["rdzv-conf"] == "is_host=0"
        assert (node["image"], node["pull_policy"], node["init"]) == (meeting["image"], "never", True)
        assert node["volumes"] == ["checkpoints:/checkpoints"]
        assert options["root"].startswith("/checkpoints/")
        assert node["environment"]["HEALTH_ROOT"] == options["root"]
        # torchrun kills what is left before compose kills torchrun
        grace = int(node["stop_grace_period"].removesuffix("s"))
        assert int(node["environment"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace
        assert BATCH % (2 * int(options["nproc-per-node"])) == 0


def a_free_port() -> int:
    """Below those that are given to who asks for any port, so that nobody else gets it in between."""
    for port in range(20000, 30000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_compose_starts_trains_on_both_nodes(tmp_path: Path) -> None:
    """The commands of all services, here, with a directory as their volume."""
    port = a_free_port()
    moved = {"/checkpoints": str(tmp_path), "rendezvous:29400": f"127.0.0.1:{port}", "--port=29400": f"--port={port}"}
    directory = tmp_path / "elastic"
    agents = []
    with contextlib.ExitStack() as stack:
        for name, node in SERVICES.items():
            words = node["command"]
            for old, new in moved.items():
                words = [word.replace(old, new) for word in words]
            environ = {
                **os.environ,
                **node.get("environment", {}),
                "PET_LOCAL_ADDR": "127.0.0.1",
                "RES_OPTIONS": "timeout:1 attempts:1",
            }
            log = stack.enter_context((tmp_path / name).open("wb"))
            agent = subprocess.Popen(
                [tool(words[0]), *words[1:]], cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            stack.callback(agent.wait, 300)
            stack.callback(agent.terminate)
            if name in NODES:
                agents.append(agent)

        def is_training() -> bool:
            assert not any(agent.poll() for agent in agents), [(tmp_path / name).read_text() for name in NODES]
            starts = read(directory)
            return bool(starts) and starts[-1].ranks == 4 and bool(starts[-1].saved)

        until(is_training, 600)
        (directory / "stop").touch()
        assert [agent.wait(300) for agent in agents] == [0, 0]
    assert prove_directory(directory)[1].steps >= 10


@pytest.mark.parametrize(("age", "status"), [(None, 1), (0, 0), (29 * 60, 0), (60 * 60, 1)])
def test_healthy_is_who_has_saved_lately(tmp_path: Path, age: int | None, status: int) -> None:
    command = json.loads(dict(parse(TEXT))["HEALTHCHECK"].partition("CMD ")[2])
    root = tmp_path / "run"
    if age is not None:
        (root / "steps").mkdir(parents=True)
        for place in (root / "steps", root):
            os.utime(place, (place.stat().st_mtime - age,) * 2)
    environ = {**os.environ, "HEALTH_ROOT": str(root), "HEALTH_MINUTES": "30"}
    done = subprocess.run(command, env=environ, stderr=subprocess.DEVNULL, timeout=60)
    assert done.returncode == status
    assert subprocess.run(command, env={**environ, "HEALTH_ROOT": ""}, timeout=60).returncode == 0


def require_that_it_trains(build: Build, root: str) -> None:
    """The default command, a training of some steps and the healthcheck, as a container would run them."""
    assert len(build.ran) == sum(word == "RUN" and not re.search(build.skip, rest) for word, rest in parse(TEXT))
    environ = {**build.environ, "HEALTH_ROOT": root}

    def inside(*words: str) -> subprocess.CompletedProcess[str]:
        command = build.start(*words)
        return subprocess.run(command, cwd=build.outside(build.cwd), env=environ, timeout=300, capture_output=True, text=True)

    checked = inside(*build.command, "--json")
    found = json.loads(checked.stdout or checked.stderr)
    pinned = re.search(r"^torch==(\S+)", (ROOT / "launch" / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert found["checks"][0]["values"]["torch"].split("+")[0] == pinned[1]
    options = [f"--root={root}", "--standalone", "--nproc-per-node=1"]
    done = inside("shardckpt", "run", *options, "--", "launch/elastic_train.py", str(Path(root).parent), "--steps=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert build.outside(Path(root) / "step-00000002" / "manifest.json").exists()
    assert inside(*build.healthcheck).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_steps_of_the_image_install_what_trains(tmp_path: Path) -> None:
    """The CPU build, in a directory, with torch from where pip finds it here. No user is made, and nothing is put into /."""
    moved = {"/opt/": f"{tmp_path}/opt/", "/checkpoints": f"{tmp_path}/checkpoints"}
    build = Build(ROOT, moved, {**os.environ, **NO_BYTECODE}, skip="^useradd")
    build.carry_out(TEXT)
    require_that_it_trains(build, f"{tmp_path}/checkpoints/run")


def debian(place: Path) -> Path:
    """A root directory with Debian and its Python, as far as the base image has it; skips where there can be none."""
    missing = [tool for tool in ("debootstrap", "unshare", "chroot") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0 or sysconfig.get_python_version() != "3.11":
        pytest.skip(f"needs root, Python 3.11, and {' and '.join(missing or ['debootstrap'])}")
    release = dict(parse(TEXT))["FROM"].rpartition("-")[2]
    packages = "--include=python3,python3-venv,ca-certificates"
    done = subprocess.run(["debootstrap", "--variant=minbase", packages, release, place], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"debootstrap cannot make a root directory here: {(done.stdout + done.stderr)[-500:]}")
    (place / "etc" / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n")
    return place


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_steps_of_the_image_are_right_in_a_root_directory_of_their_own(tmp_path: Path) -> None:
    """All of them, and as the users that the Dockerfile says; packages are fetched beside it."""
    root, wheels = debian(tmp_path / "root"), tmp_path / "wheels"
    tmp_path.chmod(0o755)
    wanted = ["torch", "numpy", f"{ROOT}[cloud,demo]", "setuptools>=77"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", f"--dest={wheels}"]
    subprocess.run([*pip, f"--constraint={ROOT}/launch/constraints.txt", *wanted], check=True)
    environ = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root", **NO_BYTECODE}
    environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    build = InRoot(ROOT, {}, environ, root=root, shared=(wheels,))
    build.carry_out(TEXT)
    assert (build.user, (root / "checkpoints").stat().st_uid) == ("1000", 1000)
    build.environ["HOME"] = "/home/train"
    require_that_it_trains(build, "/checkpoints/run")
    assert {path.stat().st_uid for path in (root / "checkpoints").rglob("*")} == {1000}
