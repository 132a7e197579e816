from __future__ import annotations

import pytest

from tests.unit.deploy.manifests import NAMES, Overlay, missing_kubectl, render


@pytest.fixture(params=NAMES)
def overlay(request: pytest.FixtureRequest) -> Overlay:
    if why := missing_kubectl():
        pytest.skip(why)
    return render(request.param)
