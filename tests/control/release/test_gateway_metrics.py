import pytest

from control.errors import MetricsUnreadable
from control.release.gateway_metrics import Counts, parse_metrics, read_counts


def page(version="2.0", model=None, *, ok=0, failed=0, times=(), pairs=None, shift=(0, 0)):
    """A page of metrics; `times` are the cumulative counts within 10 ms, 80 ms and any time."""
    served = f'version="{version}"' + (f',model="{model}"' if model else "")
    lines = [
        f'gateway_version_requests_total{{{served},kind="predict",outcome="ok"}} {ok}',
        f'gateway_version_requests_total{{{served},kind="predict",outcome="handler_failed"}} {failed}',
        f'gateway_version_requests_total{{{served},kind="predict",outcome="saturated"}} 1000',
        f'gateway_version_requests_total{{{served},kind="predict",outcome="image_unreadable"}} 1000',
        f'gateway_shadow_shift_total{{{served},direction="up"}} {shift[0]}',
        f'gateway_shadow_shift_total{{{served},direction="down"}} {shift[1]}',
    ]
    for bound, count in zip(("0.01", "0.08", "+Inf"), times, strict=False):
        lines.append(f'gateway_model_seconds_bucket{{{served},kind="predict",le="{bound}"}} {count}')
    lines += [
        f'gateway_shadow_images_total{{{served},outcome="{name}"}} {count}' for name, count in (pairs or {}).items()
    ]
    return "\n".join(lines) + "\n"


def counts(*args, **kwargs):
    return Counts(parse_metrics(page(*args, **kwargs)))


def test_only_answers_and_the_versions_own_faults_count_as_requests():
    assert counts(ok=90, failed=10).requests("2.0") == (100, 10)
    assert counts(ok=90).requests("3.0") == (0, 0)


def test_counts_are_the_increase_between_two_reads_and_a_restarted_gateway_is_detected():
    before, after = counts(ok=50, failed=40), counts(ok=250, failed=40)
    assert after.since(before).requests("2.0") == (200, 0)
    assert before.since(after) is None


def test_times_have_the_bound_that_holds_a_share_and_the_answers_above_a_bound():
    times = counts(times=(90, 99, 100)).times("2.0", "predict")
    assert times.count == 100
    assert (times.quantile_bound(0.9), times.quantile_bound(0.99), times.quantile_bound(1)) == (
        0.01,
        0.08,
        float("inf"),
    )
    assert (times.slower_than(0.01), times.slower_than(0.05), times.slower_than(9)) == (10, 1, 0)


def test_the_summary_has_what_status_shows_and_none_for_what_is_not_known():
    pairs = {"agree": 30, "disagree": 10, "failed": 0, "dropped": 5}
    found = counts(ok=99, failed=1, times=(90, 99, 99), pairs=pairs, shift=(3.0, 1.0)).summary("2.0")
    assert found == {"requests": 100, "failed": 1, "p99_ms": 80.0, "pairs": pairs, "mean_shift": 0.05}
    assert counts().summary("2.0") == {"requests": 0, "failed": 0, "p99_ms": None, "pairs": None, "mean_shift": None}


def test_a_models_counts_are_its_own_and_those_without_a_models_name():
    text = page(model="cats", ok=1) + page(model="dogs", ok=2) + page(version="3.0", ok=4)
    for model, requests in (("cats", 1), ("dogs", 2), (None, 3)):
        found = Counts(parse_metrics(text, model))
        assert (found.requests("2.0")[0], found.requests("3.0")[0]) == (requests, 4)
        assert found.versions() == ["2.0", "3.0"]


def test_the_counts_of_all_gateways_are_added(serve):
    urls = [serve(lambda _, ok=ok: (200, page(ok=ok).encode())) for ok in (3, 4)]
    assert read_counts(urls, None).requests("2.0") == (7, 0)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((401, b""), "requires a key: set GRADSERVE_KEY to one with the scope read"),
        ((500, b""), "answers with status 500"),
        ((200, b"<html>"), "does not answer with metrics"),
        ((200, b'gateway_version_requests_total{version="1"} 1\n'), "does not answer with metrics"),
    ],
)
def test_a_gateway_without_readable_counts_is_named(serve, answer, reason):
    url = serve(lambda _: answer)
    with pytest.raises(MetricsUnreadable, match=f"{url} {reason}"):
        read_counts([url], None)
