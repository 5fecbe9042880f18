import contextlib
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import support  # before PyTorch and NumPy: with a thread for every core two workers get in each other's way

import pytest
import torch

torch.set_num_threads(1)

# A suite that is started in the background ignores Ctrl-C, and so would every script that it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def refused(capsys):
    """refused(*words): a block that must end the program with status 2 and one line that has these in it."""

    @contextlib.contextmanager
    def block(*words):
        with pytest.raises(SystemExit) as stop:
            yield
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        assert all(word in err for word in words), err

    return block


def pytest_configure(config):
    config.addinivalue_line(
        "filterwarnings", "ignore:.*is out of date"
    )  # the v4 environments of the published tables
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.script")  # raised inside torch itself
