"""Two ranks that train with ZeRO-3 and hand their weights to engines beside them; outcomes go to <folder>/<rank>.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
from torch import nn

from mas_hpc.checksum import checksum
from mas_hpc.distributed.weight_source import ZeroWeights
from mas_hpc.distributed.world import World, connected

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,  # SGD
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def model_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles for minutes
    with connected(World.from_env()) as world:
        model = model_of(3)
        before = checksum(("base", name, parameter) for name, parameter in model.named_parameters())
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5), config=CONFIG)
        source = ZeroWeights((("base", name, p) for name, p in engine.module.named_parameters()), gather_bytes=200)
        gathered = checksum(source)
        shards = [parameter.numel() for parameter in engine.module.parameters()]
        engine.backward(engine(torch.ones(1, 6)).square().sum())
        engine.step()

        alone = model_of(3)
        alone(torch.ones(1, 6)).square().sum().backward()
        torch.optim.SGD(alone.parameters(), lr=0.5).step()
        pairs = zip(source, alone.parameters(), strict=True)
        close = [torch.allclose(tensor, expected, atol=1e-6) for (_, _, tensor), expected in pairs]
        shapes = [spec.shape for spec in source.specs]
        found = {"before": before, "gathered": gathered, "shards": shards, "close": close, "shapes": shapes}
        (Path(sys.argv[1]) / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
