"""One page out of runs: sections of figures and tables as HTML that is well-formed XML, needs no
script and loads nothing. Served while runs go on, it has a script that renews it."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from fastsmooth import __version__
from fastsmooth.figures import svg
from fastsmooth.figures.chart import COLORS, Drawing, Figure, draw
from fastsmooth.figures.heat import HeatMap, draw_heat
from fastsmooth.report import crossings, curves, grid, groups, layers, noise
from fastsmooth.report.curves import Facet
from fastsmooth.report.groups import Group, Sample
from fastsmooth.runfolder.numbers import exact
from fastsmooth.runfolder.read import SavedRun
from fastsmooth.sweep.critical import Analysis, analyse

WIDE, NARROW = 544, 326  # pixels: two figures side by side in 1120, one on a phone of 360
WIDE_LABELS, NARROW_LABELS = 150, 66  # of names beside the lines
EMPTY = ' class="none"'


@dataclass(frozen=True)
class Section:
    """A part of the page: what it shows in words, its series, figures, and tables as markup."""

    name: str
    title: str
    words: str = ""
    legend: tuple[tuple[str, str, str], ...] = ()  # (colour, key, name)
    figures: tuple[Figure | HeatMap, ...] = ()
    notes: tuple[str, ...] = ()
    table: str = ""


def drawn(figure: Figure | HeatMap, narrow: bool = False, legend: bool = False) -> Drawing:
    """Laid out for the page, or with the `legend` that a file of its own needs."""
    width, labels = (NARROW, NARROW_LABELS) if narrow else (WIDE, WIDE_LABELS)
    if isinstance(figure, HeatMap):
        return draw_heat(figure, width)
    return draw(figure, width, labels, legend)


# Sections


def sections(runs: list[SavedRun]) -> list[Section]:
    """What there is to show, in the order of the page."""
    grouped = groups.group(runs)
    trained = [g for g in grouped if g.mode == "normal"] or [
        g for g in grouped if g.mode == "critical"
    ]
    facets = curves.arrange(trained)
    parts = [
        training(facets),
        results(grouped, facets),
        smoothing([g for g in grouped if g.mode == "normal"]),
        sharpness([g for g in grouped if g.mode == "normal"]),
        critical(runs, grouped),
        noise_section([g for g in grouped if g.mode == "sampling"]),
        online(
            [g for g in grouped if any(curves.by_measurement("c2_sampled")(run) for run in g.runs)]
        ),
        by_layer(grouped),
        every_run(grouped),
    ]
    return [part for part in parts if part]


def training(facets: list[Facet]) -> Section | None:
    figures = tuple(f for i, facet in enumerate(facets, 1) for f in curves.training(facet, i))
    if not figures:
        return None
    several = any(len(line.group.done) > 1 for facet in facets for line in facet.lines)
    words = (
        "Lines are means over the seeds of a configuration" if several else "Each line is one run"
    )
    if several and any(len(facet.lines) <= curves.FEW for facet in facets):
        words += ", bands reach from the lowest to the highest seed"
    words += ". Below: the schedule that each followed."
    if any(
        run.state != "done" for facet in facets for line in facet.lines for run in line.group.runs
    ):
        words += (
            " Dashed: runs that are not done, by themselves; × where one diverged or failed, ○ "
            "where it stands."
        )
    for facet in facets:
        if facet.others or facet.left_out:
            words += (
                f" In colour: the {len(facet.lines)} with the highest final test accuracy; "
                f"{len(facet.others)} others grey"
            )
            words += f", {facet.left_out} not drawn." if facet.left_out else "."
    return Section("training", "Training", words, legend(facets), figures)


def legend(facets: list[Facet]) -> tuple[tuple[str, str, str], ...]:
    """Colour, letter and name of the series: of parted plots, which share their colours, each once
    and without a letter."""
    lines = [line for f in facets for line in f.lines]
    entries = {
        (line.color, line.key if line.key == line.group.key else "", line.label) for line in lines
    }
    return tuple(sorted(entries, key=color_rank)) if len(lines) > 1 else ()


def color_rank(entry: tuple[str, str, str]) -> int:
    return list(COLORS).index(entry[0])


def results(grouped: list[Group], facets: list[Facet]) -> Section:
    words = (
        "Mean ± standard deviation (n − 1) over the seeds of the runs that are done; accuracies "
        "are of the test set. The bold letters stand for the configurations in the figures."
    )
    if any(g.unit() for g in grouped):
        words += " δ is in units of √C² where no gradient variance C² was given."
    colors = {line.group.key: line.color for facet in facets for line in facet.lines}
    return Section("results", "Results", words, table=results_tables(grouped, colors))


def smoothing(grouped: list[Group]) -> Section | None:
    figures = tuple(grid.smoothing(grouped))
    words = (
        "One point a configuration: the mean over seeds, bars from the lowest to the highest; "
        "configurations that differ in their batch size alone are joined. δ is that of the first "
        "epoch, by the formula of the optimizer."
    )
    if not figures:
        return None
    return Section("smoothing", "Smoothing and accuracy", words, grid.legend(figures), figures)


def sharpness(grouped: list[Group]) -> Section | None:
    figures = tuple(grid.sharpness(grouped))
    words = (
        "Points, bars and joins as above. Sharpness is of the weights at the end, as "
        "fastsmooth.sharpness measured it."
    )
    return (
        Section("sharpness", "Sharpness", words, grid.legend(figures), figures) if figures else None
    )


def critical(runs: list[SavedRun], grouped: list[Group]) -> Section | None:
    by_group: dict[str, list[Analysis]] = {}
    for analysis in analyse(runs):
        by_group.setdefault(repr(sorted(analysis.group.items())), []).append(analysis)
    if not by_group:
        return None
    known = crossings.variances(grouped)
    parts = list(by_group.values())
    fields = groups.differing([part[0].group for part in parts])
    titles = [groups.spoken(part[0].group, fields) for part in parts]
    figures, notes = [], []
    for i, (part, title) in enumerate(zip(parts, titles, strict=True), 1):
        figures += crossings.critical(part, known, i, title)
        notes += [
            f"{title}: {w}" if title else w
            for w in (crossings.critical_words(a, known) for a in part)
        ]
    words = (
        "Updates until the running mean of the gradient norm is at most ε, and the gradient "
        "evaluations they cost: means over seeds, bars from the lowest to the highest. ○ around "
        "the batch size b* with the fewest evaluations; the grey line is the floor of the minimum; "
        "■ □ where theory puts b*."
    )
    table = critical_table(parts, titles, known)
    return Section(
        "critical", "Critical batch size", words, (), tuple(figures), tuple(notes), table
    )


def noise_section(grouped: list[Group]) -> Section | None:
    figures = noise.against_batch(grouped)
    facets = curves.arrange(noise.with_statistics(grouped))
    for i, facet in enumerate(facets, 1):
        figures += noise.distribution(facet, i)
    if not figures:
        return None
    words = (
        "The direction m that the optimizer takes minus the full gradient at the same point, over "
        "several drawn mini-batches. Bars are one standard error: over seeds; of one seed over its "
        "draws, which are mini-batches at one point for sgd and replayed histories with momentum. "
        "Dashed in the lower figures: a normal law."
    )
    return Section(
        "noise",
        "Noise of the search direction",
        words,
        legend(facets),
        tuple(figures),
        (),
        noise_table(grouped),
    )


def online(grouped: list[Group]) -> Section | None:
    facets = curves.arrange(grouped)
    figures = tuple(f for i, facet in enumerate(facets, 1) for f in curves.online(facet, i))
    if not figures:
        return None
    how = "; ".join(curves.estimators(facets))
    words = (
        f"As --track-noise measured them ({how}). Means over seeds, bands from the lowest to the "
        "highest. Dotted: δ as the schedule alone would have it, with constants that stay as they "
        "were first measured."
    )
    return Section("online", "Noise while training", words, legend(facets), figures)


def by_layer(grouped: list[Group]) -> Section | None:
    found, left_out = layers.maps(grouped)
    if not found:
        return None
    words = (
        "The gradient variance C² of each layer, which add up to that of all parameters: "
        "--track-noise with --quantities layers. Layers from the first at the top to the last; a "
        "measurement is shown until the next one; without a colour where a layer has no noise. "
        "Means over the seeds that are done."
    )
    words += f" {count(left_out, 'other configuration')} not drawn." if left_out else ""
    notes = tuple(said for _, said in found)
    figures = tuple(heat for heat, _ in found)
    return Section("layers", "Noise by layer", words, (), figures, notes)


def every_run(grouped: list[Group]) -> Section:
    rows = [(run, g) for g in grouped for run in g.runs]
    return Section(
        "runs",
        "Runs",
        table=f"<details><summary>{count(len(rows), 'run')}</summary>{runs_table(rows)}</details>",
    )


# Tables


def table(heads: list[str], rows: Iterable[list[str]]) -> str:
    """Cells are markup; the first names its row. On a narrow screen every row becomes a card, which
    names its cells."""
    head = "".join(f'<th scope="col">{text(h)}</th>' for h in heads)
    body = ""
    for first, *cells in rows:
        body += f'<tr><th scope="row">{first}</th>'
        for h, c in zip(heads[1:], cells, strict=True):
            body += f'<td data-name="{text(h)}"{"" if c else EMPTY}>{c or "&#8211;"}</td>'
        body += "</tr>"
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="table">{whole}</div>'


def text(words: object) -> str:
    return escape(groups.clean(str(words)))


def count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def counts(runs: list[SavedRun], grouped: list[Group]) -> str:
    return f"{count(len(runs), 'run')}, {count(len(grouped), 'configuration')}"


def plus_minus(sample: Sample | None, digits: str, factor: float = 1) -> str:
    if sample is None:
        return ""
    sd = sample.sd
    spread = f'<span class="sd"> ± {sd * factor:{digits}}</span>' if sd is not None else ""
    return f"{sample.mean * factor:{digits}}{spread}"


def results_tables(grouped: list[Group], colors: dict[str, str]) -> str:
    """A table for each mode, and what its configurations share beyond what all runs do."""
    parts = groups.by_mode(grouped)
    if len(parts) == 1:
        return results_table(grouped, colors)
    everywhere = groups.shared([g.config for g in grouped])
    blocks = []
    for mode, some in parts.items():
        common = groups.shared([g.config for g in some]).items()
        same = [
            groups.setting(n, v)
            for n, v in common
            if n not in everywhere and n != "mode" and groups.told(n, v, some)
        ]
        said = f'<p class="settings">All: {text(", ".join(same))}.</p>' if same else ""
        said *= len(some) > 1
        heading = f"<h3>--mode {text(groups.shown(mode))}</h3>"
        blocks.append(f"{heading}{said}{results_table(some, colors)}")
    return "".join(blocks)


def results_table(grouped: list[Group], colors: dict[str, str]) -> str:
    mixed = not all(g.unit() for g in grouped)
    columns: dict[str, Callable[[Group], str]] = {
        "n": lambda g: str(len(g.done)),
        "final accuracy, %": lambda g: plus_minus(g.sample(groups.final_accuracy), ".2f", 100),
        "best accuracy, %": lambda g: plus_minus(g.sample(groups.best_accuracy), ".2f", 100),
        "training loss": lambda g: plus_minus(
            g.sample(lambda run: groups.last(run, "train_loss")), ".4f"
        ),
        "test loss": lambda g: plus_minus(
            g.sample(lambda run: groups.last(run, "test_loss")), ".4f"
        ),
        ("δ, start → end" if mixed else "δ / √C², start → end"): lambda g: delta_cell(g, mixed),
        "updates": lambda g: whole_cell(g.sample(lambda run: groups.reached(run, "updates"))),
        "samples": lambda g: whole_cell(g.sample(lambda run: groups.reached(run, "samples"))),
        "time, s": lambda g: plus_minus(g.sample(groups.seconds), ".1f"),
        "not done": lambda g: ", ".join(
            f"{count} {text(groups.shown(state))}" for state, count in g.unfinished().items()
        ),
    }
    cells = {name: [of(g) for g in grouped] for name, of in columns.items()}
    kept = {name: values for name, values in cells.items() if any(values)}
    rows = (
        [series(colors.get(g.key), g.key, g.name), *(kept[name][i] for name in kept)]
        for i, g in enumerate(grouped)
    )
    return table(["configuration", *kept], rows)


def series(color: str | None, key: str, name: str) -> str:
    """A swatch, the key and the name of a configuration."""
    return f'{swatch(color) if color else ""}<b class="key">{text(key)}</b> {text(name)}'


def swatch(color: str) -> str:
    look = svg.paint(stroke=color)
    return (
        '<svg class="swatch" viewBox="0 0 20 8" width="20" height="8" aria-hidden="true"><path '
        f'd="M1 4h18"{look} stroke-width="3"/></svg>'
    )


def delta_cell(g: Group, mixed: bool) -> str:
    start = g.sample(lambda run: groups.first(run, "delta"))
    end = g.sample(lambda run: groups.last(run, "delta"))
    if not start or not end:
        return ""
    unit = " √C²" if g.unit() and mixed else ""
    change = f" → {end.mean:.4g}" if end.mean != start.mean else ""
    return f"{start.mean:.4g}{change}{unit}"


def whole_cell(sample: Sample | None) -> str:
    if sample is None:
        return ""
    spread = f'<span class="sd"> ± {sample.sd:,.0f}</span>' if sample.sd else ""
    return f"{sample.mean:,.0f}{spread}"


def critical_table(
    parts: list[list[Analysis]], titles: list[str], known: list[crossings.Variance]
) -> str:
    heads = ["runs, ε", "b*", "floor", "n", "c2_critical", "at the floor's ends", "c2_sampled"]
    heads.append("k2 (max ‖g‖²)")
    rows = []
    for part, title in zip(parts, titles, strict=True):
        for a in part:
            variances = crossings.constants(a, known)
            measured = [c.value for c in variances if c.source == crossings.SAMPLED]
            n = sorted({len(b.steps) for b in a.batches})
            edge = " (at the edge)" if a.at_edge else ""
            rows.append(
                [
                    text(f"{title}, ε {exact(a.eps)}".lstrip(", ")),
                    "" if a.best is None else f"{a.best:,}",
                    "{:,} to {:,}".format(*a.bracket) + edge if a.bracket else "",
                    " to ".join(str(v) for v in dict.fromkeys((n[0], n[-1]))) if n else "",
                    "" if a.c2_critical is None else f"{a.c2_critical:.4g}",
                    "{:.4g} to {:.4g}".format(*a.c2_range) if a.c2_range else "",
                    f"{measured[0]:.4g}" if measured else "",
                    "" if a.k2 is None else f"{a.k2:.4g}",
                ]
            )
    return table(heads, rows)


def noise_table(grouped: list[Group]) -> str:
    rows = [(g, noise.summary(g)) for g in grouped if g.done and noise.points(g.done[0])]
    if not rows:
        return ""
    heads = ["configuration, first seed", *(name for name, _ in rows[0][1])]
    lines = (
        [series(None, g.key, g.name), *(estimate(pair) for _, pair in cells)] for g, cells in rows
    )
    return table(heads, lines)


def estimate(pair: noise.Estimate | None) -> str:
    if pair is None:
        return ""
    value, error = pair
    return f"{value:.4g}" + (f'<span class="sd"> ± {error:.2g}</span>' if error is not None else "")


def runs_table(rows: list[tuple[SavedRun, Group]]) -> str:
    heads = ["run", "configuration", "seed", "state", "updates", "final accuracy, %", "remarks"]
    names = short_paths([run.path for run, _ in rows])
    cells = []
    for (run, g), name in zip(rows, names, strict=True):
        updates, accuracy = groups.reached(run, "updates"), groups.final_accuracy(run)
        cells.append(
            [
                text(name),
                text(g.key),
                text(groups.shown(run.config.get("seed"))),
                f'<span class="state {"good" if run.state == "done" else "bad"}">'
                f"{text(groups.shown(run.state))}</span>",
                "" if updates is None else f"{updates:,.0f}",
                "" if accuracy is None else f"{100 * accuracy:.2f}",
                text("; ".join(remarks(run))),
            ]
        )
    return table(heads, cells)


def short_paths(paths: list[Path]) -> list[str]:
    """Without the folders that all lie in."""
    if len(paths) == 1:
        return [paths[0].name or str(paths[0])]
    parents = [p.parts[:-1] for p in paths]
    same = next(
        (i for i, parts in enumerate(zip(*parents, strict=False)) if len(set(parts)) > 1),
        min(map(len, parents), default=0),
    )
    return [str(Path(*p.parts[same:])) for p in paths]


def remarks(run: SavedRun) -> list[str]:
    """What of a run's folder cannot be taken as it is."""
    notes = []
    reason = run.status.get("reason")
    if run.state != "done" and isinstance(reason, str) and reason.strip():
        notes.append(groups.clean(reason)[:200])
    if run.torn:
        notes.append(f"{count(run.torn, 'torn line')} of metrics.jsonl left out")
    if run.not_finite:
        notes.append(f"{count(run.not_finite, 'row')} with NaN or infinity, which are left out")
    return notes + [f"{name} cannot be read" for name in run.damaged]


# The page


@dataclass(frozen=True)
class Live:
    """A page that renews itself: which version of it this is, and how often to ask for another."""

    version: str
    every: float  # seconds


def html(runs: list[SavedRun], parts: list[Section]) -> str:
    beside = (
        "The figures lie beside this page in figures/, as SVG and, where matplotlib was there, as "
        "PDF."
    )
    return document(title(groups.group(runs)), body(runs, parts, beside))


def document(name: str, inside: str, live: Live | None = None) -> str:
    """A whole page. One that is live has a script; where scripts are off it is loaded again."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    policy, head = "default-src 'none'; style-src 'unsafe-inline'; img-src data:", ""
    if live is not None:
        script = Path(__file__).with_name("watch.js").read_text(encoding="utf-8")
        summed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{summed}'; connect-src 'self'"
        head = (
            f'<meta name="version" content="{live.version}"/>\n'
            f'<meta name="every" content="{live.every:g}"/>\n'
            f'<noscript><meta http-equiv="refresh" content="{math.ceil(live.every)}"/></noscript>\n'
            f"<script>{script}</script>\n"
        )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta http-equiv="Content-Security-Policy"
content="{policy}"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta name="color-scheme" content="light dark"/>
{head}<title>{text(name)}</title>
<style>
{variables()}{style}{svg.dark_rules()}
</style>
</head>
<body>
{inside}</body>
</html>
"""


def body(runs: list[SavedRun], parts: list[Section], beside: str = "") -> str:
    """What the page shows; `beside` says what lies beside it."""
    grouped = groups.group(runs)
    main = "\n".join(map(section, parts))
    contents = "".join(f'<a href="#{part.name}">{text(part.title)}</a>' for part in parts)
    return f"""<header>
<p class="from">fastsmooth report</p>
<h1>{text(title(grouped))}</h1>
{facts(runs, grouped)}
{settings(grouped)}
{warnings(runs, grouped)}
<nav>{contents}</nav>
</header>
<main>
{main}
</main>
<footer>
<p>δ, the degree of smoothing: how far the noise of the updates smooths the loss; lr √(C²/b) for
plain SGD, with C² the variance of the gradient of one sample and b the batch size
(arXiv 2311.08745, arXiv 2402.02325). “In units of √C²”: no C² was given or published.</p>
<p>{" ".join(filter(None, (f"fastsmooth {__version__}.", beside)))}</p>
</footer>
"""


def variables() -> str:
    """The colours of the style sheet: those of the figures."""
    light, dark = (
        "".join(f"--{name}:{pair[i]};" for name, pair in COLORS.items() if name[-1].isalpha())
        for i in (0, 1)
    )
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def section(part: Section) -> str:
    blocks = [f"<h2>{text(part.title)}</h2>"]
    if part.words:
        blocks.append(f'<p class="words">{text(part.words)}</p>')
    if part.legend:
        entries = "".join(f"<li>{series(*entry)}</li>" for entry in part.legend)
        blocks.append(f'<ul class="legend">{entries}</ul>')
    if part.figures:
        blocks.append(f'<div class="figures">{"".join(map(figure, part.figures))}</div>')
    if part.notes:
        blocks.append(
            f'<ul class="notes">{"".join(f"<li>{text(note)}</li>" for note in part.notes)}</ul>'
        )
    return f'<section id="{part.name}">\n' + "\n".join([*blocks, part.table]) + "\n</section>"


def figure(f: Figure | HeatMap) -> str:
    """Laid out twice, for wide and narrow screens: scaled down, its text would be too small."""
    both = [
        svg.svg(drawn(f, narrow), f' class="{"narrow" if narrow else "wide"}"')
        for narrow in (False, True)
    ]
    return f"<figure><figcaption>{text(f.title)}</figcaption>{''.join(both)}</figure>\n"


def title(grouped: list[Group]) -> str:
    """What was trained on what."""
    both = [
        sorted({groups.shown(g.config.get(name)) for g in grouped}) for name in ("model", "dataset")
    ]
    names = [
        ", ".join(values) if len(values) < 4 else f"{len(values)} {kind}"
        for values, kind in zip(both, ("models", "data sets"), strict=True)
    ]
    return " on ".join(names)


def facts(runs: list[SavedRun], grouped: list[Group]) -> str:
    done = sum(run.state == "done" for run in runs)
    entries = [
        ("runs", f"{len(runs)}", "all done" if done == len(runs) else f"{done} done"),
        ("configurations", f"{len(grouped)}", ""),
    ]
    trained = [
        (sample, g)
        for g in grouped
        if g.mode == "normal" and (sample := g.sample(groups.final_accuracy))
    ]
    if trained:
        sample, best = max(trained, key=lambda pair: pair[0].mean)
        spread = f" ± {100 * sample.sd:.2f}" if sample.sd is not None else ""
        highest = f"{100 * sample.mean:.2f}{spread} %"
        entries.append(("highest final test accuracy", highest, f"{best.name}, n = {sample.n}"))
    samples = [v for run in runs if (v := groups.reached(run, "samples")) is not None]
    entries.append(("gradient evaluations", f"{sum(samples):,.0f}", "of all runs"))
    cells = "".join(
        f"<div><dt>{text(a)}</dt><dd>{text(b)}<small>{text(c)}</small></dd></div>"
        for a, b, c in entries
    )
    return f'<dl class="facts">{cells}</dl>'


def settings(grouped: list[Group]) -> str:
    words = same_settings(grouped)
    return f'<p class="settings">{text(words)}</p>' if words else ""


def same_settings(grouped: list[Group]) -> str:
    """What all runs have in common, of what names speak of; empty of one configuration."""
    same = groups.shared([g.config for g in grouped])
    words = [
        groups.setting(name, value)
        for name, value in same.items()
        if groups.told(name, value, grouped)
    ]
    return f"All runs: {', '.join(words)}." if words and len(grouped) > 1 else ""


def warnings(runs: list[SavedRun], grouped: list[Group]) -> str:
    """What a reader has to know of the runs before the figures."""
    notes = []
    states: dict[str, int] = {}
    for run in runs:
        if run.state != "done":
            states[groups.shown(run.state)] = states.get(groups.shown(run.state), 0) + 1
    if states:
        counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        notes.append(f"{counts}: not in any mean.")
    torn, bad = sum(run.torn for run in runs), sum(run.not_finite for run in runs)
    damaged = sum(len(run.damaged) for run in runs)
    if torn or bad or damaged:
        notes.append(
            f"Left out: {count(torn, 'torn line')}, the NaN or infinite values of "
            f"{count(bad, 'row')}, {count(damaged, 'file')} that cannot be read (see Runs)."
        )
    notes += seeds_twice(grouped)
    items = "".join(f"<li>{text(note)}</li>" for note in notes)
    return f'<ul class="warnings">{items}</ul>' if notes else ""


def seeds_twice(grouped: list[Group]) -> list[str]:
    """A line where a configuration has several finished runs of one seed."""
    seeds = [{groups.shown(run.config.get("seed")) for run in g.done} for g in grouped]
    twice = [g.name for g, some in zip(grouped, seeds, strict=True) if len(some) < len(g.done)]
    return [f"Several runs of one seed in {', '.join(twice[:3])}: n counts runs."] if twice else []
