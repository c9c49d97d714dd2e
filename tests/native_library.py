"""The native library for the tests: built where it is not or no longer what its sources say, and forced to each ISA."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from halfbyte.kernels.native import build, library


def problem() -> str | None:
    """Why the native backend cannot be tested here; None if it can. Builds it if that is what it takes."""
    if "HALFBYTE_LIBRARY" not in os.environ and not build.is_current():
        try:
            build.build()
        except build.BuildError as error:
            return str(error)
    return library.why_not()


PROBLEM = problem()
needs_library = pytest.mark.skipif(PROBLEM is not None, reason=f"no native backend: {PROBLEM}")


@pytest.fixture(params=build.ISA_FLAGS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once on each instruction set that this machine has."""
    if request.param not in library.isas():
        pytest.skip(f"this machine or build has no {request.param}")
    library.force_isa(request.param)
    yield request.param
    library.force_isa(None)
