"""One frame for all pictures: the same bytes for the same picture, whole files, and none where there is no matplotlib."""

import logging
import sys

import pytest

from layerpeft.integrations import drawing


def drawn(path, colour="C0"):
    figure = drawing.new_figure(2, 1)
    figure.subplots().plot([0, 1], color=colour)
    drawing.write_figure(figure, path, dpi=50)
    return path.read_bytes()


@pytest.mark.pictures
def test_a_picture_is_a_png_of_the_size_asked_for_and_always_the_same_bytes(tmp_path):
    data = drawn(tmp_path / "a.png")
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[16:24] == (100).to_bytes(4) + (50).to_bytes(4)
    assert data == drawn(tmp_path / "a.png") != drawn(tmp_path / "b.png", "C1")
    assert b"Software" not in data


def test_without_matplotlib_there_is_no_figure_and_one_warning(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    drawing.warn_no_matplotlib.cache_clear()
    with caplog.at_level(logging.WARNING, logger=drawing.__name__):
        assert drawing.new_figure(2, 1) is None and drawing.new_figure(2, 1) is None
    assert len(caplog.records) == 1 and "pip install matplotlib" in caplog.text
