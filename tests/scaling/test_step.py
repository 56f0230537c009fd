import dataclasses

import pytest

from mas_hpc.config import RunConfig
from mas_hpc.launch.site import load_site
from mas_hpc.scaling.compute import forward_flops, trained_of, training_flops
from mas_hpc.scaling.load import Lengths, chain, load_of
from mas_hpc.scaling.machine import machine_of, written
from mas_hpc.scaling.memory import activation_bytes, memory_of, shards_of
from mas_hpc.scaling.shape import named_shape, shape_of
from mas_hpc.scaling.step import Question, efficiency, predict

LENGTHS = Lengths(question=100, completion=200, sigma=0.8, limit=1024, source="here")


def config(**sections: object) -> RunConfig:
    base = {"method": {"kind": "at_grpo", "tasks_per_step": 48, "group_size": 8}, "model": {"dtype": "bfloat16"}}
    return RunConfig.model_validate(base | sections)


def question(run: RunConfig, name: str = "agpt-2b", weak_from: int = 0) -> Question:
    machine = machine_of(load_site("aurora"))
    return Question(config=run, shape=named_shape(name), lengths=LENGTHS, machine=machine, weak_from=weak_from)


def test_a_tree_by_hand() -> None:
    # Q=10, C=4, 2 turns of 3 siblings: 10 + 12 + 12 tokens; rows of 14 and 18 tokens, three times each
    work = chain(10, 4, 2, 3)
    assert (work.tokens, work.predictors, work.rows) == (34, 24, 96)
    assert work.pairs == 50 + 3 * (40 + 8) + 3 * (56 + 8)


def test_episodes_of_grpo_share_their_question_alone() -> None:
    run = config(method={"kind": "grpo", "tasks_per_step": 2, "group_size": 4}, team={"topology": "single"})
    load = load_of(run, dataclasses.replace(LENGTHS, question=10, completion=4))
    assert load.units == load.completions == 8
    assert load.trained.tokens == 2 * (10 + 4 * 4)
    assert load.trained.rows == 8 * 14


def test_flops_agree_with_those_that_a_run_counts() -> None:
    import torch

    from mas_hpc.models.load import load_model
    from mas_hpc.training.flops import ModelCost

    run = RunConfig.model_validate({"model": {"hidden_size": 64, "num_layers": 2, "num_heads": 4}})
    model, _ = load_model(run.model, seed=0)
    counted = ModelCost.of(model).step(torch.arange(32), 24)
    shape = shape_of(run.model)
    work = dataclasses.replace(chain(8, 24, 1, 1), pairs=32 * 33 / 2)
    assert training_flops(shape, work, trained_of(run, shape)) == pytest.approx(counted)


def test_checkpointing_and_adapters_change_what_is_computed() -> None:
    shape, work = named_shape("agpt-2b"), chain(100, 200, 1, 1)
    plain, again = config(), config(model={"activation_checkpointing": True})
    adapters = config(adapters={"policies": "per_agent"})
    flops = [training_flops(shape, work, trained_of(run, shape)) for run in (plain, again, adapters)]
    assert flops[1] - flops[0] == forward_flops(shape, work)
    assert flops[2] < 0.75 * flops[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"strategy": "ddp"}, (1, 1, 1)),
        ({"strategy": "fsdp2"}, (48, 48, 48)),
        ({"strategy": "fsdp2", "shard_size": 12}, (12, 12, 12)),
        ({"strategy": "zero1"}, (1, 1, 48)),
        ({"strategy": "zero2"}, (1, 48, 48)),
        ({"strategy": "zero3"}, (48, 48, 48)),
    ],
)
def test_strategies_split_what_they_say(settings: dict[str, object], expected: tuple[int, int, int]) -> None:
    shards = shards_of(config(distributed=settings).distributed, 48)
    assert (shards.weights, shards.gradients, shards.optimizer) == expected


def test_seven_billion_weights_of_16_bytes_do_not_fit_a_tile_and_sharded_ones_do() -> None:
    run = config(method={"kind": "sft"}, model={"dtype": "float32", "activation_checkpointing": True, "max_tree_tokens": 1024})
    shape = dataclasses.replace(named_shape("agpt-2b"), layers=84)
    trained = trained_of(run, shape)
    assert 6.5e9 < shape.parameters < 8e9
    whole = memory_of(run, shape, trained, 48, 1024)
    assert whole.weights + whole.gradients + whole.optimizer == pytest.approx(16 * shape.parameters)  # arXiv 2604.00785
    site = load_site("aurora")
    assert not whole.fits(site.tile.memory_gib * 2**30, 1e12)
    split = memory_of(run.model_copy(update={"distributed": config(distributed={"strategy": "fsdp2"}).distributed}), shape,
                      trained, 48, 1024)  # fmt: skip
    assert split.fits(site.tile.memory_gib * 2**30, 1e12)
    assert split.optimizer == pytest.approx(whole.optimizer / 48)


def test_activations_of_a_published_run_are_met() -> None:
    # 20B, 64 nodes, 8192 and 16384 tokens a tile: 28.86 and 39.97 GiB (agpt-20b.md); what a token adds is their difference
    shape = named_shape("agpt-20b")
    more = activation_bytes(shape, 16384, 2, True) - activation_bytes(shape, 8192, 2, True)
    assert more / 2**30 == pytest.approx(39.97 - 28.86, rel=0.4)  # theirs holds all logits of a chunked loss beside


def test_a_larger_batch_takes_longer_and_more_nodes_never_raise_efficiency_in_weak_scaling() -> None:
    run = config(distributed={"strategy": "fsdp2"})
    predictions = [predict(question(run, weak_from=4), nodes) for nodes in (4, 64, 1024, 4096)]
    shares = [efficiency(predictions, one) for one in predictions]
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    doubled = predict(question(config(distributed={"strategy": "fsdp2"}, method={"kind": "at_grpo", "tasks_per_step": 96})), 4)
    assert doubled.seconds > predictions[0].seconds


def test_ranks_without_work_are_named_as_the_limit() -> None:
    one = predict(question(config()), 1000)
    assert one.limit == "no_units"
    assert one.idle == 1 - 48 / 12000


def test_parts_add_up_and_the_band_holds_the_prediction() -> None:
    one = predict(question(config()), 4)
    assert sum(one.parts.values()) == pytest.approx(one.seconds)
    assert min(one.parts.values()) >= 0
    assert one.low < one.seconds < one.high


def test_a_site_that_nobody_has_fitted_says_so() -> None:
    assert "none was fitted" in machine_of(load_site("laptop")).source
    assert machine_of(load_site("aurora")).gemm_flops < written(load_site("aurora")).gemm_flops


def test_ranks_that_share_layers_halve_weights_and_pay_for_sums_of_every_layer() -> None:
    run, split = (config(method={"kind": "sft", "batch_size": 96}, distributed={"tensor_parallel": size}) for size in (1, 2))
    whole, half = predict(question(run), 4), predict(question(split), 4)
    assert half.memory.weights == whole.memory.weights / 2
    # 96 documents of 48 ranks, or of 24 pairs of them: the same products a rank
    assert half.parts["passes"] == pytest.approx(whole.parts["passes"])
    shape = question(run).shape
    tokens = half.load.trained.tokens / 24
    card = load_site("aurora").links["card"]
    sums = shape.layers * 4 * (2 * card.latency_us * 1e-6 + tokens * shape.width * 2 / card.gb_per_s / 1e9)
    reduced = half.parts["collectives"] - sums
    assert 0 < reduced < whole.parts["collectives"]  # half of the gradients


def test_ranks_that_share_layers_serve_their_parts_of_them() -> None:
    shape = question(config()).shape
    copies = {
        ("ddp", 1, "native"): 0.0, ("ddp", 2, "native"): 0.0, ("ddp", 2, "vllm"): 1.0, ("fsdp2", 1, "native"): 1.0,
        ("fsdp2", 2, "native"): 0.5,
    }  # fmt: skip
    found = {}
    for (strategy, size, engine), part in copies.items():
        run = config(distributed={"tensor_parallel": size, "strategy": strategy}, rollout={"engine": engine})
        found[strategy, size, engine] = predict(question(run), 4)
        assert found[strategy, size, engine].memory.gathered == part * 2 * shape.parameters
    one, two = (found["ddp", size, "native"] for size in (1, 2))
    assert two.memory.weights == one.memory.weights / 2
    # half as many play, with the memory of two: as fast where reading weights takes the time, but for the sums of every layer
    assert 0.5 * one.parts["decode"] < two.parts["decode"] < 2 * one.parts["decode"]
    assert two.parts["decode"] != found["ddp", 2, "vllm"].parts["decode"]
    assert found["fsdp2", 2, "native"].parts["sync"] < found["fsdp2", 1, "native"].parts["sync"]


def test_a_critic_is_a_second_model_and_a_reference_a_third_of_a_pass() -> None:
    grpo = config(method={"kind": "grpo", "tasks_per_step": 96, "group_size": 2})
    ppo = config(method={"kind": "ppo", "tasks_per_step": 192})
    dpo = [config(method={"kind": "dpo", "batch_size": 96, "reference_free": free}) for free in (True, False)]
    one, with_critic = predict(question(grpo), 4), predict(question(ppo), 4)
    assert with_critic.memory.optimizer == 2 * one.memory.optimizer
    assert with_critic.parts["passes"] > 2 * one.parts["passes"]
    free, held = (predict(question(run), 4).parts["passes"] for run in dpo)
    assert held / free == pytest.approx(4 / 3, rel=0.01)
