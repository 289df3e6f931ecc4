# SPDX-License-Identifier: Apache-2.0
"""Objects with state_dict and load_state_dict: schedulers, GradScaler, data loaders, users' own classes."""

from __future__ import annotations

from typing import Any

from .adapter import Adapter
from .base import Finish
from .opening import Opening
from .saving import Saving


class StatefulAdapter(Adapter):
    """Takes what state_dict gives, and hands load_state_dict all that is stored."""

    def takes(self, value: object) -> bool:
        if isinstance(value, type):
            return False
        return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))

    def expand(self, value: Any, path: str, saving: Saving) -> Any:
        return value.state_dict()

    def open(self, value: Any, path: str, opening: Opening, *, per_rank: bool) -> Finish:
        names = opening.stored.below(path)
        # state_dict can be costly or start things (data loader workers), so it is only asked for when it may tell
        # where tensors go, or what is not selected
        needed = any(opening.stored.tensor(name) for name in names) or not all(map(opening.select, names))
        template = value.state_dict() if needed else None
        finish = opening.adopt(path, template, opening.allocate_host, per_rank=per_rank)
        if finish is None:
            if not names:
                opening.miss(path)
            return lambda: value

        def put_back() -> Any:
            value.load_state_dict(finish())
            return value

        return put_back
