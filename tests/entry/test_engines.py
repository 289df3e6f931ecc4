# SPDX-License-Identifier: Apache-2.0
"""The registry of checkpoint engines: names, entry points, plugins that are broken, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt.engines.registry import EngineRegistry
from tests.entry.installed import importable, write_distribution
from tests.style.source import ROOT

ECHO = """
import shardckpt

def make(root, **arguments):
    engine = shardckpt.get_checkpoint_engine("sync", root)
    engine.arguments = arguments
    return engine

number = 3
"""


def make_sync(root: str, **arguments: Any) -> shardckpt.CheckpointEngine:
    return shardckpt.get_checkpoint_engine("sync", root, **arguments)


def make_nothing(root: str) -> None:
    return None


@pytest.fixture
def registry() -> EngineRegistry:
    """One that has nothing yet."""
    return EngineRegistry(find=lambda: ())


def test_the_engines_that_are_here() -> None:
    assert {"async", "lazy", "process", "sync"} <= set(shardckpt.list_checkpoint_engines())


def test_names_are_listed_without_torch() -> None:
    script = (
        "import sys, shardckpt\n"
        "class Mine(shardckpt.CheckpointEngine): pass\n"
        "shardckpt.register_checkpoint_engine('mine', Mine)\n"
        "assert {'mine', 'sync'} <= set(shardckpt.list_checkpoint_engines())\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=120)


def test_a_registered_factory_gets_the_root_and_the_arguments(registry: EngineRegistry, tmp_path: Path) -> None:
    registry.register("mine", make_sync)
    assert registry.names() == ["mine"]
    with registry.get("mine", str(tmp_path), keep_last=1) as engine:
        for step in (1, 2, 3):
            engine.create(step)
            engine.save({"weight": torch.ones(3)})
            engine.commit()
        assert engine.steps() == [3]


@pytest.mark.parametrize("name", ["", "Mine", "a b", "-a", "a" * 65, "ä", 3])
def test_a_name_with_other_signs_is_refused(registry: EngineRegistry, name: Any) -> None:
    with pytest.raises(shardckpt.ConfigError, match="cannot be that of a checkpoint engine"):
        registry.register(name, make_sync)


def test_a_factory_that_cannot_be_called_is_refused(registry: EngineRegistry) -> None:
    with pytest.raises(shardckpt.ConfigError, match="'sync' cannot be called"):
        registry.register("mine", "sync")  # type: ignore[arg-type]


def test_a_name_is_registered_once() -> None:
    with pytest.raises(shardckpt.ConfigError, match="'sync': there is a checkpoint engine of that name already"):
        shardckpt.register_checkpoint_engine("sync", make_sync)


def test_a_factory_that_makes_no_engine_is_told(registry: EngineRegistry, tmp_path: Path) -> None:
    registry.register("mine", make_nothing)  # type: ignore[arg-type]
    with pytest.raises(shardckpt.ConfigError, match="'mine': its factory made a NoneType"):
        registry.get("mine", str(tmp_path))


def test_a_name_that_is_not_known_is_told_with_those_that_are(registry: EngineRegistry, tmp_path: Path) -> None:
    registry.register("mine", make_sync)
    registry.register("other", make_sync)
    with pytest.raises(shardckpt.ConfigError, match="'yours' is not known; there are: mine, other"):
        registry.get("yours", str(tmp_path))


def test_entry_points_are_asked_for_only_when_a_name_is_not_registered(tmp_path: Path) -> None:
    asked: list[str] = []

    def find() -> list[EntryPoint]:
        asked.append("now")
        return []

    registry = EngineRegistry(find)
    registry.register("mine", make_sync)
    registry.get("mine", str(tmp_path)).cleanup()
    assert asked == []
    registry.names()
    assert asked == ["now"]


def test_an_installed_engine_is_found_and_gets_its_arguments(tmp_path: Path) -> None:
    write_distribution(tmp_path, "echo-engine", {"echo": "echo_engine:make"}, ECHO)
    with importable(str(tmp_path)):
        assert "echo" in shardckpt.list_checkpoint_engines()
        assert "echo_engine" not in sys.modules
        with shardckpt.get_checkpoint_engine("echo", tmp_path / "root", colour="red") as engine:
            assert engine.arguments == {"colour": "red"}  # type: ignore[attr-defined]
    assert "echo" not in shardckpt.list_checkpoint_engines()


@pytest.mark.parametrize(
    ("code", "target", "why"),
    [
        ("import nothing_of_that_name", "broken_engine:make", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("1 / 0", "broken_engine:make", "ZeroDivisionError"),
        (ECHO, "broken_engine:absent", "AttributeError"),
        (ECHO, "broken_engine:number", "that cannot be called"),
    ],
)
def test_a_broken_engine_is_named_and_leaves_the_others_in_use(tmp_path: Path, code: str, target: str, why: str) -> None:
    write_distribution(tmp_path, "broken-engine", {"broken": target}, code)
    write_distribution(tmp_path, "echo-engine", {"echo": "echo_engine:make"}, ECHO)
    with importable(str(tmp_path)):
        assert {"broken", "echo", "sync"} <= set(shardckpt.list_checkpoint_engines())
        with pytest.raises(shardckpt.ConfigError) as raised:
            shardckpt.get_checkpoint_engine("broken", tmp_path / "root")
        for part in ("'broken'", "broken-engine 0.1", target, why):
            assert part in str(raised.value)
        shardckpt.get_checkpoint_engine("echo", tmp_path / "root").cleanup()


def test_a_name_that_two_distributions_have_is_told_with_both(tmp_path: Path) -> None:
    for name in ("one-engine", "two-engine"):
        write_distribution(tmp_path, name, {"echo": f"{name.replace('-', '_')}:make"}, ECHO)
    with importable(str(tmp_path)):
        both = r"from one-engine 0.1 \(one_engine:make\) and from two-engine 0.1 \(two_engine:make\): uninstall all but one"
        with pytest.raises(shardckpt.ConfigError, match=both):
            shardckpt.get_checkpoint_engine("echo", tmp_path / "root")


def test_what_is_registered_comes_before_what_is_installed(tmp_path: Path) -> None:
    write_distribution(tmp_path, "sly-engine", {"sync": "sly_engine:make"}, "1 / 0")
    with importable(str(tmp_path)):
        shardckpt.get_checkpoint_engine("sync", tmp_path / "root").cleanup()
        assert "sly_engine" not in sys.modules


def test_what_a_name_says_of_the_options() -> None:
    with pytest.raises(shardckpt.ConfigError, match="stage='none' and background='process' do not go together"):
        shardckpt.get_checkpoint_engine("process", "memory://a", options=shardckpt.Options(stage="none"))
    with pytest.raises(shardckpt.ConfigError, match="keep_last=0"):
        shardckpt.get_checkpoint_engine("sync", "memory://a", keep_last=0)
