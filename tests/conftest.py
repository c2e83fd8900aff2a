"""Fixed random inputs everywhere: a failure on one machine is a failure on every machine."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fixed")
