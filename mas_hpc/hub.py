"""Repositories of the Hugging Face hub as folders of this machine: fetched once, then read without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
"""Weights in other formats are left where they are."""


def folder_of(name: str, kind: Literal["model", "dataset"], *, refresh: bool = False) -> Path:
    """The repository in the hub's cache. The network is asked for what is not there, and with `refresh` for what has changed.

    Under HF_HUB_OFFLINE nothing asks it. Raises OSError or ValueError, as the hub's library does, for a name that is neither
    cached nor to be had.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if constants.HF_HUB_OFFLINE or not refresh:
        try:
            return Path(snapshot_download(name, repo_type=kind, local_files_only=True))
        except LocalEntryNotFoundError:
            if constants.HF_HUB_OFFLINE:
                option = "" if kind == "model" else " --repo-type dataset"
                raise FileNotFoundError(
                    f"not in the hub's cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to fetch it; run, where "
                    f"there is a network, hf download {name}{option}, or name a local folder"
                ) from None
    return Path(snapshot_download(name, repo_type=kind, allow_patterns=list(MODEL_FILES) if kind == "model" else None))
