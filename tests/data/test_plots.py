"""The figures of the noun report: what they draw is what the corpora hold, and the same data gives the same bytes."""

import dataclasses
import io
import re
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from PIL import Image

from pixart_data.corpora import PAPER_ROWS
from pixart_data.plots import figures
from pixart_data.rarefaction import Growth
from pixart_data.renderings import compact, num_cells, shortened
from tests.specimens import EXACT, FRAMES, LENGTHS, ROUGH, bare, corpus, pair

SAFE = {"svg", "g", "path", "defs", "use", "text", "clipPath", "rect"}
NAMES = ["ranks", "nouns", "growth", "density", "quality", "lengths", "buckets", "resolutions", "crops"]


def drawn(corpora, name):
    """Draw a figure; return the data of its lines and the labels of its legend."""
    axes = Figure().add_subplot()
    entries = figures(corpora)[name].draw(axes)
    lines = [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in axes.lines]
    return lines, [label for _, label in entries]


def test_every_figure_is_there_in_the_order_of_the_report():
    assert list(figures([corpus()])) == NAMES


def test_what_was_not_measured_is_not_drawn():
    assert figures([]) == {}
    assert figures([bare()]) == {}
    assert list(figures([bare(), corpus(frames=None, lengths=None, quality=None, gate={})])) == NAMES[:4]
    nothing = {**FRAMES, "num_images": 0}
    assert list(figures([bare(frames=nothing, lengths={**LENGTHS, "counts": [0, 0]})])) == []


def test_the_least_that_can_be_drawn():
    none = bare("without a noun", per_caption=[1] + [0] * 255, growth=[Growth(1, 0.0, 0.0, 0.0)])
    assert list(figures([none])) == ["nouns"]
    one = bare("a noun", ROUGH, per_caption=[0, 1], growth=[Growth(1, 1.0, 0.0, 0.0)], ranks=[(1, 1)])
    plots = figures([dataclasses.replace(none, stats=ROUGH), one])
    assert list(plots) == ["ranks", "nouns", "growth", "density"]
    for plot in plots.values():
        assert "a noun" in plot.svg()


def test_ranks_and_the_line_of_validity():
    lines, labels = drawn([corpus()], "ranks")
    assert lines[0] == ([1, 2, 10, 100, 1416], [978, 753, 100, 11, 1])
    assert lines[1][1] == [10.5, 10.5]  # between what is not valid and what is
    assert labels == ["mine", "valid: more than 10 times"]
    five = dataclasses.replace(EXACT, threshold=5)
    assert drawn([corpus(stats=five)], "ranks")[1][-1] == "valid: more than 5 times"


def test_nouns_of_a_caption_are_shares_with_their_mean():
    lines, labels = drawn([corpus()], "nouns")
    assert lines[0] == ([0, 1, 2, 3], [0, 0.1, 0.2, 0.7])
    assert lines[1][0] == [24.351, 24.351]
    assert labels == ["mine: 24.4"]
    assert "half have at most 3 and 95% at most 3" in figures([corpus()])["nouns"].finding


def test_growth_holds_distinct_and_valid_nouns_and_the_paper():
    growth = [Growth(100, 400.5, 0.2, 0.0005), Growth(750, 1416, 329, 0.23)]
    lines, labels = drawn([corpus(growth=growth)], "growth")
    assert lines[0] == ([100, 750], [400.5, 1416])
    assert lines[1] == ([750], [329])  # less than one cannot be shown on a log scale
    points = [(x[0], y[0]) for x, y in lines[2:]]
    assert points == [
        (row.num_captions, figure) for row in PAPER_ROWS.values() for figure in (row.distinct_nouns, row.valid_nouns)
    ]
    assert labels == ["mine", *(f"paper: {name}" for name in PAPER_ROWS)]


def test_density_holds_the_papers_four_points():
    lines, _ = drawn(pair(), "density")
    assert [y for _, y in lines[:2]] == [[point.vn_dn for point in one.growth] for one in pair()]
    assert [(x, y) for x, y in lines[2:6]] == [([row.num_captions], [row.vn_dn]) for row in PAPER_ROWS.values()]
    assert lines[6][0] == [500, 500]  # the smallest set
    assert "Random subsets of 500 captions: dense 20.8%, raw 1.0%." in figures(pair())["density"].finding


@pytest.mark.parametrize("name", ["growth", "density"])
def test_approximate_figures_have_no_points_of_the_paper_and_say_so(name):
    assert drawn([corpus(stats=ROUGH)], name)[1] == ["mine"]
    assert figures([corpus(stats=ROUGH)])[name].title.endswith(" (approximate)")
    assert "approximate" not in figures([corpus()])[name].title


def test_shares_that_fail_the_gate():
    lines, labels = drawn([corpus(), corpus("clean", gate={"loop": 3})], "quality")
    assert [x for x, _ in lines] == [[30 / 750, 15 / 750], [0, 3 / 750]]  # truncated, loop
    assert labels == ["mine", "clean"]
    assert (
        "mine: truncated 4.00%, loop 2.00%. clean: loop 0.40%."
        in figures([corpus(), corpus("clean", gate={"loop": 3})])["quality"].finding
    )


def test_lengths_and_their_limit():
    lines, labels = drawn([corpus()], "lengths")
    steps, shares = lines[0]
    assert sum(shares) == pytest.approx(1)
    assert max(zip(shares, steps, strict=True)) == (0.75, pytest.approx(60, abs=2))
    assert lines[1][0] == [120, 120]
    assert labels == ["mine: 25.0% cut", "120 tokens: the limit"]


def test_buckets_resolutions_and_crops():
    lines, _ = drawn([corpus()], "buckets")
    assert lines[0] == ([0.5, 1, 2], [0.25, 0.75, 0])
    lines, labels = drawn([corpus()], "resolutions")
    assert lines[0][1] == [0, 0.25, 0.75, 0]
    assert lines[1][0] == [0.065536] * 2  # 256 x 256
    assert labels == ["mine: 25.0% enlarged", "256 x 256 px"]
    lines, _ = drawn([corpus()], "crops")
    edges, more = lines[0]
    assert dict(zip(edges, more, strict=True))[0.02] == pytest.approx(0.25)
    assert dict(zip(edges, more, strict=True))[0.1] == pytest.approx(0.05)
    assert (
        "3.0% of a picture on average, 5.0% of the pictures lose a tenth or more"
        in figures([corpus()])["crops"].finding
    )


def test_svg_belongs_into_a_page():
    plots = figures(pair())
    ids = []
    for plot in (plots["ranks"], plots["density"]):
        source = plot.svg()
        root = ElementTree.fromstring(source)
        assert (root.tag, root.get("role"), root.get("viewBox")[:4]) == ("svg", "img", "0 0 ")
        assert plot.finding in root.get("aria-label")
        assert {element.tag for element in root.iter()} <= {
            "svg",
            "g",
            "path",
            "defs",
            "use",
            "text",
            "clipPath",
            "rect",
        }
        assert "http" not in source
        assert not re.search("#[0-9a-f]{6}", source)  # its colours are the page's
        own = [element.get("id") for element in root.iter() if element.get("id")]
        used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', source))
        assert set(own) == used
        ids += own
        texts = ["".join(element.itertext()).strip() for element in root.iter("text")]
        assert {"raw", "dense", "1K"} <= set(texts)
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", source)]
        width = float(root.get("viewBox").split()[2])
        assert min(sizes) * (360 - 32) / width >= 9  # pixels on a phone
    assert len(ids) == len(set(ids))


def test_the_same_data_gives_the_same_bytes(monkeypatch):
    first = figures(pair())["growth"]
    svg, png = first.svg(), first.png("somewhere")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    again = figures(pair())["growth"]
    assert (again.svg(), again.png("somewhere")) == (svg, png)
    assert b"Matplotlib" not in png


def test_png_is_a_file_of_its_own():
    plot = figures(pair())["density"]
    image = Image.open(io.BytesIO(plot.png("NLTK")))
    assert image.format == "PNG"
    assert image.size[0] == 1316  # 4.7 in, 1.4 times as large as in the page, at 200 dpi
    assert 600 < image.size[1] < 1300
    assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    assert image.getpixel((1310, 3))[:3] == (255, 255, 255)
    assert plot.png("NLTK") != plot.png("TextBlob")  # the source is written on it


def test_names_of_strangers_are_only_text():
    names = ["_hidden", "$x^2$ & $", "<script>alert(1)</script>", "\x1b[31m\ud800", "漢字" * 40, "שלום", "100%"]
    corpora = [corpus(name, frames=None, lengths=None) for name in names]
    plot = figures(corpora)["ranks"]
    root = ElementTree.fromstring(plot.svg())
    texts = ["".join(element.itertext()).strip() for element in root.iter("text")]
    for shown in ("_hidden", "$x^2$ & $", "<script>alert(1)</script>", "\ufffd[31m\ufffd", "שלום", "100%"):
        assert shown in texts
    assert "漢字" * 10 + "…" in texts
    assert plot.png("\x1b").startswith(b"\x89PNG")  # signs that no font has are boxes, and no warning


def test_many_large_sets_stay_small():
    long = corpus(
        ranks=[(rank, 10**7 // rank) for rank in range(1, 201)],
        per_caption=list(range(1, 257)),
        growth=[Growth(100 * 2**i, 123.456 * i + 1, 99.9 * i, 0.0123 * i) for i in range(18)],
        lengths={**LENGTHS, "counts": list(range(1, 1025))},
    )
    six = [dataclasses.replace(long, name=f"a set with a rather long name {i}") for i in range(6)]
    sizes = {
        name: len(plot.svg()) for name, plot in figures(six).items() if name in ("ranks", "nouns", "growth", "lengths")
    }
    assert max(sizes.values()) < 60_000, sizes


def test_sets_differ_without_colour():
    axes = Figure().add_subplot()
    figures([corpus(f"{i}") for i in range(6)])["ranks"].draw(axes)
    assert len({(line.get_marker(), line.get_linestyle()) for line in axes.lines[:6]}) == 6
    assert len({line.get_color() for line in axes.lines[:6]}) == 6


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (950, "950"), (12_000, "12K"), (1_500_000, "1.5M"), (2.5e9, "2.5B"), (0.1, "0.1")],
)
def test_compact_numbers(value, text):
    assert compact(value) == text


def test_labels_are_cut_to_their_width():
    assert shortened("x" * 28) == "x" * 28
    assert shortened("x" * 29) == "x" * 27 + "…"
    assert num_cells(shortened("漢" * 15)) <= 28
    assert shortened("a\nb\x1b") == "a\ufffdb\ufffd"
