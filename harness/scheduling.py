# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which test runs in which process of pytest-xdist's: those that share a machine in one.

xdist's own groups would do, but its way to pass them on (a changed node id) has no effect with
pytest 9.2; so the name of the case in a test's id says whether the machine is shared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdist.scheduler import LoadGroupScheduling  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

    from harness.provider import Case


class MachineScheduling(LoadGroupScheduling):  # type: ignore[misc]  # xdist has no py.typed
    """Spreads tests one by one, and those of a module that share a machine together."""

    def __init__(self, config: pytest.Config, log: object, *, cases: Iterable[Case]) -> None:
        super().__init__(config, log)
        self._shared = [case.shared_id for case in cases]
        config.option.loadscopereorder = False  # harness.session has the order

    def _split_scope(self, nodeid: str) -> str:
        """Return what is the same for tests that belong together."""
        module, _, rest = nodeid.partition("::")
        inside = rest.partition("[")[2]
        for name in self._shared:
            if name in inside:
                return f"{module}[{name}]"
        return str(super()._split_scope(nodeid))
