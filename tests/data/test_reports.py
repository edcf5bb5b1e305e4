"""The noun report: the same figures on a page and in a terminal, and the words of strangers as nothing but words."""

import dataclasses
import functools
import re
from html.parser import HTMLParser

import pytest

from pixart_data.corpora import PAPER_CAPTIONS
from pixart_data.errors import DataError
from pixart_data.galleries import Exhibit
from pixart_data.nouns import DEFINITION
from pixart_data.rarefaction import Growth
from pixart_data.renderings import num_cells
from pixart_data.reports import html_page, terminal_table
from pixart_data.scorecards import as_text
from tests.specimens import EXACT, QUALITY, ROUGH, SMALL, bare, corpus, pair

VOID = {"meta", "br", "hr", "img", "link", "input"}
FOREIGN = {"share_other": 0.93, "flagged": True}
HOSTILE = '<script>alert(1)</script> "q\'&" \ud800\x1b[31m'


class Page(HTMLParser):
    """Checks nesting and collects what a browser would load, the words of the body, and the rows of its tables."""

    def __init__(self, source):
        super().__init__()
        self.open, self.loads, self.words, self.tags, self.rows, self.cells = [], [], [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        self.loads += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data") or k.startswith("on")]
        if tag == "tr":
            self.cells = []
        if tag in ("th", "td"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "tr":
            self.rows.append([" ".join(cell.split()) for cell in self.cells])

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if "tr" in self.open and self.cells:
            self.cells[-1] += data


@functools.cache
def full_page():
    exhibit = Exhibit("sa_000000/sa_1", b"\xff\xd8jpeg\xff\xd9", "a dog", "A brown <b>dog</b> lies.", 480, 320)
    return html_page(pair(), [exhibit, dataclasses.replace(exhibit, key='"><script>')])


def test_page_is_self_contained():
    source = full_page()
    page = Page(source)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "b"}
    assert [load for load in page.loads if not load.startswith("#")] == ["data:image/jpeg;base64,/9hqcGVn/9k="] * 2
    assert not re.search(r"https?:|url\((?!#)|@import", source)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 10
    targets = {load[1:] for load in page.loads if load.startswith("#")} | set(re.findall(r"url\(#([\w-]+)\)", source))
    assert targets <= set(ids)
    assert len(source) < 250_000


def test_page_can_be_read_aloud():
    page = Page(full_page())
    assert ("html", {"lang": "en"}) in page.tags
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert all(after - before <= 1 for before, after in zip(headings, headings[1:], strict=False))
    tables = [tag for tag, _ in page.tags if tag in ("table", "caption")]
    assert tables == ["table", "caption"] * (len(tables) // 2)
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    pictures = [attrs for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(pictures) == 9
    assert all(len(attrs["aria-label"]) > 40 for attrs in pictures)
    regions = [attrs for _, attrs in page.tags if attrs.get("role") == "region"]
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in regions)


def test_table_1_stands_beside_the_paper():
    rows = Page(full_page()).rows
    assert ["dense", "750", "24.4", "329", "1,416", "23.2%", "18,263"] in rows
    assert ["LAION", "11.2M", "6.4", "210K", "2461K", "8.5%", "72.0M"] in rows
    assert ["SAM-LLaVA", "11.2M", "29.3", "23K", "124K", "18.6%", "327.9M"] in rows


def test_equal_sizes_are_one_table():
    page = Page(full_page())
    start = page.rows.index(["500 captions"])
    assert page.rows[start + 1 : start + 3] == [
        ["raw", "20", "2,000", "1.0%", "6.0"],
        ["dense", "250", "1,200", "20.8%", "24.4"],
    ]
    assert "rows of different size above do not compare" in page.text
    assert "Rows of one size below do" in page.text
    assert "of sets much smaller or larger, only nouns per image compares" in page.text


def test_sets_as_large_as_the_papers_stand_beside_its_rows():
    large = dataclasses.replace(EXACT, num_captions=20_000_000)
    page = Page(html_page([bare("large", large, rarefied=[Growth(PAPER_CAPTIONS, 1000.2, 300.1, 0.3)])]))
    start = page.rows.index(["11,200,000 captions"])
    assert page.rows[start + 1] == ["large", "300", "1,000", "30.0%", "24.4"]
    assert page.rows[start + 2] == ["LAION (paper)", "210K", "2461K", "8.5%", "6.4"]
    assert "compare them at that size" in page.text


def test_a_single_set_is_told_that_it_compares_with_nothing():
    page = Page(html_page([bare()]))
    assert "Rows of one size below" not in page.text
    assert not any("captions" in row[0] for row in page.rows if len(row) == 1)


def test_sets_too_small_to_compare_are_said_to_be():
    tiny = dataclasses.replace(EXACT, num_captions=39)
    sizes = {39: Growth(39, 60.0, 1.0, 0.017), 500: Growth(500, 1200.0, 250.0, 0.208)}
    corpora = [
        bare("名" * 40, tiny, rarefied=[sizes[39]]),
        bare("raw", SMALL, rarefied=[sizes[39], sizes[500]]),
        bare("dense", rarefied=[sizes[39], sizes[500]], gained_over="名" * 40),
    ]
    page = Page(html_page(corpora))
    assert "too small to compare (39 captions, of at least 100)" in page.text
    assert ["39 captions"] not in page.rows
    assert ["500 captions"] in page.rows
    assert not any("at 39 captions" in row[0] for row in page.rows)
    lines = terminal_table(corpora).splitlines()
    assert lines[0].split()[-2:] == ["@500", "VN/DN", "@500"][1:]
    assert lines[2].split()[-3:] == [f"{EXACT.nouns_per_image:.1f}", "-", "-"]
    assert not any(line.endswith(" ") for line in lines)
    assert any("too small to compare (39 captions" in line for line in lines)
    assert max(map(num_cells, lines)) <= 120
    assert "too small" not in terminal_table([bare("alone", tiny)])


def test_raw_and_dense_are_compared():
    page = Page(full_page())
    assert ["Figure", "raw", "dense", "Ratio"] in page.rows
    assert ["Nouns/image", "6.0", "24.4", "4.06"] in page.rows
    assert re.search(r"<h3><bdi>dense</bdi> against <bdi>raw</bdi></h3>", full_page())
    assert ["VN/DN at 500 captions", "1.0%", "20.8%", "20.8"] in page.rows
    assert "275 nouns are valid in dense and not in raw; 124 are the other way round" in page.text
    assert "753 (2)" in page.text
    assert "<b>side</b>" in page.text
    assert "same images" not in page.text
    same = [bare("dense-raw", SMALL), bare("dense", gained_over="dense-raw")]
    assert "dense-raw: the captions that the same images came with." in Page(html_page(same)).text
    none = Page(html_page([bare("raw", SMALL), bare("dense", gained_over="raw")]))
    assert "No noun is valid in dense that is not in raw." in none.text
    assert "Raw against re-captioned" not in Page(html_page([bare("dense", gained_over="gone")])).text


def test_what_surrounds_the_nouns():
    page = Page(full_page())
    assert ["tokens", "97.2", "97.2"] in page.rows
    assert ["distinct among the nouns", "70.6%", "70.6%"] in page.rows
    assert ["captions that repeat their prompt", "–", "–"] in page.rows
    assert ["truncated", "30 (6.00%)", "30 (4.00%)"] in page.rows
    assert ["fail in any way", "40 (8.00%)", "40 (5.33%)"] in page.rows
    assert ["the image features ...", "600", "20.0%"] in page.rows
    assert ["dense", "200", "1 in 4", "75.0", "120", "25.00%", "6.25%", "some/t5"] in page.rows
    assert ["dense", "40", "256 px", "2 of 3", "25.0%", "3.0%", "2"] in page.rows
    assert page.rows.index(["download_failed", "12"]) < page.rows.index(["too_small", "3"])
    assert ["dense", "1,416", "329", "7"] in page.rows  # thresholds
    assert ["by lemma", "24.4", "329", "1,416", "23.2%", "18,263"] in page.rows
    for words in ("a dog", "A brown <b>dog</b> lies.", DEFINITION, EXACT.tagger):
        assert words in page.text


def test_sets_that_pass_the_gate_stand_beside_those_that_do_not():
    passing = {**QUALITY, "num_failed": 0, "failures": {}}
    page = Page(html_page([bare("good", quality=passing), bare("bad", quality=QUALITY)]))
    assert ["Why", "good", "bad"] in page.rows
    assert ["loop", "0", "15 (2.00%)"] in page.rows
    assert ["fail in any way", "0 (0.00%)", "40 (5.33%)"] in page.rows
    assert "good: no caption fails. bad: truncated 4.00%, loop 2.00%." in page.text
    assert "Every caption passes the gate." in Page(html_page([bare("good", quality=passing)])).text


@pytest.mark.parametrize(("num_sets", "beside"), [(2, True), (3, False)])
def test_the_gates_table_has_the_width_that_it_needs(num_sets, beside):
    source = html_page([bare(f"set {i}", quality=QUALITY) for i in range(num_sets)])
    chart = source.index("<h3>Captions that fail the gate</h3>")
    between = source[source.index("</figure>", chart) : source.index("one may fail in several ways", chart)]
    assert ("</figure>\n<div><div class=wide" in between) is beside


def test_style_leaves_bars_room_in_print_and_hints_at_what_scrolls():
    style = re.search(r"<style>(.*?)</style>", full_page(), re.S)[1]
    screen, _, printed = style.rpartition("@media print")
    [columns] = re.findall(r"\.top \{[^}]*columns: ([^;}]+)", printed)
    assert columns.strip() == "2"  # of a page 190 mm wide; a third leaves the bars between words and figures no room
    assert "no-repeat local" in re.search(r"\.wide \{ background: [^}]*\}", screen)[0]
    assert re.search(r"\.wide \{[^}]*background: none", printed)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("additionally , there", "additionally, there"),
        ("you ca n't", "you can't"),
        ("the dog 's", "the dog's"),
        ("( photo by", "(photo by"),
        ("`` stop ''", '"stop"'),
        ("stock photo :", "stock photo:"),
        ("in the image", "in the image"),
        ("img - for", "img - for"),
    ],
)
def test_openers_are_written_as_they_are_read(tokens, text):
    assert as_text(tokens) == text


def test_what_was_not_measured_says_how_or_is_left_out():
    page = Page(html_page([bare()]))
    assert "Not measured: run pixart stats again with --tokenizer" in page.text
    assert "No sizes" in page.text
    assert "No nouns were found." in page.text
    for heading in ("Quality of the captions", "Rejected rows", "Raw against", "raw and dense", "Other ways"):
        assert heading not in page.text
    assert not any(tag == "svg" for tag, _ in page.tags)


def test_page_of_nothing_is_the_papers_table():
    page = Page(html_page([]))
    assert ["Internal", "11.2M", "12.2", "152K", "582K", "26.1%", "136.6M"] in page.rows
    assert "Internal (paper)" in terminal_table([])


def test_approximate_sets_stand_apart():
    page = Page(html_page([corpus("a", ROUGH, frames=None, lengths=None), bare("b", ROUGH)]))
    assert ["a approximate", "750", "~24.4", "~329", "~1,416", "~23.2%", "~18,263"] in page.rows
    assert "Counted with textblob 0.20.1 lexicon (approximate)" in page.text
    assert "Not comparable with the paper's rows" in page.text
    assert "Nothing here compares with the paper's rows." in page.text
    assert "~978" in page.text
    assert "paper: LAION" not in page.text  # in no figure
    tables = "".join(page.words).split("Noun density in the paper")
    assert "~18,263" in tables[0]
    assert "LAION" not in tables[0]
    assert sum(attrs.get("class") == "approx" for _, attrs in page.tags) > 6
    exact = Page(full_page())
    assert not any(attrs.get("class") == "approx" for _, attrs in exact.tags)


def test_exact_and_approximate_are_never_mixed():
    for render in (html_page, terminal_table):
        with pytest.raises(
            DataError, match=r"found ok counted by NLTK and bad counted approximately; run `pixart stats`"
        ):
            render([bare("ok"), bare("bad", ROUGH)])


def test_foreign_sets_are_flagged():
    corpora = [bare("ours"), bare("theirs", language=FOREIGN)]
    page = Page(html_page(corpora))
    assert "theirs: 93% of a sample of its captions are not in English" in page.text
    assert ["theirs not English?", "750"] in [row[:2] for row in page.rows]
    assert ["ours", "750"] in [row[:2] for row in page.rows]
    assert "theirs: 93% of a sample" in " ".join(terminal_table(corpora).split())


def test_strangers_words_are_only_text():
    nasty = corpus(
        HOSTILE,
        SMALL,
        rarefied=[Growth(500, 2000, 20, 0.01)],
        rejections={HOSTILE: 1},
        gained=[(HOSTILE, 3, 1)],
        gained_over="שלום" * 20,
        frames=None,
        quality=None,
        gate={HOSTILE: 3},
        top=[("n" * 50_000, 9), (HOSTILE, 1)],
    )
    source = html_page([nasty, bare("שלום" * 20)], [Exhibit(HOSTILE, b"", HOSTILE, HOSTILE, 1, 1)])
    source.encode()
    page = Page(source)
    assert not {tag for tag, _ in page.tags} & {"script", "b"}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert not any(ord(sign) < 32 and sign != "\n" for sign in source)
    assert page.text.count('<script>alert(1)</script> "q\'&" \ufffd\ufffd[31m') > 8
    assert "n" * 41 not in source
    assert sum(tag == "bdi" for tag, _ in page.tags) > 10  # names from right to left leave the figures in place
    assert "\x1b" not in terminal_table([nasty])


def test_any_number_of_sets_fits_a_terminal():
    huge = dataclasses.replace(
        ROUGH,
        num_captions=987_654_321,
        num_empty=0,
        distinct_nouns=98_765_432,
        valid_nouns=9_876_543,
        total_nouns=28_987_654_321,
        nouns_per_image=29.3,
    )
    small = dataclasses.replace(huge, num_captions=123_456_789)
    at_size = Growth(123_456_789, 45_678_912.3, 5_678_912.1, 0.1243)
    names = ["x" * 60, "漢字" * 30, "漢 字 " * 40, "b", "c"]
    huge = dataclasses.replace(huge, num_empty=4_321)  # each set has a note
    corpora = [bare(name, huge, rarefied=[at_size], language=FOREIGN) for name in names]
    lines = terminal_table([*corpora, bare("small", small, rarefied=[at_size], language=FOREIGN)]).splitlines()
    assert max(map(num_cells, lines)) <= 120
    rows = [line for line in lines[:12] if not line.startswith("not comparable")]
    assert len({num_cells(line) for line in rows}) == 1
    assert len(rows) == 12 - 1


def test_terminal_table():
    lines = terminal_table(pair()).splitlines()
    head = "Captions of Captions VN DN VN/DN Total nouns Nouns/image DN @500 VN/DN @500"
    assert lines[0].split() == head.split()
    assert lines[2].split() == ["raw", "500", "20", "2,000", "1.0%", "3,000", "6.0", "2,000", "1.0%"]
    assert lines[3].split() == ["dense", "750", "329", "1,416", "23.2%", "18,263", "24.4", "1,200", "20.8%"]
    assert lines[4].split() == ["LAION", "(paper)", "11.2M", "210K", "2461K", "8.5%", "72.0M", "6.4", "-", "-"]
    assert "@500: in random subsets of 500 captions" in "\n".join(lines)
    single = terminal_table([bare()])
    assert "@" not in single
    assert "~" not in single
    assert "not comparable" not in single


def test_terminal_table_of_approximate_sets():
    lines = terminal_table([bare("rough", ROUGH)]).splitlines()
    assert lines[2].split() == ["rough", "750", "~329", "~1,416", "~23.2%", "~18,263", "~24.4"]
    assert lines[3].startswith("not comparable")
    assert lines[4].startswith("LAION")
    assert "~ approximate: counted with textblob 0.20.1" in "\n".join(lines)


def test_the_same_data_gives_the_same_page():
    corpora = [bare("a", top=[("x", 1)], ranks=[(1, 5), (2, 1)])]
    assert html_page(corpora) == html_page(corpora)


def test_six_sets_fit_one_page():
    page = Page(html_page([bare(f"set {i}", ranks=[(1, 9), (3, 2)]) for i in range(6)]))
    own = [row for row in page.rows if row[0].startswith("set ") and len(row) == 7]
    assert [row[0] for row in own] == [f"set {i}" for i in range(6)]
    assert page.text.count("valid: more than 10 times") == 1
