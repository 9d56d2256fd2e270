"""The pages in a real browser, over a real server and ledger."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from conftest import eventually
from finetuned.attempts import began, ended
from finetuned.events import Ending, Event, EventType
from finetuned.guard import only_daemon
from finetuned.jobs import FileIdentity, Job, Outcome, State
from finetuned.ledger import Ledger
from fixtures_web import WebServer

SETTINGS = {"model": "smollm2-135m", "epochs": 2.0, "seed": 42}
PAGES = {  # and what is there once a page is drawn
    "/": "#loss .main-svg",
    "/drop": "#file",
    "/history": "tbody tr",
    "/config": "tbody td",
    "/jobs/units-1": "#loss .main-svg",
    "/jobs/units-1?with=night-1": "#loss .main-svg",
}


def job(job_id: str, state: State, **more) -> Job:
    return Job(
        job_id,
        f"{job_id}.jsonl".encode(),
        "",
        FileIdentity(1, 2, 3_000_000, 4),
        state,
        **{"created_at": 1_795_000_000.0, "settings": SETTINGS, "rung": {"batch_size": 8}, **more},
    )


def metrics(step: int) -> Event:
    loss = 2 * math.exp(-step / 40)
    figures = {"step": step, "total_steps": 300, "train_loss": loss, "learning_rate": 2e-4, "grad_norm": 1.0}
    if step % 50 == 0:
        figures = {"step": step, "valid_loss": loss * 1.1}
    figures |= {"tokens_per_second": 1240.0}
    return Event(1_795_000_000.0 + step, EventType.METRICS, f"step {step} of 300: loss {loss:.4f}", "info", figures)


def answered(step: int, *answers: str) -> Event:
    samples = [
        {"prompt": f"question {n}", "expected": "4 m", "answer": text, "exact": text == "4 m", "similarity": 0.5}
        for n, text in enumerate(answers)
    ]
    return Event(1_795_000_000.0, EventType.PREDICTIONS, "asked", "info", {"step": step, "samples": samples})


@pytest.fixture
def ledger(home):
    ledger = Ledger.open(home.ledger)
    progress = {"step": 120, "total_steps": 300, "train_loss": 0.84, "tokens_per_second": 1240, "seconds_left": 60}
    ledger.add(job("units-1", State.RUNNING, started_at=1_795_000_000.0, progress={**progress, "phase": "training"}))
    ledger.record("units-1", [answered(0, "a", "b"), *map(metrics, range(1, 121)), answered(120, "4 m", "b")], offset=1)
    gpu = {"index": 0, "name": "H", "utilization": 50, "memory_used": 2**30, "memory_total": 2**33, "power": 99.0}
    for n in range(20):
        sample = {**gpu, "uuid": "GPU-1", "created_at": 1_795_000_000.0 + n, "temperature": 50 + n}
        ledger.record_gpu("units-1", [(sample["created_at"], "GPU-1", sample)])
    ledger.add(job("night-1", State.FINISHED, outcome=Outcome.SUCCEEDED, adapter="night", finished_at=1_795_000_100.0))
    ledger.record("night-1", list(map(metrics, range(1, 50))), offset=1)
    reason = {"code": "not_json", "what": "<b>no row</b> is whole", "where": "bad.jsonl:1", "remedy": "Mend it."}
    ledger.add(job("bad-1", State.FINISHED, outcome=Outcome.FAILED, reason=reason, finished_at=1_795_000_200.0))
    for name in ("first-1", "second-1"):
        ledger.add(job(name, State.QUEUED))
    yield ledger
    ledger.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_drawn_without_an_error_and_no_wider_than_the_screen(visit, ledger, scheme, width):
    for path, drawn in PAGES.items():
        page = visit(path, scheme=scheme, width=width)
        page.wait_for_selector(drawn)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(22, 22, 24)") is (scheme == "dark")


def test_the_page_now_follows_the_job_without_reloading(visit, ledger):
    page = visit("/")
    page.evaluate("window.stillHere = true")
    page.get_by_text("units-1.jsonl: step 120 of 300, loss 0.8400").wait_for()
    page.locator("#loss .scatterlayer .trace").nth(1).wait_for()
    progress = {"phase": "training", "step": 150, "total_steps": 300, "train_loss": 0.5}
    ledger.record("units-1", [metrics(n) for n in range(121, 151)], offset=2, progress=progress)
    page.get_by_text("units-1.jsonl: step 150 of 300, loss 0.5000").wait_for()
    eventually(lambda: page.evaluate("document.querySelector('progress').value === 150"))
    page.get_by_text("step 149 of 300: loss").wait_for()
    eventually(lambda: page.evaluate("document.querySelector('#loss').data[0].x.at(-1) === 149"))
    page.locator("#loss .nsewdrag").hover()
    page.locator("#loss .hoverlayer .hovertext").first.wait_for()
    assert page.evaluate("window.stillHere")


def test_a_file_that_was_trained_before_says_so(visit, ledger):
    done = {"outcome": Outcome.SUCCEEDED, "finished_at": 1_795_000_300.0}
    ledger.add(job("again-1", State.FINISHED, adapter="night", duplicate_of="night-1", **done))
    for path in ("/", "/history"):
        visit(path).get_by_text("night, trained before as night-1").wait_for()


def test_buttons_give_orders(visit, ledger):
    page = visit("/")
    page.locator('[data-job="second-1"] [data-verb="first"]').click()
    page.get_by_text("Asked for: first second-1").wait_for()
    page.locator('[data-job="first-1"] [data-verb="cancel"]').click()
    page.get_by_text("Asked for: cancel first-1").wait_for()
    page.get_by_role("button", name="Pause the queue").click()
    page.get_by_text("Asked for: pause").wait_for()
    page.locator('[data-job="bad-1"]').get_by_text("<b>no row</b> is whole").wait_for()
    assert [(verb, job_id) for _, verb, job_id, _ in ledger.orders()] == [
        ("first", "second-1"),
        ("cancel", "first-1"),
        ("pause", ""),
    ]


def test_predictions_appear_and_what_changed_is_marked(visit, ledger):
    page = visit("/jobs/units-1")
    page.get_by_text("0 of 2 right at first, 1 now").wait_for()
    assert page.locator("#predictions td.changed").all_inner_texts() == ["4 m ✓"]
    ledger.record("units-1", [answered(150, "4 m", "4 m")], offset=2)
    page.get_by_text("0 of 2 right at first, 2 now").wait_for()


def test_the_time_line_shows_attempts_and_the_rungs_they_climbed_down(visit, ledger):
    top, low = {"batch_size": 8, "gradient_accumulation": 1, "tuning": "lora"}, {"batch_size": 4, "tuning": "lora"}
    low["gradient_accumulation"] = 2
    one = replace(job("units-1", State.RUNNING), attempt=1, rung=top, progress={"step": 120})
    two = replace(one, attempt=2, rung=low, settings={**SETTINGS, "epochs": 3.0})
    fell = Event(1_795_000_130.0, EventType.RUNG, "out of memory; batch halved", "warning", {"rung": low, "step": 90})
    over = ended(one, Ending.RESOURCE, at=1_795_000_140.0, how="exit code 70", then="after 8 x 1: batch halved")
    ledger.record("units-1", [began(one, at=1_795_000_120.0, on="on GPU 0"), fell, over], offset=2)
    ledger.record("units-1", [began(two, at=1_795_000_150.0, on="on GPU 0")], offset=2)
    page = visit("/jobs/units-1")
    rows = page.locator("#timeline tr")
    rows.nth(3).wait_for()
    cells = [row.locator("td").all_inner_texts() for row in rows.all()[1:]]
    assert [row[1].splitlines()[0] for row in cells] == [
        "attempt 1 begins on GPU 0",
        "out of memory; batch halved",
        "attempt 2 begins on GPU 0",
    ]
    assert cells[0][2:] == ["resource exit code 70; after 8 x 1: batch halved", "120", "8 rows x 1, lora", ""]
    assert cells[1][2:] == ["", "90", "4 rows x 2, lora", ""]
    assert cells[2][1].splitlines()[1:] == ["after 8 x 1: batch halved"]
    assert cells[2][2:] == ["running", "", "4 rows x 2, lora", "epochs: 2, now 3"]
    now = visit("/")
    now.locator("#why", has_text="after 8 x 1: batch halved").wait_for()


def test_no_more_than_five_jobs_are_laid_over_one_another(visit, ledger):
    for number in range(4):
        ledger.add(job(f"more-{number}", State.FINISHED, outcome=Outcome.SUCCEEDED, finished_at=1_795_000_100.0))
        ledger.record(f"more-{number}", list(map(metrics, range(1, 9))), offset=1)
    page = visit("/jobs/units-1")
    for number in range(4):
        page.locator("#other").fill(f"more-{number}")
        page.get_by_role("button", name="Add").click()
    eventually(lambda: page.evaluate("document.querySelector('#learning_rate').data.length") == 5)
    page.locator("#other").fill("night-1")
    page.get_by_role("button", name="Add").click()
    page.get_by_text("5 jobs are all that a chart holds").wait_for()
    assert page.evaluate("document.querySelector('#learning_rate').data.length") == 5
    page.get_by_role("button", name="Alone").click()
    assert "with=" not in page.url
    eventually(lambda: page.evaluate("document.querySelector('#learning_rate').data.length") == 1)


def test_a_job_that_there_is_not_is_not_compared(visit, ledger):
    page = visit("/jobs/units-1", fine=False)
    page.locator("#other").fill("nobody")
    page.get_by_role("button", name="Add").click()
    page.get_by_text("There is no job nobody.").wait_for()
    assert "nobody" not in page.url


def test_a_page_says_when_the_control_centre_is_gone_and_when_it_is_back(visit, ledger, server, home):
    page = visit("/", fine=False)
    page.locator("#loss .main-svg").first.wait_for()
    server.stop()
    page.get_by_text("The control centre does not answer").wait_for()
    again = WebServer(home, "--port", str(server.port))
    try:
        page.locator("#lost").wait_for(state="hidden")
    finally:
        again.stop()


def test_on_a_telephone_the_cells_of_a_table_stand_below_one_another(visit, ledger):
    page = visit("/config", width=390)
    row = page.locator("tr", has_text="lora_alpha").last
    assert row.locator("td").last.evaluate("(cell) => cell.getBoundingClientRect().width") > 300
    page = visit("/jobs/units-1", width=390)
    # Asked of the page at once: the table may be drawn anew between two questions.
    cells = (
        "[...document.querySelectorAll('#predictions td')].slice(0, 2).map((cell) => cell.getBoundingClientRect().y)"
    )
    eventually(lambda: (places := page.evaluate(cells)) == sorted(set(places)) and len(places) == 2)
    history = visit("/history", width=390)
    history.locator("tr", has_text="units-1.jsonl").get_by_text("training").wait_for()
    ends = "[...document.querySelectorAll('tbody td')].map((cell) => cell.getBoundingClientRect().right)"
    assert max(history.evaluate(ends)) <= 390


def test_a_curve_that_grows_all_night_is_thinned_again_and_a_step_done_again_counts_anew(visit, ledger):
    page = visit("/")
    steps = "document.querySelector('#loss').data[0].x"
    page.locator("#loss .scatterlayer .trace").nth(1).wait_for()
    ledger.record("units-1", [metrics(n) for n in range(121, 6000)], offset=2)
    eventually(lambda: page.evaluate(f"{steps}.at(-1)") == 5999)
    eventually(lambda: page.evaluate(f"{steps}.length") < 2100)
    again = metrics(5999)
    ledger.record("units-1", [replace(again, data={**again.data, "train_loss": 9.0})], offset=2)
    eventually(lambda: page.evaluate("document.querySelector('#loss').data[0].y.at(-1)") == 9.0)


def test_where_a_gpu_was_held_back_is_marked(visit, ledger):
    sample = {"index": 0, "name": "H", "uuid": "GPU-1", "created_at": 1_795_000_050.0, "utilization": 9}
    ledger.record_gpu("units-1", [(sample["created_at"], "GPU-1", {**sample, "throttle_reasons": ["power cap"]})])
    page = visit("/")
    marks = "document.querySelector('#utilization').data?.find((one) => one.name === 'held back')?.text"
    eventually(lambda: page.evaluate(marks) == ["power cap"])


def test_history_is_filtered_and_sorted(visit, ledger):
    page = visit("/history")
    page.get_by_text("1 to 5 of 5").wait_for()
    page.locator("#status").select_option("queued")
    page.get_by_text("1 to 2 of 2").wait_for()
    page.locator("#text").fill("SECOND")
    page.get_by_text("1 to 1 of 1").wait_for()
    page.locator("#text").fill("")
    page.get_by_text("1 to 2 of 2").wait_for()
    page.locator("[data-sort=name]").click()
    eventually(lambda: page.evaluate("document.querySelector('tbody a').textContent === 'second-1.jsonl'"))
    page.locator("[data-sort=name]").click()
    eventually(lambda: page.evaluate("document.querySelector('tbody a').textContent === 'first-1.jsonl'"))


@pytest.mark.parametrize("server", [("--host", "0.0.0.0")], indirect=True)
def test_the_token_is_given_once_in_the_browser(visit, server, home, ledger):
    page = visit("/history", fine=False)
    page.locator("[name=token]").fill("wrong")
    page.get_by_role("button", name="Go on").click()
    page.get_by_text("This is not it.").wait_for()
    page.locator("[name=token]").fill(home.web_token.read_text())
    page.get_by_role("button", name="Go on").click()
    page.locator("tbody a", has_text="units-1.jsonl").wait_for()  # the page that was asked for
    page.goto(server.address)
    page.get_by_text("units-1.jsonl: step 120 of 300").wait_for()
    page.get_by_role("button", name="Pause the queue").click()
    page.get_by_text("Asked for: pause").wait_for()


@pytest.fixture
def several(home, ledger):
    """Four jobs that run on three GPUs of five and with Slurm, beside `units-1`; one GPU is others', one failed."""
    states = ("usable", "usable", "usable", "busy", "set_aside")
    whys = {"busy": "is used by others: 9.0 GiB are taken", "set_aside": "GPU 4 H does not answer any more."}
    gpus = [
        {"uuid": f"GPU-{n}", "index": n, "name": "H", "state": state, "why": whys.get(state, "")}
        for n, state in enumerate(states)
    ]
    home.gpus.write_text(json.dumps(gpus))
    on = {"a": ["GPU-0"], "b": ["GPU-2"], "c": [], "d": []}
    for number, (name, devices) in enumerate(on.items()):
        progress = {"phase": "training", "step": 10 * number, "total_steps": 300, "train_loss": 2.0, "devices": devices}
        launcher = {} if devices else {"launcher": "slurm", "gpus_per_job": 2}
        progress |= {} if devices else {"processes": 2}
        more = {"settings": {**SETTINGS, **launcher}, "trainer_id": "" if devices else f"{700 + number}", "attempt": 1}
        ledger.add(job(f"{name}-1", State.RUNNING, **more, progress=progress, created_at=1_795_000_001.0 + number))
        ledger.record(f"{name}-1", list(map(metrics, range(1, 10 * (number + 1)))), offset=1)
    sample = {"index": 2, "name": "H", "uuid": "GPU-2", "utilization": 93, "memory_used": 2**30, "memory_total": 2**33}
    ledger.record_gpu("b-1", [(1_795_000_000.0, "GPU-2", {**sample, "created_at": 1_795_000_000.0})])
    ledger.update("first-1", progress={"waits": "its GPU failed", "waits_for": "it needs 2 GPUs: GPU 3 H is used"})
    with only_daemon(home):
        yield


def test_each_of_several_jobs_is_shown_and_the_chosen_one_in_detail(visit, ledger, several):
    page = visit("/")
    page.get_by_role("heading", name="5 jobs are running").wait_for()
    told = "[...document.querySelectorAll('#running li')].map((item) => [item.dataset.job, item.innerText])"
    items = dict(page.evaluate(told))
    assert list(items) == ["units-1", "a-1", "b-1", "c-1", "d-1"]
    assert "b-1.jsonl: step 10 of 300" in items["b-1"]
    assert "on GPU 2 H" in items["b-1"]
    assert "with slurm as 702, 2 processes" in items["c-1"]
    values = "[...document.querySelectorAll('#running progress')].map((bar) => bar.value)"
    assert page.evaluate(values) == [120, 0, 10, 20, 30]
    steps = "document.querySelector('#loss').data?.[0].x.at(-1)"
    eventually(lambda: page.evaluate(steps) == 120)
    page.locator('#running [data-job="d-1"]').get_by_role("button", name="Show").click()
    eventually(lambda: page.evaluate(steps) == 39)
    page.get_by_role("heading", name="Curves of d-1.jsonl").wait_for()
    page.get_by_text("step 39 of 300: loss").wait_for()
    assert page.url.endswith("?job=d-1")
    ledger.record("d-1", [metrics(n) for n in range(40, 46)], offset=2, progress={"step": 45, "total_steps": 300})
    eventually(lambda: page.evaluate(steps) == 45)
    ledger.update("d-1", state=State.TRAINED)
    ledger.update("d-1", state=State.FINISHED, outcome=Outcome.SUCCEEDED, finished_at=1_795_000_900.0)
    page.get_by_role("heading", name="4 jobs are running").wait_for()
    eventually(lambda: page.evaluate(steps) == 120, why="the first one is shown in its place")


def test_each_gpu_says_who_is_at_work_on_it_or_why_nobody_is(visit, ledger, several):
    page = visit("/")
    page.locator("[data-gpu]").nth(4).wait_for()
    told = page.evaluate("[...document.querySelectorAll('[data-gpu]')].map((one) => one.innerText.trim())")
    assert told[0] == "GPU 0 H: a-1.jsonl"
    assert told[1].startswith("GPU 1 H: units-1.jsonl 50% busy")
    assert told[2].startswith("GPU 2 H: b-1.jsonl 93% busy")
    assert told[3] == "GPU 3 H: is used by others: 9.0 GiB are taken"
    assert told[4] == "GPU 4 H: set aside"
    page.get_by_text("A GPU is set aside: GPU 4 H does not answer any more.").wait_for()
    page.locator('#queue [data-job="first-1"]', has_text="its GPU failed; it needs 2 GPUs: GPU 3 H is used").wait_for()


def test_the_page_of_a_job_says_where_it_runs(visit, ledger, several):
    visit("/jobs/b-1").get_by_text("attempt 1 on GPU 2 H").wait_for()
    visit("/jobs/c-1").get_by_text("attempt 1 with slurm as 702, 2 processes").wait_for()
    visit("/jobs/first-1").get_by_text("waits: its GPU failed; it needs 2 GPUs").wait_for()


@pytest.mark.parametrize("width", [1280, 390])
def test_sixteen_jobs_fit_the_page(visit, ledger, several, width):
    for number in range(11):
        progress = {"phase": "training", "step": number, "total_steps": 300, "devices": ["GPU-0"]}
        ledger.add(job(f"more-{number}", State.RUNNING, progress=progress, attempt=1))
    page = visit("/", width=width)
    page.get_by_role("heading", name="16 jobs are running").wait_for()
    assert page.evaluate("document.querySelectorAll('#running li').length") == 16
    assert page.evaluate("document.documentElement.scrollWidth") <= width
