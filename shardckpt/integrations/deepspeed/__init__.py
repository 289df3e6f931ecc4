# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed: ``attach`` after ``deepspeed.initialize``, and its engine saves and loads through shardckpt.

::

    engine, _, _, _ = deepspeed.initialize(model=model, ...)
    shardckpt.integrations.deepspeed.attach(engine, keep_last=3)
    engine.load_checkpoint("/ckpts/run42")      # any number of ranks, any ZeRO stage, plain PyTorch too
    ...
    engine.save_checkpoint("/ckpts/run42")      # sharded, asynchronous, committed atomically, checked by digests
"""

from .attachment import Attachment, attach

__all__ = ["Attachment", "attach"]
