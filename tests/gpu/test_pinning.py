# SPDX-License-Identifier: Apache-2.0
"""Page-locking, where CUDA grants it, refuses it, or is not there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt.buffer import Buffer
from shardckpt.errors import ConfigError
from shardckpt.gpu.pinning import PinMemory, launch_kernel, pin, require_cuda, unpin, wants_pinning
from shardckpt.hostmemory import HostMemory

CPU, GPU0 = torch.device("cpu"), torch.device("cuda", 0)
NO_MEMORY, ALREADY_REGISTERED = 2, 712


class Runtime:
    """Looks like torch.cuda and its CUDA runtime; keeps the last error of the thread until a kernel is launched."""

    def __init__(self, *, available: bool = True, refuses: int = 0) -> None:
        self.available = available
        self.refuses = refuses
        self.locked: dict[int, int] = {}
        self.last_error = 0
        self.launched = 0

    def is_available(self) -> bool:
        return self.available

    def cudart(self) -> Runtime:
        return self

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 1
        self.last_error = self.refuses or (ALREADY_REGISTERED if address in self.locked else 0)
        if not self.last_error:
            self.locked[address] = nbytes
        return self.last_error

    def cudaHostUnregister(self, address: int) -> int:
        self.last_error = 0 if self.locked.pop(address, None) else 713
        return self.last_error

    def cudaError(self, code: int) -> int:
        return code

    def cudaGetErrorString(self, code: int) -> str:
        return {NO_MEMORY: "out of memory"}.get(code, "some error")

    def launch(self) -> None:
        self.launched += 1
        error, self.last_error = self.last_error, 0
        if error:
            raise RuntimeError(f"CUDA error: {self.cudaGetErrorString(error)}")


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_memory_is_locked_and_unlocked(mode: PinMemory) -> None:
    cuda = Runtime()
    assert pin(4096, 1 << 20, mode, cuda, cuda.launch)
    assert cuda.locked == {4096: 1 << 20}
    unpin(4096, cuda, cuda.launch)
    assert cuda.locked == {}
    assert cuda.launched == 0


@pytest.mark.parametrize(("nbytes", "mode"), [(0, "always"), (0, "auto"), (1 << 20, "never")])
def test_there_is_nothing_to_lock(nbytes: int, mode: PinMemory) -> None:
    cuda = Runtime()
    assert not pin(4096, nbytes, mode, cuda, cuda.launch)
    assert cuda.locked == {}


def test_auto_goes_on_without_and_leaves_no_error_behind(caplog: pytest.LogCaptureFixture) -> None:
    cuda = Runtime(refuses=NO_MEMORY)
    assert not pin(4096, 3 << 30, "auto", cuda, cuda.launch)
    assert "3.221 GB of host memory cannot be page-locked: out of memory (CUDA error 2); copies" in caplog.text
    cuda.launch()


def test_always_refuses_and_leaves_no_error_behind() -> None:
    cuda = Runtime(refuses=NO_MEMORY)
    with pytest.raises(ConfigError, match=r"pin_memory='always', but 3\.221 GB .* \(CUDA error 2\)\. Give"):
        pin(4096, 3 << 30, "always", cuda, cuda.launch)
    cuda.launch()


def test_what_cannot_be_unlocked_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    cuda = Runtime()
    unpin(4096, cuda, cuda.launch)
    assert "cannot be unlocked: some error (CUDA error 713)" in caplog.text
    cuda.launch()


@pytest.mark.parametrize(
    ("mode", "devices", "wanted"),
    [
        ("auto", [CPU], False),
        ("auto", [CPU, GPU0], True),
        ("auto", [], False),
        ("never", [GPU0], False),
        ("always", [CPU], True),
    ],
)
def test_what_is_locked(mode: PinMemory, devices: list[torch.device], wanted: bool) -> None:
    assert wants_pinning(mode, devices, Runtime()) is wanted


def test_a_build_without_cuda_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        require_cuda("pin_memory='always'", Runtime(available=False), cuda_version=None)
    for part in (
        "pin_memory='always' needs a CUDA device",
        f"this torch ({torch.__version__}) was built without CUDA",
        "'auto'",
    ):
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("environ", "said"), [({}, r"False\)"), ({"CUDA_VISIBLE_DEVICES": ""}, r"CUDA_VISIBLE_DEVICES is ''\)")]
)
def test_a_machine_without_a_device_is_named(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"torch finds none .*{said}"):
        require_cuda("pin_memory='always'", Runtime(available=False), "13.0", environ)


def test_a_machine_with_a_device_is_fine() -> None:
    require_cuda("pin_memory='always'", Runtime(), cuda_version="13.0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_always_is_refused_here() -> None:
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        wants_pinning("always", [CPU])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_checkpointer_refuses_always_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pin_memory='always' needs a CUDA device"):
        shardckpt.Checkpointer(tmp_path, options=shardckpt.Options(pin_memory="always"))


# ---- memory for staging


CHUNK = 1 << 16


def memory_on(cuda: Runtime) -> HostMemory:
    return HostMemory(
        pin=lambda address, nbytes, mode: pin(address, nbytes, mode, cuda, cuda.launch),
        unpin=lambda address: unpin(address, cuda, cuda.launch),
    )


def test_staging_memory_is_locked_once_and_unlocked_before_it_goes() -> None:
    cuda = Runtime()
    memory = memory_on(cuda)
    first = memory.reserve(3 * CHUNK, CHUNK)
    for _ in range(2):
        memory.lock("auto")
    assert cuda.locked == {first.address: 3 * CHUNK}
    assert memory.reserve(2 * CHUNK, CHUNK) is first
    second = memory.reserve(4 * CHUNK, CHUNK)
    assert cuda.locked == {}
    memory.lock("auto")
    assert cuda.locked == {second.address: 4 * CHUNK}
    memory.close()
    assert cuda.locked == {}


def test_staging_memory_that_cannot_be_locked_is_used_as_it_is() -> None:
    cuda = Runtime(refuses=NO_MEMORY)
    memory = memory_on(cuda)
    memory.reserve(CHUNK, CHUNK)
    memory.lock("auto")
    cuda.refuses = 0
    memory.lock("auto")
    memory.close()
    assert cuda.locked == {}
    assert cuda.launched == 1


def test_staging_memory_that_has_to_be_locked_is_asked_for_each_time() -> None:
    cuda = Runtime(refuses=NO_MEMORY)
    memory = memory_on(cuda)
    memory.lock("always")
    memory.reserve(CHUNK, CHUNK)
    for _ in range(2):
        with pytest.raises(ConfigError, match="out of memory"):
            memory.lock("always")
    memory.close()


def test_locked_memory_is_not_part_of_forked_processes() -> None:
    buffer = Buffer(CHUNK)
    buffer.keep_from_forks()
    child = os.fork()
    if not child:
        # a page that is not there kills the process
        buffer.bytes[0] = 1
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_torch_sees_that_memory_is_locked() -> None:
    buffer = Buffer(1 << 20)
    assert pin(buffer.tensor.data_ptr(), 1 << 20, "always")
    assert buffer.tensor.is_pinned()
    # a second time is an error, which must not stick to the kernels that follow
    assert not pin(buffer.tensor.data_ptr(), 1 << 20, "auto")
    launch_kernel()
    unpin(buffer.tensor.data_ptr())
    assert not buffer.tensor.is_pinned()
