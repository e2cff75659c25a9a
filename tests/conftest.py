# SPDX-License-Identifier: Apache-2.0
"""The routes under test: every backend, and the native one once per instruction set that this machine has.

All backends must be there; set FUSEDRNN_BACKEND to test one only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import fusedrnn
from fusedrnn import backends, config


@dataclass(frozen=True)
class Route:
    """A backend and, for the native one, an instruction set."""

    backend: str
    isa: str = ""

    def __str__(self) -> str:
        return f"{self.backend}-{self.isa}" if self.isa else self.backend


NAMES = [config.backend] if config.backend else list(backends.NAMES)


def _routes() -> list[Route]:
    native = backends.load("native") if "native" in NAMES else None
    routes = []
    for name in NAMES:
        if name == "native" and native:
            routes += [Route(name, isa) for isa in native.isas_found]
        else:
            routes.append(Route(name))
    return routes


def _run_on(request: Any) -> Iterator[Any]:
    found = backends.choose(request.param.backend)  # fails where it is missing, and says why
    if not request.param.isa:
        yield found
        return
    before = found.isa()
    found.set_isa(request.param.isa)
    yield found
    found.set_isa(before)


@pytest.fixture(scope="session", params=["twin", "gpu"])
def twin_extension(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The CUDA backend's bindings over the CPU twin of the device; and over a GPU, where there is one."""
    import cuda_twin

    on_gpu = request.param == "gpu"
    if why := cuda_twin.why_no_gpu() if on_gpu else cuda_twin.why_not():
        pytest.skip(why)
    before = cuda_twin.memory
    if on_gpu:
        cuda_twin.memory = cuda_twin.MemoryOfTorch("cuda")
        yield cuda_twin.OnGpu(backends.load("native").cuda)
    else:
        yield cuda_twin.build(tmp_path_factory.mktemp("twin"))
    cuda_twin.memory = before


@pytest.fixture
def twin(twin_extension: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same as the backend that fusedrnn takes for arrays on a device: cuda_twin.Chip."""
    import sys

    import cuda_twin
    from fusedrnn import arrays

    monkeypatch.setattr(backends.load("native"), "cuda", twin_extension)
    monkeypatch.delitem(backends._missing, "cuda", raising=False)
    monkeypatch.delitem(backends._loaded, "cuda", raising=False)
    monkeypatch.delitem(sys.modules, "fusedrnn.backends.cuda", raising=False)
    monkeypatch.delattr(backends, "cuda", raising=False)
    monkeypatch.setitem(arrays.MAKERS, "cuda_twin", cuda_twin.make)
    twin_extension.pretend()
    twin_extension.schedule(1)
    backend = backends.load("cuda")
    yield backend
    twin_extension.pretend()
    backends._loaded.pop("cuda", None)
    sys.modules.pop("fusedrnn.backends.cuda", None)


@pytest.fixture(params=_routes(), ids=str)
def route(request: Any) -> Iterator[Any]:
    """The module of a backend; the native one on one instruction set."""
    yield from _run_on(request)


@pytest.fixture(params=[r for r in _routes() if r.backend != "reference"], ids=str)
def judged(request: Any) -> Iterator[Any]:
    """The same without the judge itself."""
    yield from _run_on(request)


@pytest.fixture(params=[r for r in _routes() if r.backend == "native"], ids=str)
def kernels(request: Any) -> Iterator[Any]:
    """The native backend only: the tangents of the others are the judge's."""
    yield from _run_on(request)


@pytest.fixture(params=NAMES)
def backend(request: Any) -> Iterator[str]:
    """The name of a backend, which all calls run on meanwhile."""
    before = config.backend
    fusedrnn.set_backend(request.param)
    yield request.param
    config.backend = before


@pytest.fixture(autouse=True, scope="session")
def _all_threads() -> None:
    """Tests want all the threads that they ask for, however busy the machine is."""
    native = backends.load("native")
    if native:
        native.ignore_crowd(True)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace["fusedrnn"] = fusedrnn
    doctest_namespace["np"] = np
