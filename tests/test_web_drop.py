"""Files and settings that come through the control centre: what is taken, what is refused, and that nothing is left."""

from __future__ import annotations

import json
import os
import socket
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import chat_rows, eventually, write_config

ROWS = b"".join(json.dumps(row).encode() + b"\n" for row in chat_rows(40))


def post(server, path: str, *, status: int = 200, **given):
    return server.json(path, method="POST", status=status, body=json.dumps(given).encode())


def upload(server, name: str = "x.jsonl", body: bytes = ROWS) -> str:
    return server.json(f"/api/drops?name={name}", method="POST", body=body, status=201)["id"]


def left(home) -> list[str]:
    """What of uploads is still on the disk."""
    return [str(path.relative_to(home.uploads)) for path in home.uploads.rglob("*")] if home.uploads.exists() else []


def test_a_file_is_sent_confirmed_and_lies_in_the_inbox_with_its_settings(web, home):
    write_config(home, profiles={"fast": {"epochs": 1}})
    server = web()
    number = upload(server)
    assert not any(home.inbox.iterdir())
    server.json(f"/api/drops/{number}/eval?name=anything.json", method="POST", body=b"[]", status=201)
    answer = post(server, f"/api/drops/{number}/confirm", profile="fast", settings={"epochs": 2})
    assert answer["file"] == "x.jsonl"
    folder = home.inbox / "fast"
    assert (folder / "x.jsonl").read_bytes() == ROWS
    assert (folder / "x.jsonl").stat().st_nlink == 1
    assert (folder / "x.eval.json").read_bytes() == b"[]"
    assert json.loads((folder / "x.config.json").read_bytes()) == {"epochs": 2}
    assert left(home) == []
    second = upload(server)
    assert post(server, f"/api/drops/{second}/confirm", profile="fast")["file"] == "x-2.jsonl"  # none is replaced
    assert post(server, f"/api/drops/{second}/confirm", status=404)


def test_what_was_sent_and_not_confirmed_is_found_again(web, home):
    server = web()
    assert server.json("/api/drops")["data"] == []
    first, second = upload(server), upload(server, "y.jsonl")
    server.json(f"/api/drops/{first}/eval?name=z.jsonl", method="POST", body=ROWS, status=201)
    (home.uploads / "no-number").mkdir()
    found = {one["id"]: one for one in server.json("/api/drops")["data"]}
    assert set(found) == {first, second}
    assert [found[first][name] for name in ("file", "bytes", "held_out")] == ["x.jsonl", len(ROWS), "x.eval.jsonl"]
    assert found[second]["held_out"] is None
    post(server, f"/api/drops/{first}/confirm")
    assert [one["file"] for one in server.json("/api/drops")["data"]] == ["y.jsonl"]


@pytest.mark.parametrize(
    "name",
    ["", "..", ".x.jsonl", "%2e%2e%2fx.jsonl", "a/x.jsonl", "a%5cx.jsonl", "x%00.jsonl", "x%0a.jsonl", "-x.jsonl",
     "x.txt", "x.config.json", "x.eval.jsonl", "x" * 300 + ".jsonl", "~%2fx.jsonl"],
)  # fmt: skip
def test_a_name_that_is_no_plain_name_of_data_is_refused(web, home, name):
    assert web().ask(f"/api/drops?name={name}", method="POST", body=ROWS)[0] == 400
    assert left(home) == []
    assert not any(home.inbox.iterdir())


def test_settings_that_cannot_be_used_are_refused_and_the_file_waits_on(web, home):
    server = web()
    number = upload(server)
    for given in (
        {"settings": {"epochs": 0}},
        {"settings": {"eval_file": "/etc/passwd"}},
        {"settings": {"model": "../../etc"}},
        {"settings": [1]},
        {"profile": "../other"},
        {"profile": "none"},
    ):
        assert post(server, f"/api/drops/{number}/confirm", status=400, **given)["error"]["message"]
    for given in (
        {"settings": {"model": "/etc"}},
        {"settings": {"model": "--help"}},
        {"settings": {"eval_file": "/etc/passwd"}},
        {"profile": "--help"},
    ):
        assert post(server, f"/api/drops/{number}/check", status=400, **given)["error"]["message"]
    assert not any(home.inbox.iterdir())
    assert post(server, f"/api/drops/{number}/confirm")["file"] == "x.jsonl"


def test_the_check_s_report_is_given(web, home, tiny_model):
    write_config(home, model=str(tiny_model))
    server = web()
    number = upload(server)
    facts = post(server, f"/api/drops/{number}/check")
    assert (facts["verdict"], facts["file"], facts["training"]["rows"]) == ("usable", "x.jsonl", 40)
    assert (facts["training"]["epochs"], facts["training"]["steps"]) == (1, 10)
    more = post(server, f"/api/drops/{number}/check", settings={"epochs": 3})  # what is chosen for this file counts
    assert (more["training"]["epochs"], more["training"]["steps"]) == (3, 30)
    bad = post(server, f"/api/drops/{upload(server, body=b'nonsense')}/check")
    assert bad["verdict"] == "refused"
    assert bad["reason"]["remedy"]


def test_a_file_is_thrown_away_when_the_user_says_so_and_only_by_its_number(web, home):
    server = web()
    number = upload(server)
    home.uploads.joinpath("other").mkdir()
    home.uploads.joinpath("other", "y.jsonl").touch()
    for other in ("..", "%2e%2e", "other", "0" * 16, "%2e%2e%2f%2e%2e", f"{number}%00"):
        assert server.ask(f"/api/drops/{other}", method="DELETE")[0] in {404, 405}, other
    assert home.config_file.exists()
    assert server.ask(f"/api/drops/{number}", method="DELETE", Origin="http://evil.example")[0] == 403
    assert server.ask(f"/api/drops/{number}", method="DELETE")[0] == 200
    assert sorted(left(home)) == ["other", "other/y.jsonl"]


def test_an_upload_for_which_there_is_no_room_is_refused_before_it_begins(web, home):
    server = web()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /api/drops?name=x.jsonl HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000000000\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 507")
    eventually(lambda: left(home) == [])


def test_an_upload_that_breaks_off_leaves_nothing(web, home):
    server = web()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /api/drops?name=x.jsonl HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n\r\n"
        )
        connection.sendall(bytes(3_000_000))
        eventually(lambda: any("x.jsonl" in name for name in left(home)))
    eventually(lambda: left(home) == [])


def test_held_out_rows_that_are_still_coming_in_are_never_taken_for_whole(web, home):
    server = web()
    number = upload(server)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = (
            f"POST /api/drops/{number}/eval?name=y.jsonl HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n\r\n"
        )
        connection.sendall(head.encode() + bytes(3_000_000))
        eventually(lambda: any("eval" in name for name in left(home)))
        assert "not all here yet" in post(server, f"/api/drops/{number}/confirm", status=409)["error"]["message"]
    eventually(lambda: not any("eval" in name for name in left(home)))
    post(server, f"/api/drops/{number}/confirm")
    assert [path.name for path in home.inbox.iterdir()] == ["x.jsonl"]


def test_a_file_that_is_confirmed_twice_at_once_is_trained_once(web, home):
    server = web()
    number = upload(server, body=ROWS * 2000)
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: server.ask(f"/api/drops/{number}/confirm", method="POST")[0], range(8)))
    assert min(answers) == 200
    assert set(answers) - {200} <= {404, 409}
    assert [path.name for path in home.inbox.iterdir()] == ["x.jsonl"]


def test_what_nobody_confirmed_for_a_day_is_thrown_away_when_it_starts(web, home):
    old, new = (home.uploads / name / "x.jsonl" for name in ("a" * 16, "b" * 16))
    for file in (old, new):
        file.parent.mkdir(parents=True)
        file.touch()
    for path in (old, old.parent):
        os.utime(path, (1, 1))
    web()
    assert left(home) == ["b" * 16, f"{'b' * 16}/x.jsonl"]


# -- config.json


def test_config_is_saved_if_it_can_be_used_and_was_not_changed_meanwhile(web, home):
    home.config_file.chmod(0o600)
    server = web()
    seen = server.json("/api/config")
    assert seen["text"] == home.config_file.read_text()
    text = '{\n  "epochs": 7\n}\n'
    error = post(server, "/api/config", text='{"epochs": 0, "modle": 1}', version=seen["version"], status=400)["error"]
    assert "modle: no such setting; did you mean model?" in error["message"]
    assert "not JSON" in post(server, "/api/config", text="{", version=seen["version"], status=400)["error"]["message"]
    assert post(server, "/api/config", text=text, version="other", status=409)
    assert home.config_file.read_text() == seen["text"]
    version = post(server, "/api/config", text=text, version=seen["version"])["version"]
    assert home.config_file.read_text() == text
    assert stat.S_IMODE(home.config_file.stat().st_mode) == 0o600
    assert server.json("/api/config")["version"] == version
    assert server.ask("/api/config", method="POST", body=b"x" * 2_000_000)[0] == 413
    assert server.json("/api/config/schema")["properties"]["web"]


def test_a_broken_config_is_mended_on_its_page(web, home):
    home.config_file.write_text('{"epochs": ')
    server = web("--host", "127.0.0.1")
    assert b"config.json" in server.ask("/drop")[2]
    seen = server.json("/api/config")
    assert seen["text"] == '{"epochs": '
    post(server, "/api/config", text='{"epochs": 2}', version=seen["version"])
    assert json.loads(home.config_file.read_text()) == {"epochs": 2}


COMMAND = {"on_finish": {"command": "touch /tmp/x"}}
TRUSTING = {"model": "some/model", "trust_remote_code": True}


def test_programs_that_it_runs_are_not_chosen_by_everybody_who_can_log_in(web, home):
    server = web()

    def save(status: int, **settings) -> None:
        version = server.json("/api/config")["version"]
        post(server, "/api/config", text=json.dumps(settings), version=version, status=status)

    for settings in (COMMAND, TRUSTING, {"profiles": {"fast": TRUSTING}}):
        save(403, **settings)
    home.config_file.write_text(json.dumps(COMMAND | TRUSTING))
    save(200, **COMMAND, **TRUSTING, epochs=7)  # the file's user has chosen them
    save(403, **COMMAND, **TRUSTING | {"model": "other/model"})
    save(403, **COMMAND, **TRUSTING, profiles={"fast": {"model": "other/model"}})
    save(403, on_finish={"command": "other"}, **TRUSTING)
    save(200, epochs=7)  # without them


def test_who_has_the_token_may_choose_what_programs_it_runs(web, home):
    server = web("--host", "0.0.0.0")
    key = {"Authorization": f"Bearer {home.web_token.read_text().strip()}"}
    given = {"text": json.dumps(COMMAND), "version": server.json("/api/config", **key)["version"]}
    server.json("/api/config", method="POST", body=json.dumps(given).encode(), **key)
    assert json.loads(home.config_file.read_text()) == COMMAND
