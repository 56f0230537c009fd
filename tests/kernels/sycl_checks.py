"""Checks of the SYCL kernels, which test_sycl.py runs in a process of their own.

On the XPU where there is one (pytest tests/kernels/sycl_checks.py), else on the CPU device.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from mas_hpc_kernels import reference, sycl
from mas_hpc_kernels.operation import LogitRule, Problem, Statistics, Upstream, VocabularyShard, merge_parts
from mas_hpc_kernels.sycl.rows import Geometry, Rows
from torch import Tensor

DEVICE = "xpu" if torch.xpu.is_available() else "cpu"
DEFAULT = sycl.DEFAULTS[DEVICE]
GEOMETRIES = (Geometry(16, 64), Geometry(16, 1024), Geometry(32, 32), Geometry(32, 512))


def plain(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Problem:
    tensors = {"hidden_ND": hidden_ND, "weight_VD": weight_VD, "target_N": target_N}
    there = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    return Problem(**there, bias_V=None, softcap=0.0, inverse_temperature=1.0)


def problem(num_targets: int, vocabulary: int, dtype: torch.dtype = torch.float64, hidden: int = 8) -> Problem:
    """Logits of a few units."""
    generator = torch.Generator().manual_seed(vocabulary)
    hidden_ND = torch.randn(num_targets, hidden, dtype=torch.float64, generator=generator)
    weight_VD = torch.randn(vocabulary, hidden, dtype=torch.float64, generator=generator) * (8 / hidden) ** 0.5
    target_N = torch.randint(vocabulary, (num_targets,), generator=generator)
    return plain(hidden_ND.to(dtype), weight_VD.to(dtype), target_N)


def upstream(given: Problem) -> Upstream:
    logprob_N, entropy_N = torch.linspace(-1, 1, 2 * len(given.target_N), dtype=given.dtype, device=DEVICE).view(2, -1)
    return Upstream(logprob_N, entropy_N)


def expected(given: Problem) -> tuple[Tensor, ...]:
    """Log-probability, entropy, and the gradients of hidden states, head and, if there is one, bias, in float64."""
    leaves = [given.hidden_ND, given.weight_VD, *([] if given.bias_V is None else [given.bias_V])]
    hidden_ND, weight_VD, *bias = (leaf.double().requires_grad_() for leaf in leaves)
    rule = LogitRule(bias_V=bias[0] if bias else None, softcap=given.softcap)
    temperature = 1 / given.inverse_temperature
    logprob_N, entropy_N = reference.linear_logprob(
        hidden_ND, weight_VD, given.target_N, temperature=temperature, entropy_gradient=True, rule=rule
    )
    outer_N = [values_N.double() for values_N in upstream(given)]
    gradients = torch.autograd.grad((logprob_N, entropy_N), (hidden_ND, weight_VD, *bias), outer_N)
    return logprob_N.detach(), entropy_N.detach(), *gradients


def computed(given: Problem, geometry: Geometry = DEFAULT) -> tuple[Tensor, ...]:
    whole = sycl.statistics(given, need_entropy=True, geometry=geometry)
    hidden_ND, weight_VD, bias_V = sycl.gradients(given, whole, upstream(given), need_head=True, geometry=geometry)
    return whole.logprob_N, whole.entropy_N, hidden_ND, weight_VD, *([] if bias_V is None else [bias_V])


def assert_equal(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], logprob: float, entropy: float, gradient: float) -> None:
    """Within absolute errors of log-probability and entropy, and relative errors of the norms of gradients."""
    assert (ours[0].double() - theirs[0]).abs().max() <= logprob
    assert (ours[1].double() - theirs[1]).abs().max() <= entropy
    for value, exact in zip(ours[2:], theirs[2:], strict=True):
        assert (value.double() - exact).norm() <= gradient * exact.norm()


def assert_exact(given: Problem, ours: tuple[Tensor, ...]) -> None:
    assert_equal(ours, expected(given), 1e-12, 1e-12, 1e-12)


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 63, 512, 1000, 4097])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: "-".join(map(str, geometry)))
def test_every_geometry_gives_the_oracle_whatever_the_vocabulary_is_a_multiple_of(geometry, vocabulary):
    given = problem(3, vocabulary)
    assert_exact(given, computed(given, geometry))


@pytest.mark.parametrize(("softcap", "inverse_temperature"), [(2.0, 1.0), (0.0, 1.7), (0.5, 0.3)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_bias_softcap_and_temperature_act_in_this_order(has_bias, softcap, inverse_temperature):
    bias_V = torch.linspace(-2, 2, 100, dtype=torch.float64, device=DEVICE) if has_bias else None
    given = replace(problem(5, 100), bias_V=bias_V, softcap=softcap, inverse_temperature=inverse_temperature)
    assert_exact(given, computed(given))


# float32: rounding of sums over the vocabulary. The others: products and their gradients have 11 and 8 bits.
@pytest.mark.parametrize(
    ("dtype", "tolerances"),
    [
        (torch.float32, (1e-5, 5e-5, 1e-5)),
        (torch.float16, (1e-2, 5e-3, 2e-3)),
        (torch.bfloat16, (8e-2, 4e-2, 1.5e-2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("vocabulary", [49152, 151936])
def test_full_vocabularies_in_each_type(vocabulary, dtype, tolerances):
    given = problem(4, vocabulary, dtype, hidden=64)
    ours = computed(given)
    assert {value.dtype for value in ours} == {torch.float32}
    assert_equal(ours, expected(given), *tolerances)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_to_the_nearest_number_of_their_type(dtype):
    """Of three equal logits: 2/3 and -1/3, neither of which the type has."""
    numbers = {"dtype": torch.float32, "device": DEVICE}
    statistics = Statistics(*(torch.tensor([value], **numbers) for value in (0.0, 3.0, 0.0, 0.0)))
    rows = Rows(torch.zeros(1, 3, dtype=dtype, device=DEVICE), torch.tensor([1], device=DEVICE), None, 0.0, 1.0)
    sycl.kernels_for(DEVICE, None).product_gradient(rows, statistics, Upstream(torch.ones(1, **numbers), None))
    assert torch.equal(rows.product_CV[0], torch.tensor([-1 / 3, 2 / 3, -1 / 3], **numbers).to(dtype))


def test_results_do_not_depend_on_the_size_of_chunks(monkeypatch: pytest.MonkeyPatch):
    given = problem(7, 100)
    monkeypatch.setattr(sycl, "CHUNK_ELEMENTS", 3 * 100)  # chunks of 3, 3 and 1 rows
    assert_exact(given, computed(given))


def test_large_logits_keep_their_entropy():
    """Logits 10000, 9999 and 0 leave a coin of 1 : 1/e, whose entropy is 0.582203 nats."""
    weight_VD = torch.tensor([[1e4], [9999.0], [0.0]])
    given = plain(torch.ones(2, 1), weight_VD, torch.tensor([1, 0]))
    whole = sycl.statistics(given)
    assert whole.logprob_N.tolist() == pytest.approx([-1.313262, -0.313262], abs=1e-6)
    assert whole.entropy_N.tolist() == pytest.approx([0.582203, 0.582203], abs=1e-6)


def test_masked_tokens_have_no_probability_and_no_gradient():
    bias_V = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf, 0.0], device=DEVICE)
    given = replace(plain(torch.zeros(1, 2), torch.ones(5, 2), torch.tensor([1])), bias_V=bias_V)
    whole = sycl.statistics(given)
    assert whole.logprob_N.item() == pytest.approx(-1.0986123)  # three tokens are left
    assert whole.entropy_N.item() == pytest.approx(1.0986123)
    assert sycl.statistics(replace(given, target_N=given.target_N * 0)).logprob_N.item() == -torch.inf
    result = sycl.gradients(given, whole, Upstream(torch.ones_like(bias_V[:1]), torch.ones_like(bias_V[:1])), need_head=True)
    assert result.bias_V.tolist() == pytest.approx([0, 2 / 3, -1 / 3, 0, -1 / 3])


def test_a_nan_is_not_hidden():
    given = problem(2, 100)
    given.weight_VD[50, 0] = torch.nan
    assert sycl.statistics(given).logprob_N.isnan().all()


def test_shards_of_the_vocabulary_merge_to_the_whole():
    """Four tokens here and six there; each target is in one of them."""
    given = problem(6, 10)
    shards = [plain(given.hidden_ND, given.weight_VD[:4], given.target_N)]
    shards.append(plain(given.hidden_ND, given.weight_VD[4:], given.target_N - 4))
    parts = [sycl.statistics(shard) for shard in shards]
    merged = merge_parts(Statistics(*map(torch.stack, zip(*parts, strict=True))))
    there = [sycl.gradients(shard, merged, upstream(given), need_head=True) for shard in shards]
    hidden_ND = there[0].hidden_ND + there[1].hidden_ND
    weight_VD = torch.cat([part.weight_VD for part in there])
    assert_exact(given, (merged.logprob_N, merged.entropy_N, hidden_ND, weight_VD))


def ones(size: int) -> Tensor:
    return torch.ones(size, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_a_frozen_head_gives_its_slope_in_one_pass(softcap):
    given = replace(problem(7, 100), softcap=softcap, inverse_temperature=1.7, bias_V=ones(100))
    whole, slope_ND = sycl.statistics_and_slope(given, None)
    recomputed = sycl.gradients(given, sycl.statistics(given), Upstream(ones(7), None), need_head=False)
    torch.testing.assert_close(slope_ND, recomputed.hidden_ND, rtol=0, atol=1e-13)
    torch.testing.assert_close(whole.entropy_N, expected(given)[1], rtol=0, atol=1e-12)


def test_shards_of_a_frozen_head_sum_up_to_the_slope_of_the_whole():
    """Two ranks as threads, which meet at every reduction."""
    given = problem(6, 10)
    place, barrier = [ones(0), ones(0)], threading.Barrier(2, timeout=60)

    def rank(number: int) -> tuple[Statistics, Tensor]:
        def reduce(tensor: Tensor, how: str) -> Tensor:
            place[number] = tensor
            barrier.wait()
            total = place[0] + place[1] if how == "sum" else torch.maximum(*place)
            barrier.wait()
            return total

        rows, start = ((slice(0, 4), 0), (slice(4, 10), 4))[number]
        part = plain(given.hidden_ND, given.weight_VD[rows], given.target_N - start)
        return sycl.statistics_and_slope(part, VocabularyShard(start=start, reduce=reduce))

    whole, slope_ND = sycl.statistics_and_slope(given, None)
    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(rank, range(2)))
    for there, slope_there_ND in ranks:
        torch.testing.assert_close(there.logprob_N, whole.logprob_N, rtol=0, atol=1e-13)
        torch.testing.assert_close(slope_there_ND, slope_ND, rtol=0, atol=1e-13)


def test_kept_products_spare_the_backward_a_product_and_serve_it_twice():
    given = problem(5, 100)
    keeping = replace(given, kept=[])
    whole = sycl.statistics(keeping)
    assert [tuple(product_CV.shape) for product_CV in keeping.kept] == [(5, 100)]
    unreadable = replace(keeping, weight_VD=keeping.weight_VD * torch.nan)  # its head would show in the logits
    fresh = sycl.gradients(given, whole, upstream(given), need_head=True)
    for _ in range(2):
        reused = sycl.gradients(unreadable, whole, upstream(given), need_head=True)
        assert torch.equal(reused.weight_VD, fresh.weight_VD)


def test_no_targets_and_a_frozen_head():
    empty = problem(0, 10)
    whole = sycl.statistics(empty)
    result = sycl.gradients(empty, whole, Upstream(ones(0), None), need_head=True)
    assert whole.logprob_N.shape == (0,) and result.hidden_ND.shape == (0, 8) and not result.weight_VD.any()
    given = replace(problem(3, 10), bias_V=ones(10))
    frozen = sycl.gradients(given, sycl.statistics(given), Upstream(ones(3), None), need_head=False)
    assert frozen.weight_VD is None and frozen.bias_V is None
    assert frozen.hidden_ND.shape == (3, 8)


def test_an_upstream_gradient_that_is_one_number_for_all_rows():
    given = problem(4, 10)
    whole = sycl.statistics(given)
    one = sycl.gradients(given, whole, Upstream(ones(1).expand(4), None), need_head=False)
    four = sycl.gradients(given, whole, Upstream(ones(4), None), need_head=False)
    assert torch.equal(one.hidden_ND, four.hidden_ND)
