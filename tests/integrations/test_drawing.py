"""One frame for all pictures: the same bytes for the same picture, whole files, and none where there is no matplotlib."""

import logging
import sys

import pytest

from layerpeft.integrations import drawing
from layerpeft.recipe.train import draw_curve


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


@pytest.mark.pictures
def test_what_cannot_be_drawn_is_left_out_and_said(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LAYERPEFT_QUIET", raising=False)
    for ends, drawable in (([1e308, -1e308], False), ([5e-324, 0.0], True), ([float("nan"), float("inf")], True)):
        figure = drawing.new_figure(2, 1)
        figure.subplots().plot(ends)
        assert drawing.write_figure(figure, tmp_path / f"{drawable}.png") is drawable
    assert not (tmp_path / "False.png").exists() and "False.png is left out: " in capsys.readouterr().err


@pytest.mark.pictures
def test_a_curve_of_one_point_shows_it(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    blue = []
    for name, history in (
        ("one", [{"step": 1, "loss": 2.5}]),
        ("two", [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]),
    ):
        draw_curve(history, tmp_path / name)
        shown = image.imread(tmp_path / name)[80:400, 150:600, :3]  # between axes and legend
        blue.append(int(((shown[..., 2] - shown[..., 0]) > 0.4).sum()))
    assert blue[0] > 50 and blue[1] > 50
