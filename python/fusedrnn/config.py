# SPDX-License-Identifier: Apache-2.0
"""Which backend every call runs, where it names none: FUSEDRNN_BACKEND in the environment, then `set_backend`'s."""

from __future__ import annotations

import os

backend: str | None = os.environ.get("FUSEDRNN_BACKEND") or None
