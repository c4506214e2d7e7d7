"""Tests never reach for a network: a model that is not on disk fails at once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
