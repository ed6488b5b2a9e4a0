"""Every test process: one thread, no network, the mirror if one is beside the checkout."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MIRROR = next((p for p in [ROOT.parent / "shared" / "data"] if (p / "molecules" / "MANIFEST.csv").is_file()), None)

for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[key] = "1"
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if MIRROR and "MATFM_DATA_MIRROR" not in os.environ:
    os.environ["MATFM_DATA_MIRROR"] = str(MIRROR)


@pytest.fixture(scope="session")
def root() -> Path:
    "The checkout."
    return ROOT


@pytest.fixture(scope="session")
def mirror() -> Path:
    "The folder of mirrored public data; the test is skipped where there is none."
    path = os.environ.get("MATFM_DATA_MIRROR", "")
    if not path or not Path(path).is_dir():
        pytest.skip("no data mirror: set MATFM_DATA_MIRROR to a folder of mirrored data sets")
    return Path(path)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    "Tests share one cache of their own, never the user's."
    cache = tmp_path_factory.getbasetemp() / "cache"
    cache.mkdir(exist_ok=True)
    monkeypatch.setenv("MATFM_DATA_CACHE", str(cache))


@pytest.fixture
def one_thread():
    "Torch computes on one thread, so that sums come out the same."
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
