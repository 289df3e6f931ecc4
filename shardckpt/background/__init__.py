# SPDX-License-Identifier: Apache-2.0
"""Saves that go on while training does: staged here, and finished by a thread or by a process of their own."""
