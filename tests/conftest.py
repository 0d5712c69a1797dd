import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a network
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch

from tests.tiny import save_pipeline

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny epsilon-prediction pipeline."""
    return save_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_v(tmp_path_factory):
    """Folder of a tiny v-prediction pipeline."""
    return save_pipeline(tmp_path_factory.mktemp("tiny_v"), "v_prediction")
