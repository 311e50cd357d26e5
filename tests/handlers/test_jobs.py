"""An image's failure stays its own, unless the step belonged to all images."""

from __future__ import annotations

import time

from contracts.wire import ImageOptions, Options
from handlers.errors import BadFrames, DeadlinePassed, HandlerFailed, ImageUnreadable
from handlers.jobs import guard, guard_all, jobs_of, still_wanted
from handlers.wire import Row


def test_each_image_has_its_own_options_or_those_of_the_rows_kind():
    asked = (ImageOptions(), ImageOptions(explain=True, target=3))
    assert [job.asked for job in jobs_of(Row("predict", Options(images=asked), [b"a", b"b"]))] == list(asked)
    assert [job.asked.explain for job in jobs_of(Row("explain", images=[b"a", b"b"]))] == [True, True]


def test_a_row_whose_images_cannot_be_told_apart_is_one_job_with_its_error():
    error = BadFrames("it is cut off")
    (job,) = jobs_of(Row("predict", Options(images=(ImageOptions(),) * 3), [], error))
    assert job.error is error


def test_a_failed_step_ends_its_image_alone_and_later_steps_skip_it():
    bad, good = jobs_of(Row("predict", images=[b"bad", b"good"]))
    error = ImageUnreadable("the bytes are no image")

    def decode(job):
        if job.data == b"bad":
            raise error

    seen = []
    for job in (bad, good):
        guard(job, decode)
        guard(job, seen.append)
    assert (bad.error, good.error) == (error, None)
    assert seen == [good]


def test_a_bug_in_a_step_tells_the_caller_nothing_of_itself(caplog):
    (job,) = jobs_of(Row("predict", Options(id="call-7"), [b"a"]))
    guard(job, lambda _: 1 / 0)
    assert isinstance(job.error, HandlerFailed)
    assert "ZeroDivisionError" in caplog.text
    assert "call-7" in caplog.text
    assert "division" not in str(job.error)


def test_a_step_of_all_images_fails_all():
    jobs = jobs_of(Row("predict", images=[b"a", b"b"]))
    guard_all(jobs, [].pop)
    assert all(isinstance(job.error, HandlerFailed) for job in jobs)


def test_images_whose_deadline_is_over_are_dropped_with_its_error():
    now_ms = int(time.time() * 1000)
    late, early = (jobs_of(Row("predict", Options(deadline=now_ms + ms), [b"a"]))[0] for ms in (-1000, 60_000))
    assert still_wanted([late, early]) == [early]
    assert isinstance(late.error, DeadlinePassed)
