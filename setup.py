# SPDX-License-Identifier: Apache-2.0
"""Everything is in setup.cfg; this file is for installers that look for it."""

from setuptools import setup

setup()
