"""The results of benchmarks.latency as tables, a Markdown page and a picture."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.latency_cases import GRIDS, METHODS, SHAPE, SMALL_GAIN, Case


def show_seconds(seconds: float) -> str:
    """Return a time with three significant digits."""
    scale, unit = (1.0, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    value = seconds * scale
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


Grid = tuple[str, list[str], list[list[str]]]  # title, columns, rows


def tables(results: dict, cases: Sequence[Case]) -> list[Grid]:
    """Return the tables of the results so far."""
    columns = ["case", SHAPE, "method", "first token", "per look", "per text token", "whole answer", "answers/s"]
    times, ratios = [], []
    for case in cases:
        of_case = results.get(case.name, {})
        for method in (method for method in METHODS if method in of_case):
            measured, bound = of_case[method]["measured"], of_case[method]["least"]
            cells = [
                f"{show_seconds(measured[name])} ({show_seconds(bound[name])})" if name in measured else ""
                for name in ("first_token", "look", "text_token", "answer")
            ]
            times.append([case.name, case.shape, method, *cells, f"{case.batch / measured['answer']:.3g}"])
        if {"latent", "pixels"} <= of_case.keys():
            pairs = [(of_case["pixels"][kind], of_case["latent"][kind]) for kind in ("measured", "least")]
            shown = [f"{pixels[name] / latent[name]:.2f}" for name in ("look", "answer") for pixels, latent in pairs]
            ratios.append([case.name, case.shape, *shown])
    compared = ["per look", "per look, lower bound", "whole answer", "whole answer, lower bound"]
    return [
        ("time, and its lower bound in brackets", columns, times),
        ("pixels / latent", ["case", SHAPE, *compared], ratios),
    ]


NOTES = (
    "Times are of the whole batch: until every request has its first token (prompts are prefilled one after another), "
    "for one look of every request, and for one text token of each. A look is K slots and two markers, or a picture "
    "that is encoded and prefilled.",
    "The lower bound is the larger of arithmetic over the measured peak and bytes (weights, and cached keys and "
    "values) over the measured bandwidth; activations are not counted.",
)


def show(console: Console, results: dict, cases: Sequence[Case], lines: Sequence[str]) -> None:
    """Print the tables and the lines below them."""
    for title, columns, rows in tables(results, cases):
        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in lines:
        console.print(line, highlight=False)


def write_markdown(path: Path, results: dict, cases: Sequence[Case], lines: Sequence[str], command: str) -> None:
    """Write the tables as a page."""
    parts = ["# Latency: slots against pictures", f"![ratios and parts]({path.stem}.png)", *lines]
    for title, columns, rows in tables(results, cases):
        body = [columns, ["---"] * len(columns), *rows]
        parts += [f"## {title[0].upper()}{title[1:]}", "\n".join(f"| {' | '.join(row)} |" for row in body)]
    path.write_text("\n\n".join([*parts, f"Made with `{command}`."]) + "\n")


LATENT, PIXELS = "#173a8c", "#d0202e"
PARTS = (("first_token", "prompt", "#9aa5b1"), ("text", "text", "#f2b134"), ("looks", "looks", "#3f88c5"))
DRAWN = ("tokens-2048", "base", "tokens-256", "looks-1", SMALL_GAIN)


def draw(path: Path, results: dict, cases: Sequence[Case], caption: str) -> None:
    """Draw the ratios against the vision tokens of a picture, and the parts of the time of answers."""
    both = [case for case in cases if {"latent", "pixels"} <= results.get(case.name, {}).keys()]
    figure = Figure(figsize=(15, 6.4), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_ratios(left, results, both)
    by_name = {case.name: case for case in both}
    _draw_parts(right, results, [by_name[name] for name in DRAWN if name in by_name])
    figure.text(0.5, 0.015, caption, ha="center", fontsize=7.5, color="#555555")
    figure.subplots_adjust(left=0.06, right=0.985, top=0.92, bottom=0.17, wspace=0.42)
    figure.savefig(path, format="png")


def _draw_ratios(panel: Axes, results: dict, cases: Sequence[Case]) -> None:
    base = Case("base")
    line = [case for case in cases if dataclasses.replace(case, name="base", vision_tokens=1024) == base]
    line.sort(key=lambda case: case.vision_tokens)
    others = [case for case in cases if case not in line and case.batch == 1 and case.slots == base.slots]

    def ratio(case: Case, name: str) -> float:
        of_case = results[case.name]
        return of_case["pixels"]["measured"][name] / of_case["latent"]["measured"][name]

    for name, label, colour in (("look", "one look", PIXELS), ("answer", "whole answer", LATENT)):
        sizes = [case.vision_tokens for case in line]
        ratios = [ratio(case, name) for case in line]
        panel.plot(sizes, ratios, "o-", color=colour, label=f"{label}, {base.looks} looks")
        # The cost of a look hardly depends on the number of looks: it is drawn once for each size.
        apart = others if name == "answer" else [case for case in others if case.vision_tokens not in sizes]
        places = [(case.vision_tokens, ratio(case, name)) for case in apart]
        panel.plot(*zip(*places, strict=True) if places else ((), ()), "D", color=colour, mfc="white")
        for case, place in zip(apart, places, strict=True):
            text = f"{case.looks} look{'s' * (case.looks > 1)}, {case.text} per text"
            style = {"textcoords": "offset points", "fontsize": 8, "color": colour}
            aside, side = ((-7, 4), "right") if case.looks > base.looks else ((7, -9), "left")
            panel.annotate(text, place, aside, ha=side, **style)
    panel.axhline(1, color="#777777", lw=1, ls="--")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(list(GRIDS), [str(size) for size in GRIDS])
    panel.set_xlim(min(GRIDS) / 1.3, max(GRIDS) * 1.6)
    low, high = min(panel.get_ylim()[0], 0.45), max(panel.get_ylim()[1], 5.5)
    panel.set_ylim(low, high)
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low <= tick <= high]
    panel.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.25)
    panel.set_xlabel("vision tokens of a picture")
    panel.set_title(f"time with pictures over time with slots (K {base.slots}, one request)", fontsize=12)
    panel.legend(fontsize=8, loc="upper left")


def _draw_parts(panel: Axes, results: dict, cases: Sequence[Case]) -> None:
    names = []
    for number, case in enumerate(cases):
        whole = results[case.name]["pixels"]["measured"]["answer"]
        for line, method in enumerate(("pixels", "latent")):
            measured, start = results[case.name][method]["measured"], 0.0
            height = 3 * number + line
            names.append((height, method))
            for name, label, colour in PARTS:
                width = measured[name] / whole * 100
                panel.barh(height, width, 0.85, start, color=colour, label=label if not number + line else None)
                start += width
            panel.text(start + 1, height, show_seconds(measured["answer"]), va="center", fontsize=9)
        looks = f"{case.looks} look{'s' * (case.looks > 1)}"
        title = f"{case.vision_tokens} vision tokens, {looks}, {case.text} tokens per text"
        panel.text(0, 3 * number - 0.78, title, va="center", fontsize=9, weight="bold")
    panel.set_yticks([height for height, _ in names], [name for _, name in names])
    panel.set_ylim(3 * len(cases) - 1, -1.4)
    panel.set_xlim(0, 118)
    panel.set_xlabel("% of the answer with pictures")
    panel.set_title("parts of an answer's time", fontsize=12)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=9, loc="upper right", bbox_to_anchor=(1, -0.09), ncols=3, frameon=False)
