# SPDX-License-Identifier: Apache-2.0
"""Each command: what it prints, its JSON, its exit status."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt.cli.output import size_text
from shardckpt.manifest import MANIFEST_NAME
from tests.cli.run import run, state
from tests.maintain.make import flip, opened, rank_file

STEPS = [f"step-{step:08d}" for step in (1, 2, 3)]


# ---- ls


def test_ls(root: Path) -> None:
    (root / STEPS[0] / MANIFEST_NAME).unlink()
    rank_file(root / STEPS[1]).unlink()
    done = run("ls", root)
    assert done.status == 0
    header, *rows, problem = done.out.splitlines()
    assert header.split() == ["step", "state", "ranks", "files", "size", "age", "directory"]
    assert [row.split()[:4] for row in rows] == [
        ["1", "incomplete", "?", "1"],
        ["2", "damaged", "1", "1"],
        ["3", "committed", "1", "2"],
    ]
    assert problem.startswith(f"{STEPS[1]}: rank-00000-")
    assert done.err == ""


def test_ls_json(root: Path) -> None:
    found = run("ls", root, "--json").json
    assert found["path"] == str(root)
    assert [step["name"] for step in found["steps"]] == STEPS
    assert found["steps"][0].keys() == {
        *("name", "step", "state", "world_size", "files", "bytes", "created", "modified", "problem")
    }
    assert found["steps"][0]["state"] == "committed"
    assert found["steps"][0]["problem"] is None


# ---- show


def test_show(root: Path) -> None:
    done = run("show", root)
    assert done.status == 0
    fields = dict(line.split("  ", 1) for line in done.out.split("\n\n")[0].splitlines())
    assert fields["step"].strip() == "3"
    assert "1 rank, shardckpt" in fields["saved by"]
    assert fields["metadata"].strip() == '{"run": "test"}'
    rows = [line.split() for line in done.out.split("\n\n")[1].splitlines()]
    assert rows == [
        ["name", "dtype", "shape", "size", "placement", "mesh", "ranks", "writers"],
        ["model/bias", "float32", "5", "20", "B", "R", "1", "0", "0"],
        ["model/weight", "float32", "4x3", "48", "B", "R", "1", "0", "0"],
        ["rng/seed", "JSON", "1", "B", "per", "rank", "0", "0"],
    ]


def test_show_chosen_names_and_values(root: Path) -> None:
    done = run("show", root / STEPS[1], "--tensors", "*weight", "--tensors", "tok*", "--values")
    assert "model/weight" in done.out
    assert "model/bias" not in done.out
    assert done.out.splitlines()[-1].split() == ["tokens", "20"]


def test_show_aliases(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3), "b": torch.nn.Linear(2, 3)})
    model["b"].weight = model["a"].weight
    shardckpt.save(tmp_path, {"model": model})
    done = run("show", tmp_path)
    assert "3 tensors and 1 second name" in done.out
    (row,) = (line for line in done.out.splitlines() if line.startswith("model/b.weight"))
    assert row.endswith("alias of model/a.weight")


def test_show_json(root: Path) -> None:
    found = run("show", root, "--json").json
    assert found.keys() == {
        *("path", "step", "created", "world_size", "digest", "attempt", "bytes", "files", "torch", "shardckpt", "metadata"),
        *("parity", "tensors", "values"),
    }
    assert found["values"] == {"tokens": 30}
    assert found["digest"] == opened(root).checkpoint.digest
    assert found["tensors"][1] == {
        "name": "model/weight",
        "kind": "tensor",
        "dtype": "float32",
        "shape": [4, 3],
        "bytes": 48,
        "layout": {"placement": "R", "mesh": [1], "ranks": "0", "writers": "0"},
        "alias_of": None,
    }


# ---- verify


@pytest.mark.parametrize("options", [[], ["--read-data"]])
def test_verify(root: Path, options: list[str]) -> None:
    done = run("verify", root, *options)
    assert done.status == 0
    _, *rows, total = done.out.splitlines()
    assert [row.split()[:3] for row in rows] == [["1", "ok", "1"], ["2", "ok", "1"], ["3", "ok", "1"]]
    assert [row.split()[-1] for row in rows] == STEPS
    size = rank_file(root / STEPS[1]).stat().st_size
    checked = "all data read" if options else "data not read, see --read-data"
    assert total == f"3 of 3 steps ok, {size_text(3 * size)}; {checked}"
    one = run("verify", root / STEPS[1], *options)
    assert (one.status, one.out) == (0, f"{root / STEPS[1]}: ok (1 file, {size_text(size)}; {checked})\n")


def test_verify_finds_damage(root: Path) -> None:
    flip(rank_file(root / STEPS[0]), -1)
    flip(rank_file(root / STEPS[1]), 30)
    os.truncate(rank_file(root / STEPS[2]), 4100)
    assert run("verify", root / STEPS[0]).status == 0
    done = run("verify", root, "--read-data")
    assert done.status == 1
    lines = done.out.splitlines()
    assert [line.split()[:2] + line.split()[-2:] for line in lines[1:4]] == [
        [str(step), "DAMAGED", "1", name] for step, name in enumerate(STEPS, 1)
    ]
    name = rank_file(root / STEPS[0]).name
    size = rank_file(root / STEPS[0]).stat().st_size
    assert lines[4] == f"  ChecksumMismatch in {STEPS[0]}/{name}, bytes [4096, {size})"
    assert lines[6] == "    tensors: model/bias, model/weight, rng/seed"
    assert f"bytes [4100, {size})" in lines[-4]
    assert lines[-1].startswith("0 of 3 steps ok, 3 DAMAGED, ")
    assert run("verify", root / STEPS[1]).out.startswith(f"{root / STEPS[1]}: DAMAGED, 1 problem\n  ChecksumMismatch in ")


def test_verify_json(root: Path) -> None:
    flip(rank_file(root / STEPS[0]), -1)
    done = run("verify", root, "--read-data", "--json")
    assert done.status == 1
    assert done.json["ok"] is False
    first, second, _ = done.json["checkpoints"]
    assert first.keys() == {"path", "step", "ok", "removed", "files", "bytes", "data_bytes", "bytes_read", "problems"}
    assert (first["ok"], second["ok"]) == (False, True)
    (problem,) = first["problems"]
    assert problem.keys() == {"kind", "file", "start", "stop", "tensors", "message"}
    assert problem["tensors"] == ["model/bias", "model/weight", "rng/seed"]
    assert run("verify", root / STEPS[1], "--json").json["ok"] is True


def test_verify_of_a_part(root: Path) -> None:
    flip(rank_file(root / STEPS[0]), -1)
    outcomes = [run("verify", root / STEPS[0], "--read-data-subset", f"{part}/3") for part in (1, 2, 3)]
    assert sorted(done.status for done in outcomes) == [0, 0, 1]
    good = next(done.out for done in outcomes if not done.status)
    assert good.endswith("; 0 B of 69 B of data read)\n")
    done = run("verify", root / STEPS[0], "--read-data-subset", "5%", "--seed", "7")
    assert (done.status, done.out.splitlines()[-1]) == (1, "read was a random share of 5%, of seed 7")
    assert run("verify", root, "--read-data-subset", "5%", "--seed", "7", "--json").json["seed"] == 7
    assert isinstance(run("verify", root / STEPS[1], "--read-data-subset", "5%", "--json").json["seed"], int)
    assert run("verify", root / STEPS[1], "--read-data-subset", "1/2", "--json").json["seed"] is None


# ---- digest


def test_digest(root: Path, tmp_path: Path) -> None:
    done = run("digest", root / STEPS[0])
    assert done.status == 0
    line, left_out = done.out.splitlines()
    assert line.endswith("  step 1: 2 tensors, 1 value, 69 B")
    assert left_out == "left out: 1 name that ranks saved each for itself; --per-rank covers them"
    shardckpt.save(tmp_path / "again", state(1), step=1)
    assert run("digest", tmp_path / "again").out == done.out
    assert run("digest", root).out.split()[0] != done.out.split()[0]
    assert run("digest", root, "--per-rank").out.split()[0] != run("digest", root).out.split()[0]


def test_digest_of_tensors(root: Path) -> None:
    done = run("digest", root, "--tensors", "--keys", "model/*", "--memory", "2")
    header, bias, weight, total = done.out.splitlines()
    found = run("digest", root, "--json").json
    assert header.split() == ["name", "rank", "dtype", "shape", "xxh3-128"]
    assert bias.split() == ["model/bias", "float32", "5", found["tensors"]["model/bias"]]
    assert weight.split() == ["model/weight", "float32", "4x3", found["tensors"]["model/weight"]]
    assert total.endswith("2 tensors, 0 values, 69 B")


def test_digest_json(root: Path) -> None:
    found = run("digest", root, "--json").json
    assert found.keys() == {*("path", "step", "digest", "tensors", "per_rank", "per_rank_included", "values", "bytes_read")}
    assert found["per_rank"].keys() == {"rng/seed"}
    assert found["per_rank"]["rng/seed"].keys() == {"0"}
    assert found["digest"] == run("digest", root).out.split()[0]


# ---- diff


def test_diff_of_equal_ones(root: Path, tmp_path: Path) -> None:
    shardckpt.save(tmp_path / "again", state(2), step=1)
    done = run("diff", root / STEPS[1], tmp_path / "again")
    assert done.status == 0
    assert done.out.splitlines()[-1] == "equal: 2 tensors compared, 138 B read"
    assert run("diff", root / STEPS[1], tmp_path / "again", "--json").json["equal"] is True


def test_diff(root: Path, tmp_path: Path) -> None:
    changed = state(3)
    changed["model"]["weight"][0, 1:] = float("nan")
    changed["model"]["bias"] = torch.ones(6)
    changed |= {"new": 1, "tokens": "many"}
    del changed["rng"]
    shardckpt.save(tmp_path / "b", changed)
    done = run("diff", root, tmp_path / "b", "--per-rank")
    assert done.status == 1
    rows = [line.split() for line in done.out.splitlines()]
    assert ["only", "in", "a:", "rng/seed"] in rows
    assert ["only", "in", "b:", "new"] in rows
    assert ["model/bias", "float32", "[5]", "float32", "[6]"] in rows
    assert ["model/weight", "2", "12", "2"] in rows
    assert ["tokens", "30", '"many"'] in rows
    assert done.out.splitlines()[-1].startswith("different: 1 only in a, 1 only in b, 1 of another kind")
    assert run("diff", root, tmp_path / "b", "--keys", "new").status == 1


def test_diff_json(root: Path) -> None:
    done = run("diff", root / STEPS[0], root / STEPS[1], "--json")
    assert done.status == 1
    assert done.json.keys() == {
        *("equal", "a", "b", "only_in_a", "only_in_b", "kinds", "tensors", "values", "layouts", "per_rank_included"),
        *("tensors_compared", "bytes_read"),
    }
    assert done.json["tensors"] == [
        {"name": "model/weight", "rank": None, "elements": 12, "differing": 11, "not_finite": 0, "max_difference": 11.0}
    ]
    assert done.json["values"] == [{"name": "tokens", "a": 10, "b": 20}]


# ---- prune


def test_prune_does_what_the_dry_run_says(root: Path) -> None:
    planned = run("prune", root, "--keep-last", "1", "--keep-every", "2", "--dry-run", "--json").json
    assert planned.keys() == {"path", "dry_run", "kept", "removed", "changed", "bytes", "markers"}
    assert [directory.name for directory in sorted(root.iterdir())] == STEPS
    done = run("prune", root, "--keep-last", "1", "--keep-every", "2", "--json").json
    assert done == {**planned, "dry_run": False}
    assert done["kept"] == [2, 3]
    assert [(r["step"], r["files"]) for r in done["removed"]] == [(1, 2)]
    assert [directory.name for directory in sorted(root.iterdir())] == STEPS[1:]
    assert run("prune", root, "--keep-last", "2").out == "0 steps removed, 0 B; kept: 2, 3\n"


def test_prune_in_words(root: Path) -> None:
    dry = run("prune", root, "--keep-last", "1", "--dry-run").out.splitlines()
    assert [line.split(",")[0] for line in dry] == ["step 1: 2 files", "step 2: 2 files", "2 steps would be removed"]
    wet = run("prune", root, "--keep-last", "1").out.splitlines()
    assert wet == [*dry[:2], dry[2].replace("would be removed", "removed")]


def test_prune_of_what_was_left_behind(root: Path) -> None:
    for step in (4, 5):
        left = root / f"step-{step:08d}"
        shutil.copytree(root / STEPS[2], left)
        (left / MANIFEST_NAME).unlink()
    hours_ago = rank_file(root / STEPS[2]).stat().st_mtime - 7200
    os.utime(rank_file(root / "step-00000004"), (hours_ago, hours_ago))
    assert run("prune", root, "--keep-last", "3", "--json").json["removed"] == []
    done = run("prune", root, "--keep-last", "3", "--incomplete-older-than", "1", "--json").json
    assert [r["step"] for r in done["removed"]] == [4]
    assert done["kept"] == [1, 2, 3]
    assert sorted(directory.name for directory in root.iterdir()) == [*STEPS, "step-00000005"]


# ---- what is refused


@pytest.mark.parametrize(
    "arguments",
    [
        *(["ls"], ["show"], ["verify"], ["digest"], ["diff"], ["diff", "only-one"], ["prune"], ["nonsense"], []),
        *(["ls", ".", "--nonsense"], ["prune", ".", "--keep-last", "0"], ["digest", ".", "--memory", "0"]),
        *(["verify", ".", "--read-data-subset", part] for part in ("0%", "101%", "3/2", "0/2", "half")),
        *(["verify", ".", "--read-data", "--read-data-subset", "5%"],),
        *(["verify", ".", "--seed", "3"], ["verify", ".", "--seed", "3", "--read-data-subset", "1/2"]),
        *(["ls", "ftp://host/path"], ["show", ""], ["ls", "a\0b"]),
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.status == 2
    assert done.out == "" or arguments == []


@pytest.mark.parametrize("command", ["ls", "show", "verify", "digest", "prune"])
def test_no_checkpoint_is_one_line_and_status_1(tmp_path: Path, command: str) -> None:
    options = ["--keep-last", "1"] if command == "prune" else []
    done = run(command, tmp_path / "nothing", *options)
    assert (done.status, done.out) == (1, "")
    (line,) = done.err.splitlines()
    assert line.startswith("shardckpt: error: there is no ")
    assert str(tmp_path / "nothing") in line


@pytest.mark.parametrize("command", ["ls", "show", "verify", "digest"])
def test_a_file_is_no_root(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("mine")
    done = run(command, tmp_path / "file")
    assert (done.status, done.out) == (1, "")
    assert len(done.err.splitlines()) == 1


def test_a_damaged_manifest_is_one_line(root: Path) -> None:
    (root / STEPS[2] / MANIFEST_NAME).write_text('{"format": "\x1b[31m"}')
    for arguments in (["show"], ["digest"], ["diff", root / STEPS[0]]):
        done = run(*arguments, root)
        assert (done.status, done.out) == (1, "")
        assert done.err.startswith("shardckpt: error: invalid manifest")
        assert done.err.rstrip("\n").isprintable()


@pytest.mark.parametrize(
    "arguments", [["show", "--tensors"], ["digest", "--keys"], ["diff", "{}", "--keys"]], ids=["show", "digest", "diff"]
)
def test_a_pattern_that_matches_nothing_is_no_success(root: Path, arguments: list[str]) -> None:
    done = run(*(argument.format(root) for argument in arguments), "modle/*", root)
    assert (done.status, done.out) == (1, "")
    assert "['modle/*']: no name in" in done.err and "shardckpt show" in done.err


def test_damaged_data_is_one_line(root: Path) -> None:
    flip(rank_file(root / STEPS[2]), -1)
    done = run("digest", root)
    assert (done.status, done.out) == (1, "")
    assert "do not match their digest" in done.err
    assert len(done.err.splitlines()) == 1


def test_urls(tmp_path: Path) -> None:
    shardckpt.save("memory://cli", {"x": torch.ones(2)})
    assert run("verify", "memory://cli", "--read-data").status == 0
    shardckpt.save(tmp_path, {"x": torch.ones(2)})
    assert run("diff", "memory://cli", f"file://{tmp_path}").status == 0
