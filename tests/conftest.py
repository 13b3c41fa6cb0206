"""What tests share: one Ray with ranks that stay warm."""

import gc
import os
import sys
import warnings
from contextlib import contextmanager

import pytest

# tests run on the CPU: torch, transformers and diffusers would load an installed torch_npu, and fail without CANN
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
sys.modules["torch_npu"] = None


@pytest.fixture(scope="session")
def _warm_ranks():
    from framework.cluster.options import LOADER, ClusterOptions
    from framework.cluster.ray_session import RaySession

    with _lenient():
        session = RaySession.start(ClusterOptions(), ranks=4, device="cpu", threads=1, loader=LOADER)
    yield session
    with _lenient():
        session.close()
        del session
        gc.collect()


@contextmanager
def _lenient():
    # Ray leaves its processes' objects to the collector, which warns of them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def warm_session(_warm_ranks):
    """A session whose ranks were used before and will be again: load a plan of up to 4 ranks on it.

    Mark the test `ray`. A test that loads something else than a model passes `loader="module:function"`.
    """
    yield _warm_ranks
    _warm_ranks.unload()
