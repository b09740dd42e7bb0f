import socket
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder with a toy anchor in runs/, trained on a third of its usual pairs."""
    folder = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(train.SETTINGS["text"], "toy_samples", 12000)
        anchor = train.Run(train.TOY_ANCHOR)
        train.train(train.parse_args(["--pair", "image-text", "--workers", "2"]), anchor)
    return folder


@pytest.fixture
def run(workplace, monkeypatch, capsys):
    """Trains in the workplace by command line, in this process; returns the run's folder."""
    monkeypatch.chdir(workplace)

    def run(*options, out):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options), "--out", str(out)])
        monkeypatch.setattr(train.STOP, "is_set", False)
        train.main()
        return Path(out)

    return run


@pytest.fixture
def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
