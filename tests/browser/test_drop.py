"""A file from the browser to its adapter, with a real daemon whose trainer computes nothing."""

from __future__ import annotations

import json

from conftest import chat_rows, eventually, write_config, write_jsonl
from finetuned.jobs import Outcome, State

DROP = """([name, text]) => {
    const data = new DataTransfer();
    data.items.add(new File([text], name));
    document.querySelector("#target").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
}"""


def test_a_dropped_file_is_checked_confirmed_and_its_bar_moves_without_reloading(
    visit, home, daemon, standin, tiny_model
):
    standin(seconds=0.3)
    write_config(home, model=str(tiny_model), profiles={"fast": {"epochs": 1}})
    one = daemon()
    now = visit("/")
    now.evaluate("window.stillHere = true")
    now.get_by_text("Nothing to do: drop a file").wait_for()
    page = visit("/drop")
    file = write_jsonl(home.root / "staged", chat_rows(60))
    page.evaluate(DROP, ["night.jsonl", file.read_text()])
    page.get_by_text("night.jsonl is usable").wait_for()
    page.get_by_text("60 rows of OpenAI chat,").wait_for()
    page.locator("#profile").select_option("fast")
    page.get_by_text("night.jsonl is usable").wait_for()
    page.get_by_text("Settings for this file alone").click()
    page.locator('[name="seed"]').fill("7")
    page.locator('[name="dtype"]').select_option("float32")
    page.get_by_role("button", name="Train it").click()
    page.get_by_text("night.jsonl is in the inbox").wait_for()
    eventually(lambda: now.evaluate("document.querySelector('#running progress')?.value > 2"))
    seen = now.evaluate("document.querySelector('#running progress').value")
    eventually(lambda: now.evaluate(f"document.querySelector('#running progress').value > {seen}"))
    now.locator("#running [data-verb=cancel]").click()
    now.locator("#finished .cancelled").wait_for()
    assert one.job("night.jsonl").outcome is Outcome.CANCELLED
    assert one.jobs()[0].settings["seed"] == 7
    assert one.jobs()[0].profile == "fast"
    now.locator("#finished [data-verb=retry]").click()
    now.locator("#running progress").wait_for()
    assert now.evaluate("window.stillHere")


def test_two_waiting_jobs_change_places(visit, home, daemon, standin):
    standin(seconds=0.5)
    one = daemon()
    for name, start in (("a", 0), ("b", 100), ("c", 200)):
        write_jsonl(home.root / "staged", chat_rows(60, start=start)).rename(home.inbox / f"{name}.jsonl")
        one.job(f"{name}.jsonl", state=State.RUNNING if name == "a" else State.QUEUED)
    page = visit("/")
    eventually(lambda: page.evaluate("document.querySelectorAll('#queue li').length === 2"))
    assert page.locator("#queue a").all_inner_texts() == ["b.jsonl", "c.jsonl"]
    page.locator("#queue li").nth(1).get_by_role("button", name="First").click()
    eventually(lambda: page.evaluate("document.querySelector('#queue a').textContent === 'c.jsonl'"))


def test_a_waiting_job_is_dragged_to_another_place_while_another_one_trains(visit, home, daemon, standin):
    standin(seconds=0.5)
    one = daemon()
    for place, name in enumerate("abcd"):
        write_jsonl(home.root / "staged", chat_rows(200, start=1000 * place)).rename(home.inbox / f"{name}.jsonl")
        one.job(f"{name}.jsonl", state=State.RUNNING if name == "a" else State.QUEUED)
    page = visit("/")
    waiting = page.locator("#queue a")

    def order() -> str:
        return "".join(name[0] for name in waiting.all_inner_texts())

    eventually(lambda: order() == "bcd")
    seen = page.locator("#queue li").nth(0).element_handle()
    bar = "document.querySelector('#running progress')?.value ?? -1"
    step = eventually(lambda: (at := page.evaluate(bar)) >= 0 and at + 1)  # a step further than it is
    eventually(lambda: page.evaluate(bar) >= step)
    assert seen.evaluate("item => item.isConnected")  # what does not change is not made anew under the pointer
    upper, lower = {"x": 20, "y": 3}, {"x": 20, "y": 30}
    page.locator("#queue li").nth(2).drag_to(page.locator("#queue li").nth(1), target_position=upper)
    eventually(lambda: order() == "bdc")
    page.locator("#queue li").nth(0).drag_to(page.locator("#queue li").nth(2), target_position=lower)
    eventually(lambda: order() == "dcb")
    page.locator("#queue li").nth(0).drag_to(page.locator("#queue li").nth(1), target_position=upper)  # where it is
    page.locator("#queue li").nth(2).get_by_role("button", name="First").press("Enter")  # by keyboard
    eventually(lambda: order() == "bdc")


def test_a_job_that_is_tried_again_is_followed_on_its_page(visit, home, daemon, standin):
    standin(seconds=0.2)
    one = daemon()
    write_jsonl(home.root / "staged", chat_rows(60)).rename(home.inbox / "x.jsonl")
    job = one.job("x.jsonl", state=State.RUNNING)
    page = visit(f"/jobs/{job.id}")
    page.evaluate("window.stillHere = true")
    page.locator("#timeline .running").wait_for()
    page.locator("[data-verb=cancel]").click()
    page.locator("#status .cancelled").wait_for()
    page.locator("#timeline .interrupted").wait_for()
    page.locator("[data-verb=retry]").click()
    page.locator("#timeline .running").wait_for()
    page.get_by_text("attempt 2 begins").first.wait_for()
    steps = page.locator("#log li", has_text="step ")
    seen = steps.count()
    eventually(lambda: steps.count() > seen + 2)
    assert page.evaluate("window.stillHere")


def test_a_file_that_is_refused_says_why_and_can_be_thrown_away(visit, home, tiny_model):
    write_config(home, model=str(tiny_model))
    page = visit("/drop")
    page.evaluate(DROP, ["bad.jsonl", '{"messages": []}\n'])
    page.get_by_text("bad.jsonl is refused").wait_for()
    assert page.get_by_role("button", name="Train it").is_disabled()
    page.get_by_role("button", name="Throw it away").click()
    page.get_by_text("bad.jsonl is not trained").wait_for()
    assert not any(home.uploads.iterdir())


def test_a_file_that_was_not_confirmed_is_found_again_when_the_page_is_loaded_anew(visit, home, tiny_model):
    write_config(home, model=str(tiny_model))
    page = visit("/drop")
    for name in ("a", "b"):
        page.evaluate(DROP, [f"{name}.jsonl", write_jsonl(home.root / "staged", chat_rows(60)).read_text()])
        page.get_by_text(f"{name}.jsonl is usable").wait_for()
        page.reload()
    waiting = page.locator("#earlier li")
    waiting.nth(1).wait_for()
    waiting.filter(has_text="b.jsonl").get_by_role("button", name="Throw it away").click()
    page.get_by_text("b.jsonl is not trained").wait_for()
    waiting.filter(has_text="a.jsonl").get_by_role("button", name="Go on").click()
    page.get_by_text("a.jsonl is usable").wait_for()
    page.locator("#earlier").wait_for(state="hidden")
    page.get_by_role("button", name="Train it").click()
    page.get_by_text("a.jsonl is in the inbox").wait_for()
    assert [file.name for file in home.inbox.iterdir()] == ["a.jsonl"]


def test_config_is_saved_from_its_page(visit, home):
    page = visit("/config")
    eventually(lambda: page.evaluate("document.querySelector('#text').value !== ''"))
    page.locator("#text").fill('{"epochs": 5, "web": {"enabled": false}}')
    page.get_by_role("button", name="Save").click()
    page.get_by_text("config.json is saved").wait_for()
    assert json.loads(home.config_file.read_text())["epochs"] == 5


def test_what_is_odd_in_a_file_is_seen_at_once_and_a_held_out_file_comes_with_its_data(visit, home, tiny_model):
    write_config(home, model=str(tiny_model))
    page = visit("/drop", fine=False)
    rows = write_jsonl(home.root / "staged", chat_rows(60)).read_text()
    spoiled = rows + rows.splitlines()[0] + "\n"
    page.evaluate(DROP, ["x.eval.jsonl", rows])
    page.get_by_text("x.eval.jsonl is held-out data by its name").wait_for()
    both = DROP.replace("([name, text])", "(files)").replace(
        "data.items.add(new File([text], name));",
        "for (const [name, text] of files) data.items.add(new File([text], name));",
    )
    page.evaluate(both, [["x.eval.jsonl", rows], ["x.jsonl", spoiled]])
    page.get_by_text("x.jsonl is usable").wait_for()
    page.get_by_text("held out: 60 rows of x.eval.jsonl").wait_for()
    page.locator("#report li", has_text="exact_duplicates: 1 row").get_by_text("Take the copies out").wait_for()
    page.get_by_text("Settings for this file alone").click()
    page.locator('[name="epochs"]').fill("-1")
    page.get_by_role("button", name="Check again").click()
    page.get_by_text("epochs: must be more than 0").wait_for()
    page.locator('[name="epochs"]').fill("1")
    page.get_by_role("button", name="Check again").click()
    page.get_by_text(", 1 epoch").wait_for()
    assert page.locator("#said").is_hidden()  # what was wrong is not said any longer
    page.get_by_role("button", name="Train it").click()
    page.get_by_text("x.jsonl is in the inbox").wait_for()
    assert (home.inbox / "x.eval.jsonl").exists()
