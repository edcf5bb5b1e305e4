"""Reports: the same figures in three shapes, approximate ones marked in each."""

import dataclasses
import json
from html.parser import HTMLParser

import pytest

from pixart_data.errors import DataError
from pixart_data.nouns import DEFINITION, NounStats
from pixart_data.reports import PAPER_ROWS, from_json, html_page, terminal_table, to_json

VOID = {"meta", "br", "hr", "img", "link", "input"}

EXACT = NounStats(
    num_captions=750,
    num_empty=0,
    distinct_nouns=1416,
    valid_nouns=329,
    vn_dn=329 / 1416,
    total_nouns=18263,
    nouns_per_image=24.351,
    approximate=False,
    tagger="nltk 3.10.4 averaged_perceptron_tagger_eng",
    top_nouns=(("image", 978), ("<script>alert(1)</script>", 7), ("\0", 1)),
)
ROUGH = dataclasses.replace(EXACT, approximate=True, tagger="textblob 0.20.1 lexicon (approximate)", num_empty=3)
FULL_SIZE = dataclasses.replace(EXACT, num_captions=11_000_000)
GROWS = "VN/DN grows with sample size"


class Page(HTMLParser):
    """Checks nesting and collects what a browser would load, and the text of the body."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.text, self.names = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href") or name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def parse(sets):
    page = Page()
    page.feed(html_page(sets))
    page.close()
    assert page.open == []
    return page


def test_paper_rows_are_table_1():
    rows = [(s.valid_nouns, s.distinct_nouns, s.vn_dn, s.total_nouns, s.nouns_per_image) for s in PAPER_ROWS.values()]
    assert list(PAPER_ROWS) == ["LAION", "LAION-LLaVA", "SAM-LLaVA", "Internal"]
    assert rows == [
        (210_000, 2_461_000, 0.085, 72_000_000, 6.4),
        (85_000, 646_000, 0.133, 233_900_000, 20.9),
        (23_000, 124_000, 0.186, 327_900_000, 29.3),
        (152_000, 582_000, 0.261, 136_600_000, 12.2),
    ]
    for stats in PAPER_ROWS.values():
        assert stats.num_captions == pytest.approx(stats.total_nouns / stats.nouns_per_image, rel=0.01)
        assert stats.vn_dn == pytest.approx(stats.valid_nouns / stats.distinct_nouns, abs=0.002)


def test_terminal_table():
    lines = terminal_table({"mine": EXACT}).splitlines()
    assert lines[0].split() == ["Dataset", "Captions", "VN", "DN", "VN/DN", "Total", "nouns", "Nouns/image"]
    assert lines[2].split() == ["mine", "750", "329", "1,416", "23.2%", "18,263", "24.4"]
    assert lines[3].split() == ["LAION", "(paper)", "11.2M", "210K", "2461K", "8.5%", "72.0M", "6.4"]
    assert len({len(line) for line in lines[:7]}) == 1
    assert "~" not in "\n".join(lines)


def test_approximate_is_marked_in_all_three():
    sets = {"exact": EXACT, "rough": ROUGH}
    table = terminal_table(sets)
    rough = next(line for line in table.splitlines() if line.startswith("rough"))
    assert [cell[0] for cell in rough.split()[2:]] == ["~"] * 5
    assert "~" not in next(line for line in table.splitlines() if line.startswith("exact"))
    assert "~ approximate: counted with textblob 0.20.1" in table

    report = to_json(sets)
    assert [row["approximate"] for row in report["sets"]] == [False, True]
    assert [row["approximate"] for row in report["paper"]] == [False] * 4
    assert report["sets"][1]["definition"].startswith("Approximate")
    assert any(note.startswith("~ approximate") for note in report["notes"])

    text = "\n".join(parse(sets).text)
    for figure in ("~329", "~1,416", "~18,263", "~978"):
        assert figure in text
    assert html_page(sets).count("<span class=approx>approximate</span>") == 4  # table, bars, nouns, how it was made
    assert "~ approximate: counted with textblob 0.20.1" in text
    assert "<span class=approx>" not in html_page({"exact": EXACT})


@pytest.mark.parametrize(
    ("sets", "warned"),
    [
        ({}, False),
        ({"a": FULL_SIZE}, False),
        ({"a": FULL_SIZE, "b": dataclasses.replace(EXACT, num_captions=7_500_000)}, False),
        ({"a": FULL_SIZE, "b": dataclasses.replace(EXACT, num_captions=7_400_000)}, True),
        ({"a": dataclasses.replace(EXACT, num_captions=17_000_000)}, True),
        ({"a": EXACT}, True),
        ({"a": dataclasses.replace(EXACT, num_captions=0)}, True),
    ],
)
def test_different_sizes_are_pointed_out(sets, warned):
    assert (GROWS in terminal_table(sets)) == warned
    assert (GROWS in "".join(parse(sets).text)) == warned
    assert any(GROWS in note for note in to_json(sets)["notes"]) == warned


def test_blank_captions_are_mentioned():
    assert "rough: 3 null or blank captions are not counted." in terminal_table({"rough": ROUGH})


def test_json_round_trip():
    sets = {"mine": EXACT, "rough": ROUGH}
    report = to_json(sets)
    assert (report["format"], report["version"], report["definition"]) == ("pixart-stats", 1, DEFINITION)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert from_json(json.loads(json.dumps(report))) == sets
    assert all(row["tagger"] and row["definition"] for row in report["sets"] + report["paper"])


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"format": "pixart-stats", "version": 2, "sets": []},
        {"format": "pixart-stats", "version": 1},
        {"format": "pixart-stats", "version": 1, "sets": [{"name": "a", "top_nouns": []}]},
    ],
)
def test_foreign_json_is_refused(report):
    with pytest.raises(DataError, match=r"stats\.json"):
        from_json(report)


def test_html_is_self_contained_and_escaped():
    name = "<b>x</b> & \"y\" 'z' \ud800\x1b[31m"
    page = parse({name: EXACT})
    source = html_page({name: EXACT})
    source.encode()
    assert page.loads == []
    assert not page.names & {"script", "link", "img", "b", "iframe"}
    assert "url(" not in source
    assert "@import" not in source
    assert "http" not in source
    assert "<script" not in source
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in source
    assert "&lt;b&gt;x&lt;/b&gt; &amp; &quot;y&quot;" in source
    assert "\0" not in source
    assert "\x1b" not in source + terminal_table({name: EXACT})
    text = "".join(page.text)
    assert DEFINITION in text
    assert EXACT.tagger in text


def test_html_of_nothing_and_of_an_empty_set():
    empty = dataclasses.replace(EXACT, num_captions=0, top_nouns=(), nouns_per_image=0.0)
    assert "LAION (paper)" in "".join(parse({}).text)
    assert "No nouns were found." in "".join(parse({"empty": empty}).text)


def test_long_nouns_are_cut_in_the_page():
    long = dataclasses.replace(EXACT, top_nouns=(("n" * 50_000, 1),))
    assert "n" * 41 not in html_page({"long": long})
