"""The scalar head: reproducible, in float32, and back from disk bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mas_hpc.errors import CheckpointError
from mas_hpc.models.heads import WEIGHTS_FILE, ScalarHead


def test_one_number_a_token_by_hand() -> None:
    head = ScalarHead(2, seed=0)
    head.load_state_dict({"score.weight": torch.tensor([[2.0, -1.0]]), "score.bias": torch.tensor([0.5])})
    hidden = torch.tensor([[[1.0, 1.0], [0.0, 3.0]]])
    assert head(hidden).tolist() == [[1.5, -2.5]]
    assert head(hidden[:, :0]).shape == (1, 0)


def test_weights_come_from_the_seed_alone_with_the_published_spread() -> None:
    before = torch.get_rng_state()
    head, same, other = (ScalarHead(9999, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(head.score.weight, same.score.weight) and not torch.equal(head.score.weight, other.score.weight)
    assert head.score.weight.std().item() == pytest.approx(0.01, rel=0.03)  # 1 / sqrt(9999 + 1)
    assert head.score.bias.tolist() == [0.0]


def test_low_precision_hidden_states_give_float32_values_and_their_own_gradients() -> None:
    head = ScalarHead(8, seed=0)
    hidden_TD = torch.randn(5, 8).bfloat16().requires_grad_()
    value_T = head(hidden_TD)
    value_T.sum().backward()
    assert value_T.dtype == torch.float32 and hidden_TD.grad is not None and hidden_TD.grad.dtype == torch.bfloat16
    assert torch.equal(value_T, head(hidden_TD.float()))
    assert head.score.bias.grad is not None and head.score.bias.grad.item() == 5.0


def test_saved_head_comes_back_bit_equal_under_its_published_names(tmp_path: Path) -> None:
    head = ScalarHead(6, seed=1)
    head.save(tmp_path / "critic")
    assert load_file(tmp_path / "critic" / WEIGHTS_FILE).keys() == {"score.weight", "score.bias"}
    loaded = ScalarHead.load(tmp_path / "critic", 6)
    assert torch.equal(loaded.score.weight, head.score.weight) and torch.equal(loaded.score.bias, head.score.bias)
    assert loaded.score.weight.requires_grad


def test_a_file_that_is_absent_damaged_or_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read a scalar head"):
        ScalarHead.load(tmp_path, 6)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="copy the folder again"):
        ScalarHead.load(tmp_path, 6)
    ScalarHead(5, seed=0).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"\(1, 5\).*expected.*\(1, 6\).*set model.path"):
        ScalarHead.load(tmp_path, 6)
    save_file({"score.weight": torch.zeros(1, 6)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"expected .*score\.bias"):
        ScalarHead.load(tmp_path, 6)


def test_a_head_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write the scalar head"):
        ScalarHead(2, seed=0).save(tmp_path / "file")
