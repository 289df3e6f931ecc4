# SPDX-License-Identifier: Apache-2.0
"""Start a training job on 1 to 4 ranks, kill it, check what is left against a model, and go on with another number of ranks.

Each round is one such start. Rounds come in chains of `LEGS` on one root; number, way and time of all kills, and how states
are saved, follow from the seed and the number of the chain, which are printed. Some rounds run under torchrun. In the others,
for speed, the ranks are forked from a process that has imported torch, with the environment that torchrun gives to them, and
a store that outlives them, as torchrun's does. A failing chain keeps its folder, and prints model and listing.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path

from launch.soak_jobs import LAUNCHERS, Failed, Launch, Plan, stragglers, wait_for_stragglers
from launch.soak_model import Model

LEGS = 8


def draw(chance: random.Random, launcher: str, chain: Plan | None, leg: int) -> Plan:
    """What happens in one start; ``chain`` is that of the start before, on the same root."""
    world_size = chance.choice([size for size in (1, 2, 3, 4) if chain is None or size != chain.world_size])
    background = chance.choice(["thread", "thread", "process"])
    victims = chance.choice(["one", "one", "all", "everything"] + ["background"] * (background == "process"))
    forked = launcher == "fork"
    keep_last = chain.keep_last if chain else chance.choice([None, 1, 2, 3])
    chain_seed = chain.seed if chain else chance.randrange(1 << 30)
    more = random.Random(f"{chain_seed}/{leg}")
    return Plan(
        launcher=launcher,
        leg=leg,
        world_size=world_size,
        seed=chain_seed,
        columns=chain.columns if chain else chance.choice([500, 500, 500, 40_000]),
        keep_last=keep_last,
        keep_every=chain.keep_every if chain else keep_last and chance.choice([None, 10]),
        steps=chance.randrange(40, 100),
        every=chance.randrange(1, 7),
        blocking=chance.random() < 0.25,
        stage=chance.choice(["eager", "lazy"]),
        background=background,
        ring=chance.random() < 0.2,
        readback=more.random() < 0.2,
        parity=more.random() < 0.3,
        victims=victims,
        victim=chance.randrange(world_size),
        fatal_call=chance.choice([0, chance.randrange(1, 250)]) if victims in ("one", "all") else 0,
        after=2 * chance.random() ** 2,
        early=chance.random() < 0.15,
        survivors=chance.choice(["terminated", "left"]) if forked else "terminated",
        haste=background == "process" and chance.random() < 0.4,
    )


def run_chain(seed: int, number: int, rounds: int, launchers: list[str], work: Path) -> None:
    """So many starts on one new root; raises `Failed` when one shows what must not be."""
    chance = random.Random(f"{seed}/{number}")
    work.mkdir()
    plan: Plan | None = None
    model: Model | None = None
    mark = f"soak-{seed}-{number}-{time.time_ns()}"
    try:
        for leg in range(1, rounds + 1):
            plan = draw(chance, launchers[(leg - 1) % len(launchers)], plan, leg)
            model = model or Model(plan, work / "root")
            begun = time.monotonic()
            Launch(plan, work, mark).run()
            hasty = plan.haste and leg < rounds
            if not hasty:
                wait_for_stragglers(mark)
            model.read_logs(plan, work / "logs")
            told = "not looked at, as the background processes go on" if hasty else model.check(plan)
            print(f"chain {number} {plan.describe()}: {told} ({time.monotonic() - begun:.1f} s)", flush=True)
    except Failed as failure:
        for process in stragglers(mark):
            process.kill()
        raise Failed(
            f"seed {seed} chain {number}: {failure}\nplan: {plan}\nmodel: {model}\n{listing(work)}\n"
            f"kept: {work}; again: launch/soak.sh --seed {seed} --chain {number}"
        ) from failure
    shutil.rmtree(work)


def listing(work: Path) -> str:
    """All files with their sizes, and the logs."""
    files = [path for path in sorted(work.rglob("*")) if path.is_file()]
    lines = [f"{path.stat().st_size:>10} {path.relative_to(work)}" for path in files]
    logs = [f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in files if path.suffix in (".log", ".out")]
    return "\n".join(lines + logs[-8:])


def run_rounds(seed: int, rounds: int, launchers: list[str], parent: Path, only: int | None = None) -> int:
    """Run chains until there were so many rounds; the number of rounds."""
    done, number = 0, only or 0
    while done < rounds:
        legs = min(LEGS, rounds - done)
        run_chain(seed, number, legs, launchers, parent / f"chain-{seed}-{number}")
        done += legs
        number += 1
        if only is not None:
            break
    return done


def main() -> None:
    """Run, and print what was run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="starts of the job (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of everything (default: a new one, which is printed)")
    parser.add_argument("--chain", type=int, help="only this chain of rounds")
    parser.add_argument("--launcher", choices=[*LAUNCHERS, "mixed"], default="mixed", help="mixed: one round of 8 by torchrun")
    parser.add_argument("--work", type=Path, help="folder for roots (default: a new one in the temporary folder)")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    launchers = ["fork"] * 7 + ["torchrun"] if args.launcher == "mixed" else [args.launcher]
    work = args.work or Path(tempfile.mkdtemp(prefix="shardckpt-soak-"))
    work.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}, {args.rounds} rounds in {work}", flush=True)
    begun = time.monotonic()
    try:
        done = run_rounds(seed, args.rounds, launchers, work, args.chain)
    except Failed as failure:
        raise SystemExit(f"FAILED: {failure}") from failure
    print(f"{done} rounds of seed {seed} hold, in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
