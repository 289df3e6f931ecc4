# SPDX-License-Identifier: Apache-2.0
"""A few threads that share out one list of tasks.

Unlike the executors of the standard library they can also be started while the interpreter exits, when saves that are still
under way have to be finished.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def share_out(function: Callable[[_Item], _Result], items: Sequence[_Item], threads: int, name: str) -> list[_Result]:
    """``[function(item) for item in items]`` by ``threads`` threads, the caller among them, which take items in order.

    When some calls raise, no more items are taken, and the first error is raised once all threads have ended.
    """
    results: list[Any] = [None] * len(items)
    errors: list[BaseException] = []
    numbers = iter(range(len(items)))
    lock = threading.Lock()

    def claim() -> int | None:
        with lock:
            return None if errors else next(numbers, None)

    def work() -> None:
        while (number := claim()) is not None:
            try:
                results[number] = function(items[number])
            except BaseException as error:
                errors.append(error)

    helpers = [threading.Thread(target=work, name=f"{name}-{at}", daemon=True) for at in range(1, min(threads, len(items)))]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]
    return results
