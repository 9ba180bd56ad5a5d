"""What tests share: where test data lies, and which reference packages are there."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, not seconds; run with -m slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m") and not any("::" in arg for arg in config.args):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


def need(name):
    """The path of a file under TEST_DATA; without it the test is skipped, in CI it fails."""
    path = Path(os.environ.get("TEST_DATA", "")) / name
    if not os.environ.get("TEST_DATA") or not path.exists():
        reason = f"needs {name} under the folder that TEST_DATA names"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return path


def package(name):
    """A reference package that only tests use; without it the test is skipped, in CI it fails."""
    try:
        return importlib.import_module(name)
    except ImportError:
        reason = f"needs the package {name}: pip install -r tests/requirements.txt"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct as a Hugging Face folder; the tool beside the test data downloads and writes it."""
    package("gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, need("../tools/get_smollm2.py"), folder], check=True)
    return folder
