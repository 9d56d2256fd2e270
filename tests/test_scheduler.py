"""Which job starts next, and where: decisions on a state, and what holds of all of them."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from finetuned.scheduler import FILL, LOCAL, Device, Wish, Work, schedule

GPUS = [Device(f"GPU-{n}", f"GPU {n}", 100) for n in range(4)]


def test_each_gpu_takes_a_job_in_the_order_of_the_queue():
    queue = [Wish(f"job-{n}") for n in range(5)]
    decided = schedule(queue, devices=GPUS, work=[Work("old", ("GPU-1",))])
    assert decided.starts == {"job-0": ("GPU-0",), "job-1": ("GPU-2",), "job-2": ("GPU-3",)}


def test_a_job_that_waits_for_several_gpus_is_not_passed_by_small_ones():
    queue = [Wish("large", gpus=3), Wish("small")]
    decided = schedule(queue, devices=GPUS, work=[Work("one", ("GPU-0",)), Work("two", ("GPU-1",))])
    assert decided.starts == {}
    assert decided.waits == {"large": "it needs 3 GPUs: GPU 0 is at work on one; GPU 1 is at work on two"}


def test_a_gpu_that_others_use_is_not_taken_and_said():
    busy = [replace(GPUS[0], busy="is used by others: 9.0 GiB are taken")]
    decided = schedule([Wish("x")], devices=busy, work=[])
    assert decided.starts == {}
    assert decided.waits == {"x": "GPU 0 is used by others: 9.0 GiB are taken"}


def test_small_jobs_share_a_gpu_only_where_all_of_them_may_and_fit():
    [gpu] = GPUS[:1]
    old = Work("old", ("GPU-0",), memory=50, shares=True)
    fits, large = Wish("fits", memory=40, shares=True), Wish("large", memory=41, shares=True)
    assert schedule([fits], devices=[gpu], work=[old]).starts == {"fits": ("GPU-0",)}
    assert schedule([large], devices=[gpu], work=[old]).starts == {}
    assert schedule([replace(fits, shares=False)], devices=[gpu], work=[old]).starts == {}
    assert schedule([fits], devices=[gpu], work=[replace(old, shares=False)]).starts == {}
    assert schedule([fits], devices=[gpu], work=[replace(old, memory=None)]).starts == {}


def test_what_others_hold_of_a_shared_gpu_counts():
    [gpu] = GPUS[:1]
    old, fits = Work("old", ("GPU-0",), memory=50, shares=True), Wish("fits", memory=30, shares=True)
    assert schedule([fits], devices=[replace(gpu, others=10)], work=[old]).starts == {"fits": ("GPU-0",)}
    decided = schedule([fits], devices=[replace(gpu, others=11)], work=[old])
    assert decided.starts == {}
    assert decided.waits["fits"].startswith("others hold 0.0 GiB of GPU 0")


def test_an_empty_gpu_is_taken_before_one_is_shared():
    old = Work("old", ("GPU-0",), memory=10, shares=True)
    decided = schedule([Wish("x", memory=10, shares=True)], devices=GPUS[:2], work=[old])
    assert decided.starts == {"x": ("GPU-1",)}


def test_the_same_training_is_not_done_twice_at_the_same_time_and_holds_nobody_up():
    queue = [Wish("twin", same_as="a"), Wish("other", same_as="b")]
    decided = schedule(queue, devices=GPUS, work=[Work("first", ("GPU-0",), same_as="a")])
    assert decided.starts == {"other": ("GPU-1",)}
    assert decided.waits == {"twin": "first is the same file with the same settings"}


def test_jobs_for_other_machines_pass_those_that_wait_for_a_gpu_up_to_their_bound():
    queue = [Wish("here", gpus=9), *(Wish(f"there-{n}", launcher="slurm") for n in range(3))]
    decided = schedule(queue, devices=GPUS, work=[], most_elsewhere=2)
    assert decided.starts == {"there-0": (), "there-1": ()}
    assert decided.waits["there-2"] == "2 jobs are with slurm already"


def test_what_a_job_needs_is_waited_for():
    decided = schedule([Wish("x", gpus=None), Wish("y")], devices=GPUS, work=[])
    assert decided.starts == {}
    assert "predicted" in decided.waits["x"]


# -- whatever comes

MEMORIES = st.one_of(st.none(), st.integers(0, 120))


@st.composite
def wishes(draw, most_gpus: int):
    shares = draw(st.booleans())
    gpus = 1 if shares else draw(st.integers(1, most_gpus))
    launcher = draw(st.sampled_from([LOCAL, LOCAL, "ray"]))
    twin = draw(st.sampled_from(["", "", "", "a", "b"]))
    return Wish("", launcher, gpus, draw(MEMORIES), shares, twin)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_gpu_is_overfull_nobody_is_passed_by_and_everybody_gets_done(data):
    devices = GPUS[: data.draw(st.integers(1, 4))]
    found = data.draw(st.lists(wishes(len(devices)), max_size=12))
    queue = [replace(wish, job=f"job-{n}") for n, wish in enumerate(found)]
    work: list[Work] = []
    for turn in range(40):
        quiet = turn > 10 or data.draw(st.booleans())  # others are done with the GPUs some day
        used = {device for one in work for device in one.devices}
        now = [
            device if quiet or device.id in used or data.draw(st.booleans()) else replace(device, busy="is busy")
            for device in devices
        ]
        decided = schedule(queue, devices=now, work=work, most_elsewhere=2)
        _check(queue, now, work, decided.starts)
        by_id = {wish.job: wish for wish in queue}
        for job, places in decided.starts.items():
            wish = by_id[job]
            work.append(Work(job, places, wish.launcher, wish.memory, wish.shares, wish.same_as))
        queue = [wish for wish in queue if wish.job not in decided.starts]
        if not queue and not work:
            return
        if work:
            work.pop(data.draw(st.integers(0, len(work) - 1)))
    raise AssertionError(f"they starve: {queue}")


def _check(queue, devices, work, starts):
    by_id = {wish.job: wish for wish in queue}
    after = [*work, *(Work(job, at, *_of(by_id[job])) for job, at in starts.items())]
    for device in devices:
        on = [one for one in after if device.id in one.devices]
        assert not (device.busy and on)
        if len(on) > 1:
            assert all(one.shares for one in on)
            assert sum(one.memory for one in on) <= FILL * device.memory
    for job, places in starts.items():
        assert len(set(places)) == (by_id[job].gpus if by_id[job].launcher == LOCAL else 0)
    assert sum(one.launcher != LOCAL for one in after) <= 2
    names = [one.same_as for one in after if one.same_as]
    assert len(names) == len(set(names))
    # Of those that need a GPU here, and have no twin before them, the first ones start.
    seen = {one.same_as for one in work} - {""}
    local = []
    for wish in queue:
        if wish.same_as not in seen and wish.launcher == LOCAL:
            local.append(wish)
        assert wish.same_as not in seen or wish.job not in starts
        seen |= {wish.same_as} - {""}
    began = [wish.job in starts for wish in local]
    assert began == sorted(began, reverse=True)
    if local and not any(began):  # and the first one only waits where there is no room for it
        used = {device for one in work for device in one.devices}
        empty = [device for device in devices if device.id not in used and not device.busy]
        assert len(empty) < local[0].gpus


def _of(wish):
    return wish.launcher, wish.memory, wish.shares, wish.same_as
