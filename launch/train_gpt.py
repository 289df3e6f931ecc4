# SPDX-License-Identifier: Apache-2.0
"""Train a small GPT on the source files of Python's standard library: a plain torchrun script with checkpoints.

    torchrun --nproc-per-node 4 launch/train_gpt.py --root /tmp/run1

Kill it at any moment and start it again, on 4 processes or on any other number that divides the batch: it goes
on from the newest checkpoint with the same weights, optimizer state, learning rate and place in the data. A process
that gets SIGTERM makes all of them save the step that they are in, and leave with status 143.
"""

import argparse
import math
import os
import signal
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import shardckpt

WIDTH, LAYERS, HEADS, CONTEXT, VOCABULARY = 384, 6, 6, 64, 256


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, 2))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder-only transformer over bytes with 10.9 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def windows_of_text() -> Tensor:
    """The standard library's sources as rows of CONTEXT + 1 bytes; neighbours overlap by one byte."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = (path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts)
    text = b"".join(path.read_bytes() for path in sources)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).unfold(0, CONTEXT + 1, CONTEXT)


def build(seed: int, steps: int, device: torch.device) -> tuple[GPT, torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The model, sharded over all ranks, its optimizer and its learning rate schedule."""
    torch.manual_seed(seed)
    model = GPT().to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    matrices = {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1}
    vectors = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], lr=1e-3, betas=(0.9, 0.95))
    warmup = max(1, steps // 10)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def global_mean(value: Tensor) -> float:
    """The mean of a number over all ranks."""
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def report(text: str) -> None:
    """Print on one rank."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def report_save(handle: shardckpt.SaveHandle) -> None:
    """Print what a save that is over has cost. One that failed is in the log; training goes on, and so will the next one."""
    if handle.error is None:
        saved = handle.result()
        report(f"saved step {saved.step}: {saved.bytes} bytes in {saved.seconds:.3f} s, stalled for {handle.stall:.3f} s")


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train from the newest checkpoint in ``args.root``, or from the start, to ``args.steps``."""
    model, optimizer, scheduler = build(args.seed, args.steps, device)
    windows = windows_of_text()
    sampler = shardckpt.ElasticSampler(len(windows), global_batch=args.batch, seed=args.seed, drop_last=True)
    loader = DataLoader(TensorDataset(windows), batch_sampler=sampler)
    report(f"{sum(p.numel() for p in model.parameters()):,} parameters, {windows.numel():,} bytes of text")

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "sampler": sampler, "rng": shardckpt.RNGState()}
    with shardckpt.Checkpointer(args.root, keep_last=2, every_steps=args.save_every) as ckpt:
        ckpt.on_signal(signal.SIGTERM)
        restored = ckpt.restore(state)
        if restored:
            report(f"restored step {restored.step}: {restored.info.bytes_read} bytes in {restored.info.seconds:.3f} s")
            if args.copy_to:
                shardckpt.save(args.copy_to, state)
        first = restored.step + 1 if restored else 1
        handle = None
        for step, (batch,) in zip(range(first, args.steps + 1), sampler.track(loader, repeat=True), strict=False):
            begin = time.perf_counter()
            tokens = batch.to(device, torch.long)
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            report(f"step {step} loss {global_mean(loss.detach()):.6f} in {time.perf_counter() - begin:.3f} s")
            if handle and handle.done():
                report_save(handle)
                handle = None
            if ckpt.should_save(step):
                handle = ckpt.save(step, state)
    if handle:
        report_save(handle)


def main() -> None:
    """Read the options, join the other ranks, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="where the checkpoints are (default: what `shardckpt run --root` was given)")
    parser.add_argument("--steps", type=int, default=200, help="steps in all (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=12, help="samples per step, of all ranks (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=20, help="steps between saves (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the data (default: %(default)s)")
    parser.add_argument("--copy-to", help="save the state once more, here, as soon as it was restored")
    args = parser.parse_args()

    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.device_count() >= local_ranks:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
