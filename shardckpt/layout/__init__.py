# SPDX-License-Identifier: Apache-2.0
"""How tensors are spread over ranks, as pure data and integer arithmetic: no torch, no I/O."""

from __future__ import annotations

from .box import Ints, intersect_boxes, row_major_strides, window_boxes
from .dtypes import ITEMSIZE, has_safetensors_code, safetensors_code
from .explicit import BoxLayout, FlatLayout, PerRankLayout, PerRankShapes, Replicated, cells_over
from .mesh import Cell, Mesh, MeshLayout, Placement, Replicate, Shard, StridedShard
from .piece import Copy, Fragment, Interval, Piece, intersect

Layout = MeshLayout | FlatLayout | BoxLayout | PerRankLayout | Replicated
"""What one rank says of one of its tensors."""

GlobalLayout = MeshLayout | FlatLayout | BoxLayout | PerRankShapes
"""What all ranks together say of one tensor."""

__all__ = [
    "ITEMSIZE",
    "BoxLayout",
    "Cell",
    "Copy",
    "FlatLayout",
    "Fragment",
    "GlobalLayout",
    "Interval",
    "Ints",
    "Layout",
    "Mesh",
    "MeshLayout",
    "PerRankLayout",
    "PerRankShapes",
    "Piece",
    "Placement",
    "Replicate",
    "Replicated",
    "Shard",
    "StridedShard",
    "cells_over",
    "has_safetensors_code",
    "intersect",
    "intersect_boxes",
    "row_major_strides",
    "safetensors_code",
    "window_boxes",
]
