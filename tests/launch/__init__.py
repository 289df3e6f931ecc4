# SPDX-License-Identifier: Apache-2.0
"""Tests of what starts jobs elsewhere: Slurm, Kubernetes, containers, continuous integration."""
