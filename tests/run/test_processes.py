"""Processes that do not reach each other say so in one line; tests/cluster/test_machines.py has two machines do it."""

import pytest

from utils.errors import UserError, one_line_errors
from utils.launch import meeting_by_gloo


def test_processes_that_gloo_does_not_bring_together():
    """By the words of the error that torch raised between two machines."""
    said = "Gloo connectFullMesh failed with [pair.cc:152] timed out connecting: Connection refused, remote=[127.0.0.1]"
    remedy = r"not reach each other by gloo: RuntimeError: Gloo .*: set GLOO_SOCKET_IFNAME"
    with pytest.raises(UserError, match=remedy), meeting_by_gloo():
        raise RuntimeError(said)


def test_any_other_error_is_left_as_it_is():
    with pytest.raises(RuntimeError, match="CUDA out of memory"), meeting_by_gloo():
        raise RuntimeError("CUDA out of memory")


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_one_that_has_died_is_no_wrong_network(monkeypatch, capsys, how):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), one_line_errors(), meeting_by_gloo():
        raise RuntimeError(f"[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection {how} by peer [::1]")
    assert capsys.readouterr().err == "process 1 ends, since another one has\n"
