"""A sentence-transformers directory around a tiny encoder."""

import json
import shutil
from pathlib import Path

PREFIX = "sentence_transformers.models"


def sentence_directory(encoder: Path, place: Path, **pooling) -> Path:
    """The encoder with pooling (by default the mean) and normalisation behind it."""
    shutil.copytree(encoder, place)
    names = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"{PREFIX}.{name}"}
        for index, (name, path) in enumerate(names.items())
    ]
    (place / "modules.json").write_text(json.dumps(modules))
    (place / "1_Pooling").mkdir()
    config = {"word_embedding_dimension": 32, **(pooling or {"pooling_mode_mean_tokens": True})}
    (place / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return place
