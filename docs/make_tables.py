"""Write the tables and the reference pages in docs/ again: from the committed JSON reports, and from the code.

python docs/make_tables.py

A table is between `<!-- table: NAME -->` and `<!-- end of table -->`; the script replaces it.
"""

from __future__ import annotations

import json
import re
import statistics
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import make_reference

from gateway.settings_docs import settings_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"(<!-- table: (?P<name>.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def main() -> None:
    """Write each document that has tables."""
    for path in documents():
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")


def documents() -> list[Path]:
    """Return the documents that have tables."""
    return [path for path in sorted((ROOT / "docs").rglob("*.md")) if TABLE.search(path.read_text(encoding="utf-8"))]


def renewed(text: str) -> str:
    """Return the document with every table as its report has it.

    Raises:
        KeyError: a marker names no table.
    """
    return TABLE.sub(lambda found: f"{found[1]}{TABLES[found['name']]()}\n{found[3]}", text)


def _candidates() -> str:
    report = _read("model_store/released/explanations.json")
    facts = (
        "quarter", "quarter_peak", "half", "half_peak", "class_correlation", "random_head_correlation", "insertion",
        "deletion", "score", "road",
    )  # fmt: skip
    named = [(f"`{row['method']}`, {row['layer']}", row) for row in report["candidates"]]
    rows = [
        (name, *("" if row[fact] is None else f"{row[fact]:.2f}" for fact in facts), _randomised(row["randomised"]))
        for name, row in (*named, ("random heat", report["random_heat"]))
    ]
    head = (
        "heatmap", "quarter", "peak in it", "half", "peak in it", "class correlation", "random head", "insertion",
        "deletion", "ins - del", "ROAD", "random down to layer4 … layer1",
    )  # fmt: skip
    chosen = report["chosen"]["method"]
    about = f"{report['images']} held-out images; chosen: `{chosen}`"
    return f"{about}:\n\n{_table(head, rows)}"


def _randomised(found: dict[str, float]) -> str:
    return ", ".join(f"{found[name]:.2f}" for name in ("layer4", "layer3", "layer2", "layer1") if name in found)


def _heatmap_test() -> str:
    found = _read("benchmarks/results/familiar.json")["test"]
    images = sum(verdict["images"] for verdict in found["verdicts"].values())
    rows = [
        (text.removesuffix("."), f"{verdict['images'] / images:.0%}", f"{verdict['accuracy']:.1%}")
        for text, verdict in found["verdicts"].items()
    ]
    return _table(("verdict", "of the answers", "right"), rows).replace("%", " %")


def _transfer() -> str:
    arms = _read("benchmarks/results/transfer.json")["arms"]
    names = {
        "transfer": "head (4 epochs), then `layer3` and `layer4` too (11 epochs)",
        "from scratch": "from random weights (15 epochs)",
    }
    rows = [
        (names[name], arm["rate"], f"{arm['test_accuracy']:.1%} ± {arm['test_accuracy_sd']:.1%}".replace("%", " %"))
        for name, arm in arms.items()
    ]
    return _table(("", "rate", "accuracy"), rows)


def _training_speed() -> str:
    rows = []
    for size, found in _read("benchmarks/results/training.json")["sizes"].items():
        ours, bare = found["ours_images_per_s"], found["bare_images_per_s"]
        fastest = [
            max(speed for name, speed in bare.items() if name.endswith(convolutions))
            for convolutions in ("torch's convolutions", "patch convolutions")
        ]
        shares = [(f"{speed:.0f}", f"{ours / speed:.0%}".replace("%", " %")) for speed in fastest]
        rows.append((f"{size} pixels", f"{ours:.0f}", *shares[0], *shares[1]))
    head = (
        "images", "ours, images/s", "bare PyTorch", "ours of it", "bare with our convolutions", "ours of it"
    )  # fmt: skip
    return _table(head, rows)


def _ablations() -> str:
    """Return the figures of each short training, and what it gained over the one that the others change."""
    report = _read("benchmarks/results/ablations.json")
    arms = report["arms"]
    kinds = ("gaussian_noise", "glass_blur", "pixelate", "fog", "contrast", "jpeg_compression")
    rows = [
        (
            name,
            *(_plus_minus(found[figure]) for figure in ("accuracy", "corrupted")),
            "" if name == "PixMix" else _plus_minus(found["gain"]["corrupted"], sign="+"),
            *(f"{100 * found[kind]['mean']:.0f}" for kind in kinds),
            f"{found['calibration_error_corrupted']['mean']:.3f}",
            f"{found['processor_s']['mean'] / arms['PixMix']['processor_s']['mean']:.1f}",
        )
        for name, found in arms.items()
    ]
    named = (*(kind.split("_")[-1 if kind == "gaussian_noise" else 0] for kind in kinds), "calibration error", "time")
    seeds = arms["PixMix"]["seeds"]
    about = f"n = {seeds} seeds" if seeds > 1 else "n = 1 seed, so the table says nothing of how seeds scatter"
    return f"{about}:\n\n{_table(('recipe', 'clean, %', 'corrupted, %', 'gain', *named), rows)}"


def _plus_minus(found: dict[str, float], sign: str = "") -> str:
    deviation = found["standard_deviation"]
    return f"{100 * found['mean']:{sign}.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _engines(file: str) -> str:
    report = _read(f"benchmarks/results/{file}")
    rows = [(name, *_speeds(found), _accuracy(found)) for name, found in report["engines"].items()]
    return _table(("engine", "batch 1", "batch 8", "batch 32", "accuracy"), rows)


def _other_engines() -> str:
    report = _read("benchmarks/results/other_engines.json")
    rows = [(name, *_speeds(found), _accuracy(found)) for name, found in report["engines"].items()]
    rows += [(name, f"does not run here: {reason}", "", "") for name, reason in report["failed"].items()]
    return _table(("engine", "batch 1", "batch 8", "accuracy"), rows)


def _capacity() -> str:
    report = _read("benchmarks/results/capacity.json")
    every_s = report["poll_every_s"]
    rows = [
        (
            f"{int(count):,}",
            _spread(found["poll_ms"]),
            _per_cent(int(count) * found["poll_ms"]["median"] / 1000 / every_s),
            _spread(found["route_us"]),
        )
        for count, found in report["replicas"].items()
    ]
    head = ("replicas", "ms for a poll", "of a core, for all polls", "µs to choose a replica")
    polled = [
        (
            f"{int(count):,}",
            _per_cent(found["share_of_a_core"]["median"]),
            _spread(found["between_polls_s"]),
            _per_cent(found["share_set_aside"]["median"]),
        )
        for count, found in report["polled"].items()
    ]
    agent = [
        (count, _spread(found["write_ms"]), f"{found['kilobytes']['median']:.0f}")
        for count, found in report["agent"].items()
    ]
    about = (
        f"Processor time of one gateway process, median (range) of {report['rounds']} rounds "
        "([`benchmarks/capacity.py`](../../benchmarks/results/capacity.json)):"
    )
    core = (
        f"So polls would use one core at {report['replicas_that_use_one_core']:,} replicas for each gateway process. "
        f"So many, half of them, and 1,000 were then polled every {every_s} s:"
    )
    return "\n\n".join(
        (
            about,
            _table(head, rows),
            core,
            _table(("replicas", "of a core, used", "s between polls of a replica", "replicas set aside"), polled),
            "Of an agent:",
            _table(("gateway processes that report", "ms to write the status", "kB"), agent),
        )
    )


def _replicas() -> str:
    report = _read("benchmarks/results/replicas.json")
    rows = []
    for name in ("one replica", "two replicas"):
        start = f"{name}: "
        found = {key.removeprefix(start): value for key, value in report["figures"].items() if key.startswith(start)}
        costs = (f"{value['median']:.2f}" for key, value in found.items() if key.startswith("ms of the "))
        error = found["error of the model"]
        errors = f"{error['median']:+.0%} ({error['least']:+.0%} to {error['most']:+.0%})".replace("%", " %")
        rates = (_spread(found[key]) for key in ("answers per second", "answers per second by the model"))
        rows.append((name, *costs, *rates, errors))
    head = ("", "ms of the replica", "of the gateway", "of the generator", "answers/s", "by the model", "its error")
    about = (
        "Processor time for an answer, and answers per second; medians (ranges) of "
        f"{report['rounds']} rounds ([`benchmarks/replicas.py`](../../benchmarks/results/replicas.json)):"
    )
    return f"{about}\n\n{_table(head, rows)}"


def _models() -> str:
    report = _read("benchmarks/results/models.json")
    rows = []
    for step in report["steps"]:
        took = step["took_s"] if isinstance(step["took_s"], dict) else {"": step["took_s"]}
        seconds = " · ".join(f"{name} {value:.1f}".strip() for name, value in took.items())
        rows.append((step["step"], seconds, f"{step['memory_mb']:,}"))
    calls = ", ".join(f"{count:,} of {name}" for name, count in report["calls"].items())
    failed = sum(count for counts in report["failed"].values() for count in counts.values())
    about = (
        f"{report['rate_per_s_and_model']} calls a second to each model, from its start on: {calls}; {failed} failed "
        "([`benchmarks/models.py`](../../benchmarks/results/models.json)):"
    )
    return f"{about}\n\n{_table(('step', 'seconds', 'MB of the whole stack'), rows)}"


def _score() -> str:
    found = _read("benchmarks/results/score.json")["images_per_s"]
    starts = {name: found.get(f"{name}: seconds to the first file") for name in found if "seconds" not in name}
    rows = [(name, _spread(found[name]), f"{start['median']:.0f}" if start else "") for name, start in starts.items()]
    return _table(("way", "images/s", "s to the first file"), rows)


def _spread(found: dict[str, float]) -> str:
    """Return a median and its range."""
    figures = (found[name] for name in ("median", "least", "most"))
    median, least, most = (f"{figure:,.3g}" if figure < 1000 else f"{figure:,.0f}" for figure in figures)
    return f"{median} ({least}–{most})"


def _per_cent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def _through_torchserve(file: str) -> str:
    report = _read(f"benchmarks/results/{file}")["torchserve"]
    rows = [
        (name, f"{found['good_per_s']:.0f}", f"{found['p50_ms']:.0f}", f"{found['p99_ms']:.0f}")
        for name, found in report.items()
        if isinstance(found, dict) and "good_per_s" in found
    ]
    return _table(("archive", "requests/s", "p50 ms", "p99 ms"), rows)


def _beside_explanations() -> str:
    rows = [
        (
            found["predicting_clients"], *(f"{found[when]['p99_ms']:.0f}" for when in ("alone", "beside")),
            f"{found['times_p99']:.2f} ({min(found['times_p99_each'])}–{max(found['times_p99_each'])})",
            found["explanations_per_s"],
        )
        for found in _read("benchmarks/results/serving.json")["explaining"]
    ]  # fmt: skip
    return _table(("predicting clients", "alone, ms", "beside, ms", "times", "explanations/s"), rows, left=0)


def _explain_serving() -> str:
    """Return the answers per second of each kind of explanation, and its share of the predictions'."""
    rows = []
    for found in _read("benchmarks/results/explain_serving.json")["throughput"]:
        for name, own in found["calls"].items():
            share = found["share_of_predict"].get(name)
            of_predict = f"{share['median']:.2f} ({share['least']:.2f}–{share['most']:.2f})" if share else ""
            rows.append((name, found["clients"], _rate(own), f"{own['p50_ms']:.0f} / {own['p99_ms']:.0f}", of_predict))
    return _table(("call", "clients", "answers/s", "p50 / p99 ms", "share of /predict's"), rows)


def _unfamiliar(part: str) -> str:
    """Return how well each method tells images of something else from test images; `part` is `far` or `near`."""
    report = _read("benchmarks/results/familiar.json")[part]
    kinds = list(report["unfamiliar_images"])
    rows = [
        (
            found["method"] + (f", k = {found['neighbours']}" if found["neighbours"] else ""),
            *(f"{found[kind]['auroc']:.3f} ({found[kind]['fpr_at_95']:.0%})" for kind in kinds),
            f"{found['auroc']:.3f}",
        )
        for found in report["methods"]
    ]
    return _table(("method", *kinds, "mean AUROC"), rows)


def _familiarity_cost() -> str:
    """Return what familiarity costs a worker, for each length of its batches."""
    rows = []
    for length, found in _read("benchmarks/results/familiarity_cost.json")["batches"].items():
        cost, rate = found["cost"], found["images_per_s"]
        rows.append(
            (
                *(length, f"{rate['without']:.0f}", f"{rate['with']:.0f}"),
                f"{cost['median']:.1%} ({cost['least']:.1%} to {cost['most']:.1%})",
            )
        )
    return _table(("images in a batch", "images/s without it", "with it", "cost, median and range"), rows, left=0)


def _gateway() -> str:
    """Return each server's answers per second and latency by the number of clients, and the gateway's times those."""
    report = _read("benchmarks/results/gateway.json")
    rows = []
    for key, ratios in (
        ("one_client", "one_ratios_each"),
        ("few_clients", "few_ratios_each"),
        ("many_clients", "ratios_each"),
    ):
        for name, found in report[key].items():
            each = report[ratios].get(name)
            times = f"{statistics.median(each):.2f} ({min(each):.2f}–{max(each):.2f})" if each else ""
            rows.append(
                (name, report["clients"][key], _rate(found), f"{found['p50_ms']:.0f}", f"{found['p99_ms']:.0f}", times)
            )
    return _table(("server", "clients", "requests/s", "p50 ms", "p99 ms", "the gateway is ×"), rows)


def _gateway_cost() -> str:
    """Return the milliseconds of CPU for one answer, by part of the stack and number of clients."""
    found = _read("benchmarks/results/gateway.json")["cpu_ms"]
    parts = list(next(iter(found.values())))
    rows = [
        (clients, *(f"{own[part]:.1f}" for part in parts), f"{sum(own.values()):.1f}") for clients, own in found.items()
    ]
    return _table(("clients", *parts, "all"), rows)


def _rate(found: dict[str, Any]) -> str:
    each = found["good_per_s_each"]
    return f"{found['good_per_s']:,.0f} ({min(each):,.0f}–{max(each):,.0f})"


def _mechanisms(label: str) -> str:
    """Return each variant's answers per second relative to the gateway before, and its share of failed calls."""
    summary = _read("benchmarks/results/mechanisms.json")[label]["summary"]
    variants = [name for name in next(iter(summary.values())) if name != "before"]
    rows = []
    for name in ("before", *variants):
        cells = []
        for found in summary.values():
            median, least, most = found[name]["times_good_per_s"]
            failed = found[name]["failed_share"][0]
            times = (
                f"{found[name]['good_per_s'][0]:.0f}/s"
                if name == "before"
                else f"{median:.2f} ({least:.2f}–{most:.2f})"
            )
            cells.append(times + (f", {100 * failed:.0f} % failed" if failed >= 0.005 else ""))
        rows.append((name, *cells))
    return _table(("gateway", *summary), rows)


def _defaults(label: str) -> str:
    """Return each variant's answers per second relative to the defaults, its p99 and its share of failed calls."""
    summary = _read("benchmarks/results/mechanisms.json")[label]["summary"]
    rows = []
    for name in sorted(next(iter(summary.values())), key=lambda name: name != "this folder"):
        cells = []
        for own in (found[name] for found in summary.values()):
            median, least, most = own["times_good_per_s"]
            rate = (
                f"{own['good_per_s'][0]:.0f}/s" if name == "this folder" else f"{median:.2f} ({least:.2f}–{most:.2f})"
            )
            failed = 100 * own["failed_share"][0]
            cells.append(f"{rate}, {own['p99_ms'][0]:,.0f} ms" + (f", {failed:.0f} % failed" if failed >= 0.5 else ""))
        rows.append(("the defaults" if name == "this folder" else name, *cells))
    return _table(("gateway", *summary), rows)


def _hostile() -> str:
    summary = _read("benchmarks/results/mechanisms.json")["hostile"]["summary"]
    names = list(next(iter(summary.values())))
    rows = [
        (load, *(f"{found[name]['p50_ms'][0]:,.0f} / {found[name]['p99_ms'][0]:,.0f}" for name in names))
        for load, found in summary.items()
    ]
    return _table(("p50 / p99 ms of a stranger beside", *names), rows)


TABLES: dict[str, Callable[[], str]] = {
    "heatmaps": _candidates,
    "test of the heatmap": _heatmap_test,
    "transfer": _transfer,
    "training speed": _training_speed,
    "short trainings": _ablations,
    "engines": partial(_engines, "engine.json"),
    "engines with AVX-512": partial(_engines, "engine_avx512.json"),
    "engines left out": _other_engines,
    "capacity": _capacity,
    "replicas": _replicas,
    "models in one stack": _models,
    "scoring": _score,
    "through TorchServe": partial(_through_torchserve, "serving.json"),
    "through TorchServe with AVX-512": partial(_through_torchserve, "serving_avx512.json"),
    "beside explanations": _beside_explanations,
    "explanations served": _explain_serving,
    "far images": partial(_unfamiliar, "far"),
    "near images": partial(_unfamiliar, "near"),
    "cost of familiarity": _familiarity_cost,
    "gateway": _gateway,
    "gateway's cost": _gateway_cost,
    "gateway before and after": partial(_mechanisms, "before_and_after"),
    "mechanisms alone": partial(_mechanisms, "alone"),
    "mechanisms together": partial(_mechanisms, "together"),
    "mechanisms and processes": partial(_mechanisms, "processes"),
    "defaults": partial(_defaults, "defaults"),
    "one batch more": partial(_defaults, "one upstream batch more"),
    "mechanisms and hostile loads": _hostile,
    "reference of the HTTP API": make_reference.http,
    "reference of the commands": make_reference.cli,
    "settings of the gateway": settings_table,
    "settings of the agent": make_reference.agent_table,
}


def _speeds(found: dict[str, Any]) -> Iterator[str]:
    times = found["times_as_fast"]
    return (f"{speed:.0f} ({times[batch]:.2f}×)" for batch, speed in found["images_per_s"].items())


def _accuracy(found: dict[str, Any]) -> str:
    return f"{found['accuracy']:.2%}".replace("%", " %")


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]], left: int = 1) -> str:
    """Return the rows as Markdown; the first `left` columns are text, the others figures."""
    rule = "|".join(["---"] * left + ["---:"] * (len(head) - left))
    lines = (" | ".join(map(str, row)) for row in (head, *rows))
    first, *others = (f"| {line} |" for line in lines)
    return "\n".join([first, f"|{rule}|", *others])


def _read(path: str) -> Any:  # noqa: ANN401 - the report's own form
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
