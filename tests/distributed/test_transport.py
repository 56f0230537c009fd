"""Both transports under the same assertions, between real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks

RANKS = str(Path(__file__).with_name("transport_ranks.py"))


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "transport"), [("torchrun", "GlooTransport"), ("mpiexec", "MPITransport")])
def test_three_ranks_exchange_every_size_at_once_in_order(launcher: str, transport: str) -> None:
    done = run_ranks(launcher, 3, RANKS)
    assert done.returncode == 0, done.stderr
    for rank in range(3):
        assert f"{transport} of rank {rank} holds" in done.stdout
