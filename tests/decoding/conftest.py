from __future__ import annotations

import pytest
from shapes import CORE


@pytest.fixture(params=CORE)
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)
