# SPDX-License-Identifier: Apache-2.0
"""Checks of the place that checkpoints go to: whether it is safe and fast, and has room for the next one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..errors import CheckpointError, NotACheckpointRoot
from ..hostmemory import PRUDENCE
from ..manifest import MANIFEST_NAME, STEP_PATTERN
from ..root import attempt_of
from ..store import LocalStore, MemoryStore, RetryingStore, Store, is_temporary, open_store
from ..store.filesystem import FileSystem
from ..store.mounts import Mount
from ..store.oserror import explained
from ..store.trial import Space, Speed, nearest_directory, some_file, space_in
from .finding import Finding, amount, gigabytes, milliseconds, refusal
from .machine import Machine
from .newest import CHECK, Newest, find_newest

TRIED_BYTES = 256 << 20
_SLOW_FLUSH = 0.1
_SLOW_FILE = 0.1e9
"""Bytes per second; a single disk of the last ten years is faster."""
_FEW_BYTES = 1 << 30
_TOO_FEW_BYTES = 64 << 20
_SPARE_FILES = 16
"""Which a save makes beside those that stay."""
_NO_FILES = {"proc", "sysfs", "cgroup", "cgroup2", "devpts", "debugfs", "tracefs", "securityfs", "configfs", "mqueue", "bpf"}
_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
_OF_A_CONTAINER = {"overlay", "aufs"}
_SHARED = {
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "wekafs",
    "pvfs2",
    "panfs",
    "cifs",
    "smb3",
    "9p",
    "virtiofs",
    "afs",
}
_NO_BARRIER = "a flush does not reach the device: a power cut can undo a save that was reported durable"
_NO_FLUSH = "flushes do nothing: a crash can undo a save that was reported durable"
_UNSAFE = {
    "nobarrier": _NO_BARRIER,
    "barrier=0": _NO_BARRIER,
    "volatile": _NO_FLUSH,
    "fsync=volatile": _NO_FLUSH,
    "soft": "writes fail for good when the server does not answer for a while, instead of waiting for it",
    "softerr": "writes fail for good when the server does not answer for a while, instead of waiting for it",
}
"""Options of mounts that break what saves rely on. Source: ext4(5), nfs(5), overlayfs in the kernel's documentation."""
_ANSWER_SECONDS = 15.0
"""For requests to an object store; saves are more patient."""
_SLOW_DEVICE = "look for other load on the device or the network to it (iostat -x 1, nfsiostat), or choose a faster place"
_SLOW_SERVICE = "look at the network to the service, at its limits, and whether it is in the region of this machine"


def check_storage(machine: Machine) -> Iterator[Finding]:
    """Where checkpoints go, what is there, and whether there is room for the next one."""
    if machine.root is None:
        yield Finding("storage", "ok", "not checked: to try where checkpoints go, name it: shardckpt doctor ROOT")
        return
    try:
        yield from check_root(machine, _open(machine.root))
    except CheckpointError as error:
        yield _refused_place(error)


def _open(root: str) -> Store:
    store = open_store(root)
    if not isinstance(store, RetryingStore):
        return store
    from ..store.object import ObjectStore  # needs obstore

    return ObjectStore(root, patience=_ANSWER_SECONDS)


def _refused_place(error: CheckpointError) -> Finding:
    found = refusal("storage", error)
    if isinstance(error.__cause__, ModuleNotFoundError):
        text, _, remedy = error.message.partition(": ")
        return replace(found, text=text, remedy=remedy)
    return found


def check_root(machine: Machine, store: Store) -> Iterator[Finding]:
    """What is found of an open store. One that does not answer is asked once, and not tried."""
    space, place = None, store
    if isinstance(store, LocalStore):
        directory = nearest_directory(store.url, machine.fs)
        mount = machine.mount_of(directory)
        found = judge_mount(store.url, directory, mount)
        yield found
        if found.status == "problem":
            return
        space = _room(machine, directory, mount)
        # nothing is made where there is no root yet
        place = LocalStore(directory, machine.fs)
    else:
        yield _judge_store(store)
    newest, is_answered = None, True
    try:
        if isinstance(store, LocalStore) and store.url == place.url:
            _require_root(store.url, machine.fs)
        newest, findings = find_newest(store)
        yield from findings
    except CheckpointError as error:
        is_answered = not error.details.get("transient")
        yield _refused_root(error)
    yield from judge_space(space, newest)
    yield from judge_memory(machine, newest)
    if is_answered:
        try:
            yield from _try(machine, place, space, newest)
        except CheckpointError as error:
            yield refusal("storage writes", error)


def _room(machine: Machine, directory: str, mount: Mount | None) -> Space | None:
    space, available = space_in(directory, machine.fs), machine.available_memory()
    if mount is None or mount.kind not in _IN_MEMORY or available is None:
        return space
    # whoever writes more than that is killed, whatever the file system says
    return Space(available, available, None) if space is None else replace(space, free=min(space.free, available))


def _judge_store(store: Store) -> Finding:
    values = {"path": store.url}
    if isinstance(store, MemoryStore):
        text = f"{store.url}, in the memory of a process: gone when that ends"
        return Finding("storage", "warning", text, "choose a directory on a disk, or a bucket", values)
    return Finding("storage", "ok", f"{store.url}, which is no file system", values=values)


def _refused_root(error: CheckpointError) -> Finding:
    found, path = refusal(CHECK, error), str(error.details.get("path"))
    if os.path.basename(path) != "lost+found":
        return found
    return replace(found, remedy=f"choose a directory below, such as {os.path.join(os.path.dirname(path), 'run')}")


def judge_mount(root: str, directory: str, mount: Mount | None) -> Finding:
    """Whether what is stored on a mount is there tomorrow, and for whom."""
    missing = "" if root == directory else f"{root} is not there yet; {directory}: "
    values: dict[str, Any] = {"path": root, "directory": directory}
    if mount is None:
        return Finding("storage", "ok", f"{missing}the system does not tell of its file system", values=values)
    kind = mount.kind
    values |= {"kind": kind, "device": mount.device, "options": list(mount.options)}
    text = f"{missing}{kind} on {mount.device}"
    if kind in _NO_FILES:
        return Finding("storage", "problem", f"{text}, which holds no files", "choose a directory on a disk", values)
    unsafe = [option for option in mount.options if option in _UNSAFE]
    if unsafe:
        text = f"{text}, mounted with {unsafe[0]}: {_UNSAFE[unsafe[0]]}"
        return Finding("storage", "warning", text, f"mount {mount.point} without {unsafe[0]}", values)
    if kind in _IN_MEMORY:
        remedy = "choose a directory on a disk, or copy checkpoints to one; what lies here also takes host memory"
        return Finding("storage", "warning", f"{text}, in memory: gone when the machine restarts", remedy, values)
    if kind in _OF_A_CONTAINER:
        remedy = "mount a volume into the container, and choose a directory on that"
        return Finding("storage", "warning", f"{text}, a layer of a container: gone when that is removed", remedy, values)
    seen = (
        "a file system of several hosts"
        if kind in _SHARED
        else "which a job on several hosts cannot use if they do not share it"
    )
    return Finding("storage", "ok", f"{text}, {seen}", values=values)


def _require_root(directory: str, fs: FileSystem) -> None:
    """Raise `NotACheckpointRoot` for the wrong directory, before all that is in it is listed: it may be a whole disk."""
    with explained("list", directory):
        names = fs.listdir(directory)
    if not any(name == MANIFEST_NAME or STEP_PATTERN.match(name) for name in names):
        found = some_file(directory, fs)
        if found is not None and attempt_of(found) is None and not is_temporary(found):
            raise NotACheckpointRoot(
                f"{directory} has no checkpoint in it, and holds {found!r}; use a new or an empty directory", found=found
            )


def judge_space(space: Space | None, newest: Newest | None) -> Iterator[Finding]:
    """Whether one more checkpoint like the newest one fits."""
    if space is None:
        return
    text = f"{amount(space.free)} of {amount(space.total)}"
    values = {"free": space.free, "total": space.total, "free_files": space.free_files}
    files = (0 if newest is None else newest.files) + _SPARE_FILES
    remedy = "free space there, or prune older checkpoints (shardckpt prune ROOT --keep-last N)"
    if space.free_files is not None and space.free_files < files:
        text = f"{text}, but only {space.free_files} more files, and a save makes up to {files}"
        yield Finding("free space", "problem", text, "remove files there, or make a file system with more inodes", values)
    elif newest is None:
        if space.free < _TOO_FEW_BYTES:
            yield Finding("free space", "problem", f"{text}: no checkpoint of a model fits", remedy, values)
        elif space.free < _FEW_BYTES:
            yield Finding("free space", "warning", text, remedy, values)
        else:
            yield Finding("free space", "ok", text, values=values)
    elif space.free < newest.nbytes:
        yield Finding(
            "free space", "problem", f"{text}: one more checkpoint of {amount(newest.nbytes)} does not fit", remedy, values
        )
    elif space.free < 2 * newest.nbytes:
        remedy += "; with keep_last, which removes a step when a newer one is committed, room for one is enough"
        yield Finding("free space", "warning", f"{text}: room for one more checkpoint, and not for two", remedy, values)
    else:
        count = space.free // newest.nbytes
        yield Finding(
            "free space", "ok", f"{text}: room for {count:,} more checkpoints", values={**values, "checkpoints": count}
        )


def judge_memory(machine: Machine, newest: Newest | None) -> Iterator[Finding]:
    """Whether a state like the newest one can be staged whole on this node."""
    available = machine.available_memory()
    if newest is None or available is None:
        return
    world = machine.world_size or newest.world_size
    local = min(world, machine.ranks_per_node or len(machine.gpus) or world)
    need, means = -(-newest.staged * local // world), int(PRUDENCE * available)
    values = {"needed": need, "usable": means, "ranks": local, "world_size": world}
    text = f"{amount(need)} for {local} of {world} ranks, of {amount(means)} that may be taken"
    if need > means:
        remedy = (
            "saves will go chunk by chunk, and hold training up while they write: give the job or container more memory, use "
            "more nodes, or save with wait=True. If fewer ranks run on a node, say so: --nproc-per-node"
        )
        yield Finding("staging memory", "warning", text, remedy, values)
    else:
        yield Finding("staging memory", "ok", text, values=values)


def _try(machine: Machine, store: Store, space: Space | None, newest: Newest | None) -> Iterator[Finding]:
    free = space.free if space is not None else machine.available_memory() if isinstance(store, MemoryStore) else None
    tried = machine.try_store(store, TRIED_BYTES if free is None else min(TRIED_BYTES, free // 4), machine.fs)
    if tried.direct is not None:
        yield _judge_direct(tried.direct)
    if tried.links is not None:
        yield _judge_links(tried.links)
    if tried.flush_seconds is not None:
        yield _judge_flush(tried.flush_seconds)
    if tried.speed is None:
        yield Finding("write speed", "warning", "not measured: there is no room for it", "see free space")
    else:
        remedy = _SLOW_DEVICE if isinstance(store, LocalStore) else _SLOW_SERVICE
        yield _judge_speed("write speed", tried.speed.written, tried.speed, newest, remedy)
        yield _judge_speed("read speed", tried.speed.read, tried.speed, newest, remedy)


def _judge_direct(direct: bool) -> Finding:
    if direct:
        return Finding("o_direct", "ok", "taken: files are written past the page cache", values={"direct": True})
    remedy = "saves and verify='readback' are faster and surer where the file system takes it: another one, or other options"
    return Finding("o_direct", "warning", "not taken: files are written through the page cache", remedy, {"direct": False})


def _judge_links(links: bool) -> Finding:
    if links:
        return Finding("hard links", "ok", "taken: a checkpoint is published in one step", values={"links": True})
    remedy = (
        "saves work, but if a process dies just while it publishes, a person has to remove the .claim.tmp file that the next "
        "save names: take a file system with hard links where there is one"
    )
    return Finding("hard links", "warning", "not taken: checkpoints are published under a claim", remedy, {"links": False})


def _judge_flush(seconds: float) -> Finding:
    text, values = f"{milliseconds(seconds)} until a write is durable", {"seconds": seconds}
    if seconds > _SLOW_FLUSH:
        remedy = "each save waits for a few: look for other load, a failing drive (smartctl -a), or a slow server"
        return Finding("flush", "warning", text, remedy, values)
    return Finding("flush", "ok", text, values=values)


def _judge_speed(check: str, speed: float, tried: Speed, newest: Newest | None, remedy: str) -> Finding:
    text = f"{gigabytes(speed)}/s by one process, with {amount(tried.nbytes)}"
    values = {"bytes_per_second": speed, "bytes": tried.nbytes}
    if newest is not None:
        text += f"; alone it takes {newest.nbytes / speed:.3g} s for the newest checkpoint"
    if speed < _SLOW_FILE:
        return Finding(check, "warning", text, remedy, values)
    return Finding(check, "ok", text, values=values)
