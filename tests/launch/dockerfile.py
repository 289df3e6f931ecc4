# SPDX-License-Identifier: Apache-2.0
"""Carries out a Dockerfile without a container engine: its instructions, with other directories in the place of some."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def parse(text: str) -> list[tuple[str, str]]:
    """The instructions in order, each with all that is said to it."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


@dataclass
class Build:
    """One build of one stage."""

    context: Path
    """Directory that files are copied from."""
    moved: dict[str, str]
    """Directories of the image, with what stands in for each."""
    environ: dict[str, str]
    """As the base image has it; ENV and ARG add to it."""
    skip: str = r"(?!)"
    """RUN instructions that match are left out."""
    cwd: Path = Path("/")
    user: str = "0"
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)

    def place(self, text: str) -> str:
        """A text with paths in it, with the directories that stand in."""
        for inside, outside in self.moved.items():
            text = text.replace(inside, outside)
        return text

    def carry_out(self, text: str) -> None:
        """Do all that a Dockerfile says; raises `CalledProcessError` when a command of it fails."""
        for word, rest in parse(text):
            getattr(self, f"_{word.lower()}")(rest)

    def _from(self, image: str) -> None:
        assert ":" in image

    def _arg(self, rest: str) -> None:
        name, _, default = rest.partition("=")
        self.environ.setdefault(name, shlex.split(default)[0])

    def _env(self, rest: str) -> None:
        for pair in shlex.split(rest):
            name, _, value = pair.partition("=")
            known = _VARIABLE.sub(lambda found: self.environ.get(found[1] or found[2], ""), self.place(value))
            self.environ[name] = known

    def outside(self, path: Path) -> Path:
        """Where a path of the image is."""
        return path

    def start(self, *command: str | Path) -> list[str]:
        """What carries out a command of the image."""
        return [*map(str, command)]

    def _workdir(self, rest: str) -> None:
        self.cwd = Path(self.place(rest))
        self.outside(self.cwd).mkdir(parents=True, exist_ok=True)

    def _copy(self, rest: str) -> None:
        *sources, target = shlex.split(rest)
        for source in sources:
            origin, goal = self.context / source, self.outside(self.cwd / self.place(target))
            if origin.is_dir():
                shutil.copytree(origin, goal, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
            else:
                goal = goal / source if target.endswith("/") else goal
                goal.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(origin, goal)

    def _run(self, rest: str) -> None:
        if not re.search(self.skip, rest):
            self.ran.append(rest)
            command = self.start("sh", "-c", self.place(rest))
            subprocess.run(command, cwd=self.outside(self.cwd), env=self.environ, check=True, stdin=subprocess.DEVNULL)

    def _user(self, rest: str) -> None:
        self.user = rest

    def _volume(self, rest: str) -> None:
        assert rest.startswith("/")

    def _healthcheck(self, rest: str) -> None:
        self.healthcheck = json.loads(rest.partition("CMD ")[2])

    def _cmd(self, rest: str) -> None:
        self.command = json.loads(rest)


@dataclass
class InRoot(Build):
    """One in a root directory that looks as the base image does; its commands run as the users that the Dockerfile says.

    Each has mounts of its own, of which nothing is left: ``/proc``, ``/dev``, and ``shared``, directories of this machine.
    """

    root: Path = field(kw_only=True)
    shared: tuple[Path, ...] = ()

    def outside(self, path: Path) -> Path:
        return self.root / path.relative_to("/")

    def start(self, *command: str | Path) -> list[str]:
        mounts = [f"mount -t proc proc {self.root}/proc", f"mount --rbind /dev {self.root}/dev"]
        for place in self.shared:
            self.outside(place).mkdir(parents=True, exist_ok=True)
            mounts.append(f"mount --bind {place} {self.outside(place)}")
        user = f"--userspec={self.user}:{self.user}"
        inside = f'cd {self.cwd} && exec "$@"'
        last = f'exec chroot {user} {self.root} sh -c {shlex.quote(inside)} sh "$@"'
        return ["unshare", "--mount", "sh", "-c", " && ".join([*mounts, last]), "sh", *map(str, command)]


def ignored(name: str, rules: str) -> bool:
    """Whether a path of the context is left out by a .dockerignore; the last rule that matches it, or a parent, decides."""
    parts = name.split("/")
    parents = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
    verdict = False
    for rule in (line for line in rules.splitlines() if line and not line.startswith("#")):
        pattern = rule.removeprefix("!")
        if any(_matches(parent, pattern) for parent in parents):
            verdict = not rule.startswith("!")
    return verdict


def _matches(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return any(_matches(path.split("/", depth)[-1], pattern[3:]) for depth in range(path.count("/") + 1))
    return path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern)
