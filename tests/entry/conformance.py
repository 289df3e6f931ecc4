# SPDX-License-Identifier: Apache-2.0
"""What the contract of `CheckpointEngine` says, as cases that each engine runs; they know engines by name only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardckpt
from tests.entry.installed import importable


def make_state(seed: int) -> dict[str, Any]:
    """A state that is equal on all ranks, with every kind of leaf that a third party is likely to keep."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(40, 50), nn.BatchNorm1d(50), nn.Linear(50, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (seed + 1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    for _ in range(seed):
        optimizer.zero_grad()
        model(torch.randn(8, 40)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    progress = {"steps": seed, "seen": list(range(seed)), "name": f"run {seed}", "mean": torch.randn(3)}
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "progress": progress}


def contents(state: dict[str, Any]) -> dict[str, Any]:
    """All of a state as copies of tensors, and values, by path."""
    found: dict[str, Any] = {}

    def walk(path: str, value: Any) -> None:
        if hasattr(value, "state_dict"):
            value = value.state_dict()
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{path}/{key}", item)
        elif isinstance(value, list | tuple):
            for at, item in enumerate(value):
                walk(f"{path}/{at}", item)
        else:
            found[path] = value.clone() if isinstance(value, torch.Tensor) else value

    walk("", state)
    return found


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Paths in which two of `contents` are not equal bit for bit."""
    names = found.keys() & expected.keys()
    unequal = [
        name
        for name in names
        if not (torch.equal(found[name], expected[name]) if torch.is_tensor(found[name]) else found[name] == expected[name])
    ]
    return sorted([*unequal, *(found.keys() ^ expected.keys())])


class Engines:
    """Makes engines of one name in one root."""

    def __init__(self, name: str, root: str) -> None:
        self.name, self.root = name, root

    def open(self) -> shardckpt.CheckpointEngine:
        return shardckpt.get_checkpoint_engine(self.name, self.root)

    def save(self, step: int, state: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
        with self.open() as engine:
            engine.create(step, metadata)
            engine.save(state)
            engine.commit()
            engine.wait()

    def load(self, state: dict[str, Any], **arguments: Any) -> shardckpt.Restored | None:
        with self.open() as engine:
            return engine.load(state, **arguments)


def restores_exactly_what_was_saved(engines: Engines) -> None:
    state = make_state(3)
    engines.save(30, state, {"run": "a", "lr": 0.5})
    restored, target = None, make_state(1)
    with engines.open() as engine:
        restored = engine.load(target)
        assert engine.steps() == [30]
    assert restored is not None
    assert restored.step == 30
    assert restored.info.metadata == {"run": "a", "lr": 0.5}
    assert restored.info.bytes_needed > 0
    assert differing(contents(target), contents(state)) == []


def finds_nothing_where_nothing_is(engines: Engines) -> None:
    with engines.open() as engine:
        assert engine.steps() == []
        assert engine.load(make_state(1)) is None
        engine.wait()


def shows_nothing_before_the_commit(engines: Engines) -> None:
    with engines.open() as engine:
        engine.create(1)
        engine.save(make_state(1))
        assert engine.steps() == []
    with engines.open() as engine:
        assert (engine.steps(), engine.load(make_state(2))) == ([], None)


def drops_what_was_created_before(engines: Engines) -> None:
    state = make_state(2)
    with engines.open() as engine:
        engine.create(1)
        engine.save({"other": {"steps": 1}})
        engine.create(2)
        engine.save(state)
        engine.commit()
        engine.wait()
        assert engine.steps() == [2]
        target = make_state(1)
        engine.load(target)
    assert differing(contents(target), contents(state)) == []


def takes_a_state_in_parts(engines: Engines) -> None:
    state = make_state(2)
    with engines.open() as engine:
        engine.create(5)
        engine.save({"model": state["model"]})
        with pytest.raises(shardckpt.DuplicateName):
            engine.save({"model": state["model"]})
        engine.create(5)
        engine.save({"model": state["model"], "progress": state["progress"]})
        engine.save({"optimizer": state["optimizer"], "scheduler": state["scheduler"]})
        engine.commit()
        target = make_state(1)
        engine.load(target)
    assert differing(contents(target), contents(state)) == []


def lets_the_state_change_after_the_commit(engines: Engines) -> None:
    state = make_state(2)
    expected = contents(state)
    with engines.open() as engine:
        engine.create(1)
        engine.save(state)
        engine.commit()
        # as the next step of training would; it waits for copies that are made lazily
        for param in state["model"].parameters():
            param.grad = torch.ones_like(param)
        state["optimizer"].step()
        state["progress"]["mean"].zero_()
        state["progress"]["steps"] = 77
        engine.wait()
        target = make_state(1)
        engine.load(target)
    assert differing(contents(target), expected) == []


def keeps_steps_in_order(engines: Engines) -> None:
    with engines.open() as engine:
        for step in (3, 20, 100):
            engine.create(step, {"step": step})
            engine.save({"progress": {"steps": step}})
            engine.commit()
        engine.wait()
        assert engine.steps() == [3, 20, 100]
        progress = {"steps": 0}
        for wanted, expected in ((None, 100), (20, 20), (3, 3)):
            restored = engine.load({"progress": progress}, step=wanted)
            assert restored is not None
            assert (restored.step, progress["steps"], restored.info.metadata["step"]) == (expected,) * 3
        with pytest.raises(shardckpt.CheckpointNotFound):
            engine.load({"progress": progress}, step=4)
        assert progress["steps"] == 3


def overwrites_nothing(engines: Engines) -> None:
    state = make_state(2)
    engines.save(7, state)
    with pytest.raises(shardckpt.AlreadyCommitted):
        engines.save(7, make_state(3))
    target = make_state(1)
    engines.load(target, step=7)
    assert differing(contents(target), contents(state)) == []


def refuses_calls_out_of_order(engines: Engines) -> None:
    with engines.open() as engine:
        for call in (lambda: engine.save(make_state(1)), engine.commit):
            with pytest.raises(shardckpt.ConfigError):
                call()
        engine.create(1)
        with pytest.raises(shardckpt.ConfigError):
            engine.commit()
        engine.save(make_state(1))
        engine.commit()
        with pytest.raises(shardckpt.ConfigError):
            engine.commit()
        engine.wait()
        assert engine.steps() == [1]


def refuses_what_cannot_be_saved(engines: Engines) -> None:
    with engines.open() as engine:
        for step, metadata in ((-1, None), ("3", None), (3, ["a"])):
            with pytest.raises(shardckpt.ConfigError):
                engine.create(step, metadata)  # type: ignore[arg-type]
        for state in ([1, 2], {"model": {"weight": object()}}):
            engine.create(3)
            with pytest.raises(shardckpt.StateError):
                engine.save(state)  # type: ignore[arg-type]
                engine.commit()
        assert engine.steps() == []


def refuses_a_damaged_step(engines: Engines) -> None:
    engines.save(1, make_state(2))
    files = [path for path in Path(engines.root).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[-1] ^= 1
    largest.write_bytes(data)
    with pytest.raises(shardckpt.IntegrityError):
        engines.load(make_state(1))


def selects_or_says_that_it_cannot(engines: Engines) -> None:
    state = make_state(3)
    engines.save(1, state)
    arguments: list[dict[str, Any]] = [{"keys": ["model/*"]}, {"strict": False}, {"convert_dtype": True}, {"fallback": True}]
    for chosen in arguments:
        target = make_state(1)
        before = contents(target)
        try:
            restored = engines.load(target, **chosen)
        except shardckpt.ConfigError:
            assert differing(contents(target), before) == []
        else:
            assert restored is not None
            assert differing(contents({"model": target["model"]}), contents({"model": state["model"]})) == []


def is_over_after_the_cleanup(engines: Engines) -> None:
    engine = engines.open()
    engine.create(1)
    engine.save(make_state(1))
    engine.commit()
    engine.create(2)
    engine.cleanup()
    engine.cleanup()
    calls = (lambda: engine.create(3), lambda: engine.save({}), engine.commit, lambda: engine.load(make_state(1)))
    for call in calls:
        with pytest.raises(shardckpt.CheckpointerClosed):
            call()
    with engines.open() as again:
        # what was under way at the cleanup is there
        assert again.steps() == [1]


def ends_a_block_with_the_error_in_it(engines: Engines) -> None:
    with pytest.raises(ZeroDivisionError), engines.open() as engine:
        engine.create(1)
        engine.save(make_state(1))
        engine.commit()
        _ = 1 / 0
    with pytest.raises(shardckpt.CheckpointerClosed):
        engine.create(2)


def tells_all_ranks_of_an_error_on_one(engines: Engines) -> None:
    broken = dist.is_initialized() and dist.get_rank() == dist.get_world_size() - 1
    with engines.open() as engine:
        engine.create(1)
        with pytest.raises(shardckpt.CheckpointError):
            engine.save({"value": object() if broken or not dist.is_initialized() else 1})
            engine.commit()
            engine.wait()
        assert engine.steps() == []
    engines.save(1, make_state(2))


CASES: tuple[Callable[[Engines], None], ...] = (
    restores_exactly_what_was_saved,
    finds_nothing_where_nothing_is,
    shows_nothing_before_the_commit,
    drops_what_was_created_before,
    takes_a_state_in_parts,
    lets_the_state_change_after_the_commit,
    keeps_steps_in_order,
    overwrites_nothing,
    refuses_calls_out_of_order,
    refuses_what_cannot_be_saved,
    refuses_a_damaged_step,
    selects_or_says_that_it_cannot,
    is_over_after_the_cleanup,
    ends_a_block_with_the_error_in_it,
    tells_all_ranks_of_an_error_on_one,
)


def run_cases(name: str, site: str | None, place: str, cases: Sequence[str] | None = None) -> None:
    """Each case, or those of these names, with the engine ``name`` in a root of its own; an error says which case it was."""
    with importable(site):
        for case in CASES:
            if cases is None or case.__name__ in cases:
                try:
                    case(Engines(name, f"{place}/{case.__name__}"))
                except BaseException as error:
                    raise AssertionError(f"{name}: {case.__name__}: {error!r}") from error


def save_one(name: str, site: str | None, root: str) -> dict[str, Any]:
    state = make_state(3)
    with importable(site):
        Engines(name, root).save(4, state)
    return contents(state)


def load_one(name: str, site: str | None, root: str, expected: dict[str, Any]) -> list[str]:
    target = make_state(1)
    with importable(site):
        restored = Engines(name, root).load(target)
    assert restored is not None
    assert restored.step == 4
    return differing(contents(target), expected)
