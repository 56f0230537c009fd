"""Two ranks that train, stop and go on under two strategies, and after one rank: argv is a folder, and the strategies."""

from __future__ import annotations

import sys
from pathlib import Path

from mas_hpc.distributed.world import World, connected
from tests.phases.resuming import train

STOP = ("train", 2)


def main() -> None:
    runs, strategies = Path(sys.argv[1]), sys.argv[2:]
    with connected(World.from_env()) as world:

        def go(kind: str, strategy: str, name: str, *, where: Path = runs, **how) -> str:
            words = (f"distributed.strategy={strategy}", f"name={name}")
            return train(where, kind, *words, world=world, **how)

        for strategy in strategies:
            for kind in ("sft", "at_grpo"):
                name = f"{kind}_{strategy}"
                go(kind, strategy, name, where=runs / "whole")
                go(kind, strategy, name, stop=STOP)
                go(kind, strategy, name, resume=True)
            said = go("sft", strategy, f"one_to_{strategy}", resume=True)
            assert "goes on after step 2/6, which 1 ranks wrote and 2 go on from" in said or not world.is_first, said
            go("sft", strategy, f"{strategy}_to_one", stop=STOP)
        for first, then in (strategies, strategies[::-1]):
            go("sft", first, f"{first}_to_{then}", stop=STOP)
            go("sft", then, f"{first}_to_{then}", resume=True)


if __name__ == "__main__":
    main()
