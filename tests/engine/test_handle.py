# SPDX-License-Identifier: Apache-2.0
"""`SaveHandle`: what it tells in each state, to whoever asks in whatever thread."""

from __future__ import annotations

import pytest

from shardckpt.errors import CheckpointError, SavePending, StorageFull
from shardckpt.handle import SaveHandle
from shardckpt.saving import Saved
from tests.engine.waiting import PATIENCE, InThread

SAVED = Saved("/somewhere/step-00000007", 7, "0" * 64, 12, 0.5)


def test_it_goes_through_its_states() -> None:
    handle = SaveHandle(7)
    assert (handle.step, handle.state, handle.done(), handle.error, handle.stall) == (7, "requested", False, None, 0.0)
    handle._to_staged()
    assert (handle.state, handle.done()) == ("staged", False)
    handle._to_durable(SAVED)
    assert (handle.state, handle.done(), handle.error) == ("durable", True, None)
    handle.wait_staged()
    assert handle.result() is handle.result(timeout=0) is SAVED


@pytest.mark.parametrize("staged", [False, True])
def test_a_failure(staged: bool) -> None:
    handle = SaveHandle(7)
    if staged:
        handle._to_staged()
    error = StorageFull("no space")
    handle._to_failed(error)
    assert (handle.state, handle.done(), handle.error) == ("failed", True, error)
    handle.wait_staged()
    for _ in range(2):
        with pytest.raises(StorageFull) as caught:
            handle.result()
        assert caught.value is error


def test_news_of_staging_that_come_late_change_nothing() -> None:
    """They come from another thread than the end."""
    handle = SaveHandle(7)
    handle._to_failed(StorageFull("no space"))
    handle._to_staged()
    assert handle.state == "failed"
    handle = SaveHandle(7)
    handle._to_durable(SAVED)
    handle._to_staged()
    assert handle.state == "durable"


def test_who_runs_out_of_patience_is_told_how_far_it_is() -> None:
    handle = SaveHandle(7)
    with pytest.raises(SavePending, match=r"the save of step 7 is requested and not staged after 0\.001 s; it goes on"):
        handle.wait_staged(0.001)
    with pytest.raises(SavePending, match="is requested and not durable"):
        handle.result(0.001)
    handle._to_staged()
    handle.wait_staged(0)
    with pytest.raises(TimeoutError, match="is staged and not durable") as caught:
        handle.result(0)
    assert isinstance(caught.value, CheckpointError)
    assert caught.value.details == {"step": 7, "state": "staged"}


def test_everybody_who_waits_is_woken() -> None:
    handle = SaveHandle(7)
    durable = [InThread(lambda: handle.result(PATIENCE)) for _ in range(3)]
    staged = [InThread(lambda: handle.wait_staged(PATIENCE)) for _ in range(3)]
    handle._to_staged()
    assert [thread.result() for thread in staged] == [None] * 3
    handle._to_durable(SAVED)
    assert [thread.result() for thread in durable] == [SAVED] * 3


def test_stalls_add_up() -> None:
    handle = SaveHandle(7)
    handle._add_stall(0.25)
    handle._add_stall(0.5)
    assert handle.stall == 0.75


def test_an_error_is_taken_once_and_not_after_the_user_has_seen_it() -> None:
    error = StorageFull("no space")
    taken, shown, fine = SaveHandle(1), SaveHandle(2), SaveHandle(3)
    taken._to_failed(error)
    assert [taken._take_error(), taken._take_error()] == [error, None]
    shown._to_failed(error)
    with pytest.raises(StorageFull):
        shown.result()
    assert shown._take_error() is None
    fine._to_durable(SAVED)
    assert fine._take_error() is None
