# SPDX-License-Identifier: Apache-2.0
"""`torch.distributed.optim.ZeroRedundancyOptimizer`: each rank saves and loads the state of the parameters it owns."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import StateError
from .optimizer import OptimizerAdapter, Parts


class ZeroAdapter(OptimizerAdapter):
    """The local optimizer's state, the whole optimizer's groups; nothing is consolidated."""

    def takes(self, value: object) -> bool:
        loaded = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
        return loaded is not None and isinstance(value, loaded.ZeroRedundancyOptimizer)

    def parts(self, value: Any, path: str) -> Parts:
        local = getattr(value, "optim", None)
        if local is None:
            raise StateError(
                f"{path!r}: a ZeroRedundancyOptimizer with overlap_with_ddp=True has no state before its first steps; "
                "save and load after them",
                path=path,
            )
        owned = {param for group in local.param_groups for param in group["params"]}

        def settle() -> None:
            value._sync_param_groups(value.param_groups, local.param_groups)

        return Parts(local, value.param_groups, owned.__contains__, settle)
