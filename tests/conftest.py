"""What tests share: where test data lies, and which reference packages are there."""
import importlib
import io
import os
import struct
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="module")
def one_thread():
    """Models this small lose more to the meeting of threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def call(room, *args, check=0, stdin=""):
    """A room's command in this process, with that text or file as its input: (what it printed, its errors)."""
    from bpe import cli
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{room.__name__}.py", *map(str, args)])
        patch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        try:
            cli(room.main)
        except SystemExit as exit:
            status = exit.code
    assert status == check, err.getvalue() + out.getvalue()
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct as a Hugging Face folder; the tool beside the test data downloads and writes it."""
    package("gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, need("../tools/get_smollm2.py"), folder], check=True)
    return folder


def write_tok512(path):
    """llama2.c's format: the 256 bytes, the letters of "▁ab" and two merges, the later scored lower."""
    tokens = [("<unk>", 0), ("\n<s>\n", 0), ("\n</s>\n", 0)]
    tokens += [(f"<0x{b:02X}>", 0) for b in range(256)]
    tokens += [(" a", -1.0), ("ab", -2.0), (" ", -3.0), ("a", -4.0), ("b", -5.0)]
    data = b"".join(struct.pack("<fi", score, len(t)) + t.encode() for t, score in tokens)
    path.write_bytes(struct.pack("<i", 7) + data)
