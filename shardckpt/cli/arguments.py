# SPDX-License-Identifier: Apache-2.0
"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Place = Annotated[
    str,
    typer.Argument(metavar="PATH", help="A checkpoint's directory, a root (its newest step is taken), or the URL of one."),
]
RootPlace = Annotated[str, typer.Argument(metavar="ROOT", help="The directory of a run, or its URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, and no progress bar.")]
Keys = Annotated[
    list[str] | None,
    typer.Option("--keys", metavar="GLOB", help="Only names that match, such as 'model/*'. May be given several times."),
]
PerRank = Annotated[
    bool,
    typer.Option("--per-rank", help="Also count what ranks saved each for itself (RNG states), which varies with world size."),
]
Memory = Annotated[
    int,
    typer.Option("--memory", metavar="MIB", min=2, help="Memory to read with. More reads wide, finely sharded tensors faster."),
]
