# SPDX-License-Identifier: Apache-2.0
"""Write the hostile manifests that are kept as files: ``python -m tests.hostile.make``."""

from __future__ import annotations

from pathlib import Path

from tests.hostile.base import good
from tests.hostile.cases import CASES

CORPUS = Path(__file__).parent / "corpus"


def corpus() -> dict[str, bytes]:
    """Name and content of each file; the good manifest is among them, for whoever mutates them."""
    return {"good.json": good()} | {f"{name}.json": case.make() for name, case in CASES.items() if case.is_small}


def write() -> None:
    """Bring the folder up to date."""
    CORPUS.mkdir(exist_ok=True)
    wanted = corpus()
    for path in CORPUS.iterdir():
        if path.name not in wanted:
            path.unlink()
    for name, data in wanted.items():
        (CORPUS / name).write_bytes(data)


if __name__ == "__main__":
    write()
