"""The report's part on the quality of captions: means of the measures, what fails the gate, and how sentences begin."""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pixart_data.corpora import Corpus
from pixart_data.listings import Group, label, mark, named, table
from pixart_data.pages import escaped
from pixart_data.renderings import Legend, Plot, look, percent, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MEASURES = {
    "num_tokens": ("tokens", ".1f"),
    "num_sentences": ("sentences", ".1f"),
    "num_nouns": ("nouns", ".1f"),
    "num_distinct_nouns": ("distinct nouns", ".1f"),
    "distinct_share": ("distinct among the nouns", ".1%"),
    "num_generic_nouns": ("generic nouns (image, scene, side ...)", ".2f"),
    "num_attributes": ("attributes", ".1f"),
    "attributes_per_noun": ("attributes for each noun", ".2f"),
    "num_noun_phrases": ("noun phrases", ".1f"),
    "num_attributed_phrases": ("noun phrases with an attribute", ".1f"),
    "num_spatial": ("spatial relations", ".2f"),
    "num_numbers": ("numbers", ".2f"),
    "num_hedges": ("hedges", ".2f"),
    "num_boilerplate": ("sentences that begin with boilerplate", ".2f"),
    "repeated_share": ("tokens in repeated runs of four", ".2%"),
    "distinct_2": ("distinct among the pairs of neighbours", ".1%"),
    "final_mark": ("captions that end in a mark", ".1%"),
    "truncated": ("captions that break off", ".2%"),
    "refusal": ("captions with a refusal", ".2%"),
    "echo": ("captions that repeat their prompt", ".2%"),
}
_FAILURES = {
    "empty": "empty",
    "refusal": "refusal",
    "echo": "echo of the prompt",
    "truncated": "truncated",
    "loop": "loop",
    "rambling": "rambling",
    "boilerplate": "boilerplate",
    "too_short": "too short",
    "too_few_nouns": "too few nouns",
}
_OPENERS = 10
_BESIDE = 2
_NO_SPACE_BEFORE = re.compile(r" (?=(?:[,.;:!?%)\]}]|\.\.\.|''|n't|'(?:s|re|ve|ll|d|m))(?: |$))")
_NO_SPACE_AFTER = re.compile(r"(?:(?<=^[(\[{])|(?<= [(\[{])|(?<=``)) ")
_CONTRACTED = re.compile(r"``|''")
_ROW_INCHES, _EDGE_INCHES = 0.24, 0.75


def quality_sections(corpora: Sequence[Corpus], drawn: str) -> Iterator[str]:
    """Yield the blocks of the page; sets that were not measured are left out, and nothing comes if none was.

    Args:
        drawn: The figure of `quality_plot`, as HTML; empty for none.
    """
    measured = [corpus for corpus in corpora if corpus.quality]
    judged = _judged(corpora)
    if not judged:
        return
    yield "<h2>Quality of the captions</h2>"
    if measured:
        names = _heads(measured)
        rows = [
            (escaped(words), [_mean(corpus, name, form) for corpus in measured])
            for name, (words, form) in _MEASURES.items()
            if any(name in _measures(corpus) for corpus in measured)
        ]
        yield table("Means over the captions", ("In a caption", *names), [Group("", rows)])
    found = _found(judged)
    if found:
        rows = [(label(_FAILURES.get(name, name)), [_failed(corpus, name) for corpus in judged]) for name in found]
        rows += [("fail in any way", [_failed_in_any_way(corpus) for corpus in judged])]
        told = table(
            "Captions that fail the gate; one may fail in several ways", ("Why", *_heads(judged)), [Group("", rows)]
        )
        beside = len(judged) <= _BESIDE  # the columns of more have no room there
        yield f"<div class=plots>{drawn}<div>{told}</div></div>" if beside else f"<div class=plots>{drawn}</div>{told}"
    else:
        yield "<p class=note>Every caption passes the gate.</p>"
    yield from _openers(measured)


def quality_plot(corpora: Sequence[Corpus]) -> Plot | None:
    """Which share of the captions fails the gate, by what is wrong with them."""
    shown = [(index, corpus) for index, corpus in enumerate(corpora) if _judged([corpus])]
    names = _found([corpus for _, corpus in shown])
    if not names:
        return None

    def draw(axes: "Axes") -> Legend:
        entries: list[tuple[object, str]] = []
        for row, (index, corpus) in enumerate(shown):
            shift = (row - (len(shown) - 1) / 2) * 0.6 / len(shown)  # of two equal shares both markers are seen
            shares = [_share(corpus, name) for name in names]
            places = [place + shift for place in range(len(names))]
            style = {**look(index), "linestyle": "none", "markersize": 6, "clip_on": False}
            [points] = axes.plot(shares, places, **style)
            axes.hlines(places, 0, shares, colors=style["color"], linewidth=0.8)
            entries.append((points, corpus.name))
        axes.set_yticks(range(len(names)), [shortened(_FAILURES.get(name, name)) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set(xlabel="share of the captions")
        axes.grid(axis="y", visible=False)
        percent(axes.xaxis)
        return entries

    findings = []
    for _, corpus in shown:
        ordered = sorted(names, key=lambda name: -_share(corpus, name))
        words = ", ".join(
            f"{_FAILURES.get(name, name)} {_share(corpus, name):.2%}" for name in ordered if _share(corpus, name)
        )
        findings.append(f"{shortened(corpus.name)}: {words or 'no caption fails'}.")
    height = max(_EDGE_INCHES + _ROW_INCHES * len(names) * max(1.0, len(shown) / 3), 1.5)
    return Plot("quality", "Captions that fail the gate", " ".join(findings), draw, height)


def _heads(corpora: Sequence[Corpus]) -> list[str]:
    return [shortened(corpus.name) for corpus in corpora]


def _measures(corpus: Corpus) -> dict[str, Any]:
    found: dict[str, Any] = (corpus.quality or {}).get("measures", {})
    return found


def _mean(corpus: Corpus, name: str, form: str) -> str:
    mean = _measures(corpus).get(name, {}).get("mean")
    return "–" if mean is None else f"{mark(corpus.stats)}{mean:{form}}"


def _failures(corpus: Corpus) -> dict[str, int]:
    found: dict[str, int] = corpus.gate or (corpus.quality or {}).get("failures", {})
    return found


def _judged(corpora: Sequence[Corpus]) -> list[Corpus]:
    return [corpus for corpus in corpora if corpus.quality or corpus.gate]


def _found(corpora: Sequence[Corpus]) -> list[str]:
    """What any of the sets fails, in the order of the gate; what is not known here comes last."""
    found = {name for corpus in corpora for name, count in _failures(corpus).items() if count}
    return [name for name in _FAILURES if name in found] + sorted(found - set(_FAILURES))


def _share(corpus: Corpus, name: str) -> float:
    """Of all rows that were judged, the empty ones among them."""
    return _failures(corpus).get(name, 0) / max(corpus.stats.num_captions + corpus.stats.num_empty, 1)


def _failed(corpus: Corpus, name: str) -> str:
    count = _failures(corpus).get(name, 0)
    return f"{count:,} ({_share(corpus, name):.2%})" if count else "0"


def _failed_in_any_way(corpus: Corpus) -> str:
    count = (corpus.quality or {}).get("num_failed")
    total = max(corpus.stats.num_captions + corpus.stats.num_empty, 1)
    return "–" if count is None else f"{count:,} ({count / total:.2%})"


def _openers(corpora: Sequence[Corpus]) -> Iterator[str]:
    tables = []
    head = ("Sentences that begin with", "number", "of all sentences")
    for corpus in corpora:
        openers = (corpus.quality or {}).get("openers", {}).get("counts", [])[:_OPENERS]
        total = _measures(corpus).get("num_sentences", {}).get("sum") or 0
        rows = [
            (label(f"{as_text(opener)} ..."), (f"{count:,}", f"{count / max(total, 1):.1%}"))
            for opener, count in openers
        ]
        words = f"How the sentences of {shortened(corpus.name)} begin most often"
        tables += [f"<div>{table(words, head, [Group(named(corpus), rows)])}</div>"] if rows else []
    if tables:
        yield f"<div class='plots short'>{''.join(tables)}</div>"


def as_text(tokens: str) -> str:
    """Join the tokens of an opener as they stand in a text: no space before a comma, "can't" in one, plain quotes."""
    joined = _NO_SPACE_AFTER.sub("", _NO_SPACE_BEFORE.sub("", tokens))
    return _CONTRACTED.sub('"', joined)
