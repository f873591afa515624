from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a folder, as a user would name it with --model."""
    from tiny_text import make_loaded  # torch may be missing when this file is read

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    loaded = make_loaded()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder
