# SPDX-License-Identifier: LGPL-2.1-or-later
"""Test machines that are booted for real: build an image, boot it, restore it, look inside.

``machine`` has the interface that every backend gives.  Nothing in here knows what is tested:
another project can use the package with an image description and fixtures of its own.
"""
