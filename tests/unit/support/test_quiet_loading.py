"""Other libraries' bars are off while weights are loaded, and afterwards as they were."""

from __future__ import annotations

import logging

import pytest
from huggingface_hub import utils as hub
from transformers import modeling_gguf_pytorch_utils as gguf
from transformers.utils import logging as bars

from langchain_lora_retriever.support.quiet_loading import quiet_loading


def state() -> tuple[object, ...]:
    """What is shown, and by what."""
    return bars.is_progress_bar_enabled(), hub.are_progress_bars_disabled(), gguf.tqdm


@pytest.mark.parametrize("shows", [True, False])
def test_bars_are_off_while_weights_are_loaded(shows: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of downloads stay as they are; loads may overlap and fail."""
    before = state()
    try:
        (bars.enable_progress_bar if shows else bars.disable_progress_bar)()
        chosen = state()
        with quiet_loading:
            with pytest.raises(ZeroDivisionError), quiet_loading:
                raise ZeroDivisionError
            assert not bars.is_progress_bar_enabled()
            assert hub.are_progress_bars_disabled() is not shows
            list(gguf.tqdm(range(3), desc="converting"))
        assert state() == chosen
        assert not capsys.readouterr().err
    finally:
        (bars.enable_progress_bar if before[0] else bars.disable_progress_bar)()


def test_bars_are_shown_to_who_asks_for_them(caplog: pytest.LogCaptureFixture) -> None:
    """By this package's log at DEBUG."""
    before = state()
    with caplog.at_level(logging.DEBUG, "langchain_lora_retriever"), quiet_loading:
        assert state() == before
    assert state() == before
