# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps wait for pending copies, however they are taken."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from shardckpt.guard import StepGuard
from tests.engine.guarding import BATCH, FakePending, Net, Wrapper, backward


@pytest.fixture
def guard() -> Iterator[StepGuard]:
    guard = StepGuard()
    guard.attach()
    yield guard
    guard.detach()


# ---- ways to take a step


class OwnStep(torch.optim.Optimizer):
    """An optimizer whose step has nothing of torch's."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad)


def plainly(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module], Callable[[], Any]]:
    def prepare(net: nn.Module) -> Callable[[], Any]:
        optimizer = make((p for p in net.parameters() if p.requires_grad), **options)

        def train() -> None:
            backward(net)
            optimizer.step()

        return train

    return prepare


def with_closure(net: nn.Module) -> Callable[[], Any]:
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return backward(net)

    return lambda: optimizer.step(closure)


def in_backward(net: nn.Module) -> Callable[[], Any]:
    for param in (p for p in net.parameters() if p.requires_grad):
        optimizer = torch.optim.AdamW([param], lr=0.1)

        def step(param: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        param.register_post_accumulate_grad_hook(step)
    return lambda: backward(net)


def with_scaler(net: nn.Module) -> Callable[[], Any]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")

    def train() -> None:
        scaler.scale(net(BATCH).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    return train


def with_scheduler(net: nn.Module) -> Callable[[], Any]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def train() -> None:
        backward(net)
        optimizer.step()
        scheduler.step()

    return train


def wrapped(net: nn.Module) -> Callable[[], Any]:
    optimizer = Wrapper(torch.optim.SGD(net.parameters(), lr=0.1))

    def train() -> None:
        backward(net)
        optimizer.step()

    return train


STEPS = {
    "one by one": plainly(torch.optim.Adam, foreach=False),
    "foreach": plainly(torch.optim.Adam, foreach=True),
    "fused": plainly(torch.optim.Adam, fused=True),
    "tensor lr": plainly(torch.optim.AdamW, lr=torch.tensor(0.1)),
    "own step": plainly(OwnStep),
    "closure": with_closure,
    "in backward": in_backward,
    "scaler": with_scaler,
    "scheduler": with_scheduler,
    "wrapped": wrapped,
}


@pytest.mark.parametrize("how", STEPS)
def test_a_step_waits_before_it_changes_anything(guard: StepGuard, how: str) -> None:
    net = Net()
    train = STEPS[how](net)
    train()
    pending = FakePending(net.parameters())
    guard.watch(pending)
    train()
    assert pending.intact[0]
    assert not pending.is_intact
    guard.forget(pending)
    waited = len(pending.intact)
    train()
    assert len(pending.intact) == waited


COMPILED = ["step", "whole"]
COMPILED_OPTIONS = [{"foreach": False}, {"foreach": True}, {"fused": True}]


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["hook first", "compiled first"])
@pytest.mark.parametrize("what", COMPILED)
@pytest.mark.parametrize("options", COMPILED_OPTIONS, ids=str)
def test_a_compiled_step_waits_too(options: dict[str, bool], what: str, late: bool) -> None:
    torch._dynamo.reset()
    net = Net()
    optimizer = torch.optim.Adam((p for p in net.parameters() if p.requires_grad), **options)  # type: ignore[arg-type]
    step: Callable[[], Any] = torch.compile(optimizer.step, backend="aot_eager") if what == "step" else optimizer.step

    def train() -> None:
        backward(net)
        step()

    run = torch.compile(train, backend="aot_eager") if what == "whole" else train
    guard = StepGuard()
    if late:
        run()
        run()
    guard.attach()
    try:
        run()
        for _ in range(3):
            pending = FakePending(net.parameters())
            guard.watch(pending)
            run()
            assert pending.intact == [True]
            assert not pending.is_intact
            guard.forget(pending)
    finally:
        guard.detach()


@pytest.mark.slow
def test_a_step_that_inductor_compiled_waits_too(guard: StepGuard) -> None:
    torch._dynamo.reset()
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    step = torch.compile(optimizer.step)
    backward(net)
    step()
    pending = FakePending(net.parameters())
    guard.watch(pending)
    step()
    assert pending.intact == [True]
    assert not pending.is_intact


def test_hooks_come_and_go_without_compiling_anew() -> None:
    torch._dynamo.reset()
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="aot_eager")
    backward(net)
    step()
    guard = StepGuard()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(3):
        guard.attach()
        step()
        guard.detach()
        step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_every_optimizer_waits_for_every_copy(guard: StepGuard) -> None:
    nets = [Net(), Net()]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    copies = [FakePending(net.parameters()) for net in nets]
    for pending in copies:
        guard.watch(pending)
    for net, optimizer in zip(nets, optimizers, strict=True):
        backward(net)
        optimizer.step()
    assert copies[0].intact == [True, False]
    assert copies[1].intact == [True, True]


class Held(FakePending):
    """A copy that is over when told so."""

    def __init__(self, tensors: Iterator[torch.Tensor]) -> None:
        super().__init__(tensors)
        self.arrived = threading.Semaphore(0)
        self.over = threading.Event()

    def wait_before_change(self) -> None:
        self.arrived.release()
        assert self.over.wait(60)
        super().wait_before_change()


def test_steps_in_several_threads_all_wait(guard: StepGuard) -> None:
    net = Net()
    backward(net)
    pending = Held(net.parameters())
    guard.watch(pending)
    optimizers = [torch.optim.SGD([param], lr=0.1) for param in net.parameters() if param.requires_grad]
    threads = [threading.Thread(target=optimizer.step) for optimizer in optimizers]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert pending.arrived.acquire(timeout=60)
    assert pending.is_intact
    pending.over.set()
    for thread in threads:
        thread.join(60)
    assert not pending.is_intact


class EndsInTheStep(FakePending):
    """A copy that ends while a step waits for it."""

    def __init__(self, guard: StepGuard, tensors: Iterator[torch.Tensor]) -> None:
        super().__init__(tensors)
        self._guard = guard

    def wait_before_change(self) -> None:
        super().wait_before_change()
        self._guard.forget(self)


def test_a_copy_may_end_while_a_step_waits_for_it() -> None:
    guard = StepGuard()  # nobody has attached it: the copy alone put the hook in place
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pending = EndsInTheStep(guard, net.parameters())
    guard.watch(pending)
    backward(net)
    optimizer.step()
    optimizer.step()
    assert pending.intact == [True]
    guard.attach()
    guard.detach()


class Broken(FakePending):
    """A copy that cannot be waited for."""

    def __init__(self, error: BaseException, tensors: Iterator[torch.Tensor]) -> None:
        super().__init__(tensors)
        self._error = error

    def wait_before_change(self) -> None:
        super().wait_before_change()
        raise self._error


def test_a_copy_that_breaks_is_told_and_training_goes_on(guard: StepGuard, caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    error = RuntimeError("no such stream")
    broken, sound = Broken(error, net.parameters()), FakePending(net.parameters())
    guard.watch(broken)
    guard.watch(sound)
    backward(net)
    with caplog.at_level(logging.ERROR, "shardckpt"):
        optimizer.step()
    assert broken.errors == [error]
    assert "training goes on" in caplog.text
    assert "no such stream" in caplog.text
    assert sound.intact == [True]
    assert not sound.is_intact
    optimizer.step()
    assert len(broken.intact) == 1


def test_who_interrupts_the_wait_gets_no_step(guard: StepGuard) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pending = Broken(KeyboardInterrupt(), net.parameters())
    guard.watch(pending)
    backward(net)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert pending.is_intact
    assert not pending.errors


def test_the_hook_is_there_as_long_as_somebody_needs_it() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    backward(net)
    guard = StepGuard()
    guard.attach()
    guard.attach()
    pending = FakePending(net.parameters())
    guard.watch(pending)
    guard.detach()
    optimizer.step()
    assert len(pending.intact) == 1
    guard.detach()
    optimizer.step()
    assert len(pending.intact) == 1
    guard.attach()
    optimizer.step()
    assert len(pending.intact) == 2
    guard.detach()


def test_forked_processes_do_not_wait(guard: StepGuard) -> None:
    pending = FakePending(iter(()))
    guard.watch(pending)
    child = os.fork()
    if child == 0:
        guard.wait()
        inherited = len(pending.intact)
        own = FakePending(iter(()))
        guard.watch(own)
        guard.wait()
        os._exit(10 * inherited + len(pending.intact) + len(own.intact))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1
    guard.wait()
    assert len(pending.intact) == 1
