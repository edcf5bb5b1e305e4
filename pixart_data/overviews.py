"""The page about a dataset: what is in it and how large, whether its features can be right, and what they look like."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pixart_data.charts import STYLE, curve, histogram, ranges, shares
from pixart_data.figures import LatentFigures, TextFigures
from pixart_data.pages import bar, escaped, page
from pixart_data.surveys import Match, Portion, Survey, space
from pixart_data.thumbnails import Thumbnail

_MOST_OUTLIERS = 8
_TOKEN_RMS_BARS = 60


@dataclass(frozen=True)
class Overview:
    """What a page is made of.

    Attributes:
        place: The dataset, as a person would type it.
        unfinished: Names of sets that were begun only.
        pictures: Samples to look at, by image set.
        no_pictures: Why none was decoded and what to type; empty where some were.
    """

    place: str
    surveys: Sequence[Survey]
    matches: Sequence[Match] = ()
    unfinished: Sequence[str] = ()
    pictures: dict[str, list[Thumbnail]] = field(default_factory=dict)
    no_pictures: str = ""


def overview_page(overview: Overview) -> str:
    """Render one page that needs nothing else."""
    return page(f"dataset {overview.place}", _body(overview), STYLE + _STYLE)


def _body(overview: Overview) -> Iterator[str]:
    surveys = overview.surveys
    yield f"<h1>Dataset</h1><p class=lead>{escaped(overview.place)}</p>"
    alarms = [(survey.root.name, alarm) for survey in surveys for alarm in survey.alarms()]
    alarms += [(name, "not finished; run `pixart extract` to its end") for name in overview.unfinished]
    if alarms:
        items = "".join(f"<li><b>{escaped(name)}</b>: {escaped(alarm)}</li>" for name, alarm in alarms)
        yield f"<div class=alarm><b>Alarms</b><ul>{items}</ul></div>"
    yield _cards(_totals(overview))
    if overview.matches:
        yield "<h2>What trains</h2>"
        yield _table(
            ("image set", "text set", "samples in both", "images without text", "texts without image"),
            (
                (
                    m.images,
                    m.texts,
                    f"{m.num_both:,}",
                    f"{m.num_images - m.num_both:,}",
                    f"{m.num_texts - m.num_both:,}",
                )
                for m in overview.matches
            ),
            "names-2",
        )
    for survey in surveys:
        yield from _set(survey)
    yield from _pictures(overview)
    yield from _rejected(surveys)


def _totals(overview: Overview) -> Iterator[tuple[str, str]]:
    if overview.matches:
        yield "samples to train on", f"{max(m.num_both for m in overview.matches):,}"
    for survey in overview.surveys:
        yield f"{survey.root.name}: {survey.manifest.kind}s", f"{survey.num_rows:,}"
    yield "rejected rows", f"{sum(sum(s.manifest.counts['rejected'].values()) for s in overview.surveys):,}"
    yield "size", space(sum(survey.size_bytes for survey in overview.surveys))


def _set(survey: Survey) -> Iterator[str]:
    manifest = survey.manifest
    yield f"<h2>{escaped(survey.root.name)}: {escaped(manifest.kind)} features</h2>"
    model = manifest.model
    revision = f" @ {model['revision']}" if model.get("revision") else ""
    facts = [
        ("model", f"{model.get('id', 'unknown')}{revision}, computed in {model.get('dtype', 'unknown precision')}")
    ]
    facts += [(name, str(value)) for name, value in manifest.policy.items()]
    if manifest.codec:
        facts += _codec(survey)
    yield _table((), facts, "words")
    if manifest.kind == "image":
        yield from _buckets(survey)
    elif survey.num_rows:
        yield from _lengths(survey)
    if isinstance(survey.figures, LatentFigures):
        yield from _latents(survey.figures)
    elif survey.figures is not None:
        yield from _texts(survey.figures)
    yield from _storage(survey)


def _codec(survey: Survey) -> Iterator[tuple[str, str]]:
    codec = survey.manifest.codec
    measured = codec.get("measured")
    lost = ""
    if measured:
        lost = (
            f"; measured on {measured['num_tokens']:,} tokens: channel error {measured['channel_error']:.2%} (worst "
            f"channel {measured['worst_channel_error']:.2%}), cosine {measured['cosine_mean']:.5f} on average, "
            f"{measured['cosine_lowest']:.5f} at worst"
        )
    yield "codec", f"{codec['name']}{lost}"


def _buckets(survey: Survey) -> Iterator[str]:
    buckets = [bucket for bucket in survey.manifest.buckets if bucket["rows"]]
    most = max((bucket["rows"] for bucket in buckets), default=1)
    yield f"<h3>Buckets: {len(buckets)} of {len(survey.manifest.buckets)} hold images</h3><div class='bars buckets'>"
    for bucket in buckets:
        sides = escaped(f"{bucket['height_px']} x {bucket['width_px']} px")
        canvas = _canvas(bucket["height_px"], bucket["width_px"])
        label = f"{canvas}{escaped(str(bucket['ratio']))} &nbsp; {sides}"
        figure = f"{bucket['rows']:,} in {bucket['shards']:,} shard{'s' * (bucket['shards'] != 1)}"
        yield bar("own", label, figure, bucket["rows"] / most)
    yield "</div><p class=note>Height over width, height x width. A batch is of one bucket.</p>"
    if survey.totals.num_flipped:
        yield f"<p class=note>{survey.totals.num_flipped:,} images are stored mirrored, too.</p>"


def _canvas(height_px: int, width_px: int) -> str:
    """A small outline of a canvas."""
    longest = max(height_px, width_px)
    height, width = 16 * height_px / longest, 16 * width_px / longest
    return (
        '<svg class=canvas viewBox="0 0 18 18" aria-hidden=true>'
        f'<rect x="{9 - width / 2:.1f}" y="{9 - height / 2:.1f}" width="{width:.1f}" height="{height:.1f}"/></svg>'
    )


def _lengths(survey: Survey) -> Iterator[str]:
    totals = survey.totals
    median, high, longest = (totals.percentile(share) for share in (0.5, 0.95, 1.0))
    yield "<h3>Tokens of a caption</h3>"
    yield histogram(
        totals.lengths.tolist(),
        f"captions by number of tokens: half have at most {median}, 95% at most {high}, the longest {longest}",
        "0 tokens",
        f"{longest} tokens",
    )
    words = f"{survey.num_truncated:,} captions ({survey.num_truncated / survey.num_rows:.2%}) were longer and are cut."
    shared = survey.num_rows - totals.num_members
    if shared:
        words += f" {shared:,} rows share the features of a row with the same caption."
    yield f"<p class=note>{words}</p>"


def _latents(figures: LatentFigures) -> Iterator[str]:
    yield "<h3>Latents by channel</h3>"
    if not figures.num_used:
        return
    columns = [figures.scaled(v).tolist() for v in (figures.least, figures.mean, figures.most)]
    least, mean, most = columns
    std = figures.scaled_std.tolist()
    names = [f"channel {number}" for number in range(len(mean))]
    yield ranges(
        list(zip(names, least, mean, std, most, strict=True)),
        f"scaled for training: least, mean, std, largest; boxes should end near -1 and 1; {figures.num_used:,} images",
        (-1.0, 1.0),
    )
    yield _table(
        ("scaled", "mean", "std", "min", "max", "posterior std"),
        (
            (name, *(f"{value:.3f}" for value in values))
            for name, *values in zip(
                names, mean, std, least, most, (figures.posterior_std * figures.scaling_factor).tolist(), strict=True
            )
        ),
    )
    shift = f", shift factor {figures.shift_factor:g}" if figures.shift_factor else ""
    yield (
        f"<p class=note>Of {figures.num_samples:,} images, chosen at random, the same ones each time. Stored latents "
        f"are not scaled; scaling factor {figures.scaling_factor:g}{shift}. Mean and std are those of latents drawn "
        "from the posteriors, min and max of the posteriors' means.</p>"
    )


def _texts(figures: TextFigures) -> Iterator[str]:
    yield "<h3>Values of the text features</h3>"
    rms = figures.token_rms
    if not len(rms):
        return
    highest = float(rms[-1]) or 1.0
    counts = [0] * _TOKEN_RMS_BARS
    for value in rms.tolist():
        counts[min(int(value / highest * _TOKEN_RMS_BARS), _TOKEN_RMS_BARS - 1)] += 1
    median = float(rms[len(rms) // 2])
    label = f"tokens by rms over their channels: median {median:.3g}"
    yield histogram(counts, label, "rms 0", f"rms {highest:.3g}", 100)
    positions = figures.position_rms.tolist()
    label = f"mean rms of the tokens at each position of a caption, from 0 to {max(positions):.3g}"
    yield curve(positions, label, "first token", f"token {len(positions)}")
    outliers = figures.outliers()
    if outliers:
        named = ", ".join(f"{channel} ({ratio:.0f} times)" for channel, ratio in outliers[:_MOST_OUTLIERS])
        more = f" and {len(outliers) - _MOST_OUTLIERS} more" if len(outliers) > _MOST_OUTLIERS else ""
        yield f"<p>Channels far larger than the median one: {named}{more}. T5 has such channels.</p>"
    yield (
        f"<p class=note>Of {figures.num_samples:,} captions ({len(rms):,} tokens), chosen at random, the same ones "
        f"each time. Zero vectors: {figures.zero_share:.2%} of the tokens.</p>"
    )


def _storage(survey: Survey) -> Iterator[str]:
    total = survey.size_bytes
    each = f", {total / survey.num_rows:,.0f} bytes a sample" if survey.num_rows else ""
    yield f"<h3>Storage: {space(total)}{each}</h3>"
    portions = [*survey.shards, *_merged(survey.tables)]
    yield shares([(p.what, p.size_bytes, space(p.size_bytes)) for p in portions], "what takes how much space")
    shards = survey.manifest.shards
    if shards:
        words = f"{len(shards):,} shards, {space(sum(s['size_bytes'] for s in shards) / len(shards))} on average."
        if survey.small_shards:
            words += (
                f" {survey.small_shards:,} are small; `pixart compact {survey.root.parent} --out FOLDER` gathers them."
            )
        yield f"<p class=note>{escaped(words)}</p>"
    rows = [
        (p.what, f"{p.size_bytes:,}", f"{p.size_bytes / max(total, 1):.2%}") for p in (*survey.shards, *survey.tables)
    ]
    yield f"<details><summary>In bytes, by column</summary>{_table(('what', 'bytes', 'share'), rows)}</details>"


def _merged(tables: Sequence[Portion]) -> list[Portion]:
    """Add up the columns of a file."""
    sizes: dict[str, int] = {}
    for portion in tables:
        name = portion.what.partition(":")[0]
        sizes[name] = sizes.get(name, 0) + portion.size_bytes
    return [Portion(name, size_bytes) for name, size_bytes in sizes.items()]


def _pictures(overview: Overview) -> Iterator[str]:
    if overview.no_pictures:
        yield f"<h2>Samples</h2><p class=error>No pictures: {escaped(overview.no_pictures)}</p>"
    for name, samples in overview.pictures.items():
        yield f"<h2>{escaped(name)}: {len(samples)} samples</h2>"
        if any(sample.jpeg for sample in samples):
            yield "<p class=note>Decoded from the means of the stored latents: what training sees of an image.</p>"
        yield f"<div class=samples>{''.join(map(_figure, samples))}</div>"


def _figure(sample: Thumbnail) -> str:
    row = sample.row
    captions = [_words(text["caption"]) for text in sample.texts.values()]
    alt = escaped(next(filter(None, captions), "") or f"a picture without a caption, {row['key']}")
    picture = ""
    if sample.jpeg:
        picture = f'<img src="{sample.url}" alt="{alt}">'
    elif sample.problem:
        picture = f"<p class=error>{escaped(sample.problem)}</p>"
    lines = [f"<p>{text}</p>" for text in _captions(sample)] or ["<p class=note>no caption in any text set</p>"]
    ops = f", {row['image_ops']}" if row["image_ops"] else ""
    known = row["original_width_px"] is not None  # other tools may not have told
    original = f"{row['original_width_px']} x {row['original_height_px']} px" if known else "original size unknown"
    facts = f"{original}{ops}, bucket {row['bucket']}"
    return (
        f"<figure>{picture}<figcaption>{''.join(lines)}<p class=note>{escaped(row['key'])}<br>{escaped(facts)}</p>"
        "</figcaption></figure>\n"
    )


def _captions(sample: Thumbnail) -> Iterator[str]:
    for name, text in sample.texts.items():
        of = f"<b>{escaped(name)}</b>: " if len(sample.texts) > 1 else ""
        cut = ", cut" if text["truncated"] else ""
        yield f"{of}{escaped(_words(text['caption']))} <span class=soft>({text['num_tokens']} tokens{cut})</span>"


def _words(text: str | None) -> str:
    return " ".join((text or "").split())


def _rejected(surveys: Sequence[Survey]) -> Iterator[str]:
    yield "<h2>Rejected rows</h2>"
    for survey in surveys:
        counts = survey.manifest.counts["rejected"]
        rows_in = survey.manifest.counts["rows_in"]
        told = f"{survey.root.name}: {rows_in:,} rows in = {survey.num_rows:,} out + {sum(counts.values()):,} rejected"
        yield f"<p>{escaped(told)}</p>"
        if not counts:
            continue
        most = max(counts.values())
        yield "<div class='bars reasons'>"
        for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
            yield bar("own", escaped(reason), f"{count:,} ({count / max(rows_in, 1):.2%})", count / most)
        yield "</div>"
        rows = [(row["key"], reason, row["detail"] or "") for reason, rows in survey.rejected.items() for row in rows]
        if rows:
            yield _table(("some of them", "reason", "detail"), rows, "words")


def _cards(figures: Iterable[tuple[str, str]]) -> str:
    cards = (f"<div><dt>{escaped(name)}</dt><dd>{escaped(figure)}</dd></div>" for name, figure in figures)
    return f"<dl class=cards>{''.join(cards)}</dl>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    names = "".join(f"<th scope=col>{escaped(name)}</th>" for name in head)
    heading = f"<thead><tr>{names}</tr></thead>" if head else ""
    body = "".join(
        f"<tr><th scope=row>{escaped(first)}</th>{''.join(f'<td>{escaped(cell)}</td>' for cell in others)}</tr>\n"
        for first, *others in rows
    )
    return f"<div class=wide><table class='{kind}'>{heading}<tbody>\n{body}</tbody></table></div>"


_STYLE = """
main { max-width: 68rem; }
h2 { border-top: 1px solid var(--line); padding-top: 1.5rem; } h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
.lead, .words td, li, .error { overflow-wrap: anywhere; } .soft { color: var(--soft); }
.alarm, .error { background: var(--warn-page); color: var(--warn); border-radius: .5rem; padding: .75rem 1rem; }
.alarm ul { margin: .25rem 0 0; padding-left: 1.25rem; } .error { font-size: .875rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.cards div { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; }
.cards dt { color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
.cards dd { margin: 0; font-size: 1.3rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.buckets .bar { grid-template-columns: minmax(6rem, 13rem) 1fr 10rem; }
.reasons .bar { grid-template-columns: minmax(6rem, 13rem) 1fr 9rem; }
.canvas { width: 1.1rem; height: 1.1rem; margin-right: .6rem; vertical-align: -.2rem; }
.canvas rect { fill: none; stroke: var(--soft); }
tbody th { font-weight: 400; }
.words td { text-align: left; vertical-align: top; white-space: normal; }
.words th { text-align: left; vertical-align: top; }
.names-2 th:nth-child(2), .names-2 td:nth-child(2) { text-align: left; }
summary { cursor: pointer; color: var(--soft); font-size: .875rem; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1.25rem; }
figure { margin: 0; background: var(--card); border-radius: .5rem; overflow: hidden; break-inside: avoid; }
figure img { display: block; width: 100%; height: 13rem; object-fit: contain; background: var(--line); }
figcaption { padding: .6rem .8rem; font-size: .875rem; overflow-wrap: anywhere; }
figcaption p { margin: 0 0 .4rem; max-height: 12rem; overflow-y: auto; } figure .error { margin: .6rem; }
"""
