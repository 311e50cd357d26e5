"""A gateway's report: what is dumped is parsed again, and whatever else stands in the header is refused."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts import report
from contracts.report import Report, ReportError

WHOLE = {"id": "a", "revision": 3, "in_flight": {}}


@pytest.mark.parametrize("made", [Report("g-1", 7, {"1.0.0": 2, "2.0.0+x": 0}), Report("g", None, {})])
def test_a_report_that_is_dumped_is_parsed_again(made):
    assert report.parse(report.dump(made)) == made


def test_the_header_of_the_first_release_is_parsed():
    assert report.parse('{"id":"a","revision":null,"in_flight":{"1.0.0":2}}') == Report("a", None, {"1.0.0": 2})


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ("", "gateway report is no JSON (Expecting value"),
        ("{", "no JSON"),
        ("[]", "gateway report is [], expected a JSON object"),
        ("null", "expected a JSON object"),
        ('{"id":"a","revision":1}', "in_flight is None"),
        ('{"id":"a","in_flight":{}}', "revision is None, expected a value or null"),
        (json.dumps(WHOLE | {"more": 1}), "more is 1, expected no such field"),
        (json.dumps(WHOLE | {"id": "a b"}), "id is 'a b'"),
        (json.dumps(WHOLE | {"id": ""}), "id is ''"),
        (json.dumps(WHOLE | {"id": 1}), "id is 1"),
        (json.dumps(WHOLE | {"id": "a" * 65}), "id is 'aaa"),
        (json.dumps(WHOLE | {"revision": -1}), "revision is -1, expected a whole number from 0"),
        (json.dumps(WHOLE | {"revision": True}), "revision is True"),
        (json.dumps(WHOLE | {"revision": "1"}), "revision is '1'"),
        (json.dumps(WHOLE | {"in_flight": []}), "in_flight is []"),
        (json.dumps(WHOLE | {"in_flight": {"../x": 1}}), "in_flight is '../x'"),
        (json.dumps(WHOLE | {"in_flight": {"1.0.0": 1.5}}), "in_flight.1.0.0 is 1.5"),
        (json.dumps(WHOLE | {"in_flight": {"1.0.0": -1}}), "in_flight.1.0.0 is -1"),
        (json.dumps(WHOLE | {"in_flight": {"1.0.0\n": 1}}), "in_flight is '1.0.0\\n'"),
        (json.dumps(WHOLE | {"in_flight": {str(number): 1 for number in range(65)}}), "65 entries"),
        (json.dumps(WHOLE) + " " * 5000, "expected at most 4096"),
        ("[" * 4000, "gateway report is"),
        ("1" * 4096, "gateway report is"),
    ],
)
def test_a_header_that_is_not_exactly_a_report_is_refused_with_field_and_remedy(header, sentence):
    with pytest.raises(ReportError) as refusal:
        report.parse(header)
    assert sentence in str(refusal.value)
    assert str(refusal.value).endswith("run gateway and agent of the same release")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["id", "revision", "in_flight", "1.0"]), inner),
)


@given(JSON.map(json.dumps) | st.text())
def test_no_header_raises_anything_else(header):
    with contextlib.suppress(ReportError):
        report.parse(header)
