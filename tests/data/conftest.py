"""Fixtures of the prepared folder."""

import pytest

import bert4rec_hf.data.preparation
import bert4rec_hf.data.splits


@pytest.fixture
def saved_catalogues(monkeypatch):
    """Record the arguments for the tokenizer and save none, so that these tests do not depend on it."""
    saved = []
    monkeypatch.setattr(
        bert4rec_hf.data.preparation,
        "_save_catalogue",
        lambda folder, catalogue, titles, max_length, features: saved.append((catalogue, titles, max_length)),
    )
    return saved
