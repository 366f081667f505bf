"""A teacher behind a web address: where its reasoning is found, what is waited for, and what ends a run."""

from __future__ import annotations

import time
from typing import Any

import pytest
from chat_server import ChatServer, Handler, completion, serving

from edger1.errors import UsageError
from edger1.train.distill.remote import RemoteTeacher, base_address
from edger1.train.distill.teachers import Drawing, NoAnswerError, Reply, TeacherError

ASKED = [{"role": "user", "content": "What is 2 + 3"}]
KEY = "sk-very-secret-0123456789"


def teacher(server: ChatServer, **options: Any) -> RemoteTeacher:
    return RemoteTeacher(server.address, **{"model": "m", "first_wait_s": 0.01, **options})


def ask(server: ChatServer, **options: Any) -> Reply:
    return teacher(server, **options).ask(ASKED, Drawing(temperature=0.5, max_tokens=7), 11)


def test_a_request_carries_the_settings_and_the_key_and_leaves_out_what_was_not_asked_for() -> None:
    with serving() as server:
        assert ask(server, key=KEY).answer == "5"
    expected = {"model": "m", "messages": ASKED, "seed": 11, "stream": False, "temperature": 0.5, "max_tokens": 7}
    assert server.requests == [expected]
    assert server.authorizations == [f"Bearer {KEY}"]


def test_without_a_key_nothing_is_sent_in_its_place() -> None:
    with serving() as server:
        ask(server)
    assert server.authorizations == [None]


@pytest.mark.parametrize(
    "message",
    [
        {"content": "5", "reasoning_content": "2 and 3"},
        {"content": "\n5\n", "reasoning": "2 and 3\n"},
        {"content": "<think>\n2 and 3\n</think>\n\n5"},
        {"content": "2 and 3\n</think>\n\n5"},
    ],
)
def test_reasoning_is_found_wherever_a_server_puts_it(message: dict[str, Any]) -> None:
    answer = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 4}}
    with serving(lambda _: answer) as server:
        reply = ask(server)
    assert reply == Reply("2 and 3", "5", "stop", 4)
    assert reply.text == "<think>\n2 and 3\n</think>\n\n5"


def test_an_answer_without_reasoning_gets_no_markers_and_one_without_usage_no_count() -> None:
    answer = {"choices": [{"message": {"content": "5"}, "finish_reason": "stop"}]}
    with serving(lambda _: answer) as server:
        reply = ask(server)
    assert (reply.text, reply.tokens) == ("5", None)


def test_an_answer_cut_off_in_its_thought_is_not_closed() -> None:
    with serving(lambda _: completion("", "2 and", finish="length")) as server:
        reply = ask(server)
    assert not reply.finished
    assert reply.text == "<think>\n2 and"


def busy(handler: Handler, number: int) -> bool:
    if number < 2:
        handler.send(429, {"error": {"message": "slow down"}}, Retry_After="0.05")
    return number < 2


def broken(handler: Handler, number: int) -> bool:
    if number < 2:
        handler.send(503, b"<html>")
    return number < 2


def cut(handler: Handler, number: int) -> bool:
    if number < 2:
        handler.cut()
    return number < 2


def garbage(handler: Handler, number: int) -> bool:
    if number < 2:
        handler.send(200, b"{]" if number else {"choices": []})
    return number < 2


@pytest.mark.parametrize("trouble", [busy, broken, cut, garbage])
def test_what_passes_is_waited_for(trouble: Any) -> None:
    with serving(trouble=trouble) as server:
        assert ask(server).answer == "5"
    assert len(server.requests) == 3


def test_a_server_that_asks_for_time_gets_it() -> None:
    def later(handler: Handler, number: int) -> bool:
        if number == 0:
            handler.send(429, {}, Retry_After="0.3")
        return number == 0

    began = time.monotonic()
    with serving(trouble=later) as server:
        ask(server)
    assert time.monotonic() - began >= 0.3


def test_a_silent_server_is_given_up_after_the_timeout() -> None:
    with serving(delay_s=0.5) as server, pytest.raises(NoAnswerError, match="2 attempts.*timed out"):
        ask(server, timeout_s=0.05, attempts=2)


def test_attempts_end_and_say_what_was_found() -> None:
    def never(handler: Handler, _: int) -> bool:
        handler.send(500, {"error": {"message": "out of memory"}})
        return True

    with serving(trouble=never) as server, pytest.raises(NoAnswerError, match=r"3 attempts.*HTTP 500, 'out of memory'"):
        ask(server, attempts=3)
    assert len(server.requests) == 3


def test_a_prompt_that_is_refused_is_not_asked_again() -> None:
    def too_long(handler: Handler, _: int) -> bool:
        handler.send(400, {"error": {"message": "maximum context length is 4096"}})
        return True

    with serving(trouble=too_long) as server, pytest.raises(NoAnswerError, match="maximum context length"):
        ask(server)
    assert len(server.requests) == 1


def test_a_refused_key_ends_at_once_and_is_never_shown() -> None:
    def refuse(handler: Handler, _: int) -> bool:
        handler.send(401, {"error": {"message": f"Incorrect API key provided: {KEY}"}})
        return True

    with serving(trouble=refuse) as server, pytest.raises(TeacherError, match="EDGER1_TEACHER_KEY") as raised:
        ask(server, key=KEY)
    assert KEY not in str(raised.value)
    assert len(server.requests) == 1


def test_a_redirect_is_not_followed_with_the_key() -> None:
    with serving() as other:

        def elsewhere(handler: Handler, _: int) -> bool:
            handler.send(307, {}, Location=other.address + "/chat/completions")
            return True

        with serving(trouble=elsewhere) as server, pytest.raises(TeacherError, match="it has moved"):
            ask(server, key=KEY)
    assert other.requests == []


def test_the_only_model_of_a_server_needs_no_name() -> None:
    with serving() as server:
        assert RemoteTeacher(server.address).name == "stand-in"


def test_nobody_there_is_said_before_anything_is_asked() -> None:
    with serving() as server:
        address = server.address
    with pytest.raises(TeacherError, match="(?i)connection failed"):
        RemoteTeacher(address, first_wait_s=0.01)


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://localhost:8080", "http://localhost:8080/v1"),
        ("http://localhost:8080/v1/", "http://localhost:8080/v1"),
        ("HTTPS://api.example.com/v1/chat/completions", "https://api.example.com/v1"),
        ("http://[::1]:80/api/v2", "http://[::1]:80/api/v2"),
    ],
)
def test_addresses_in_all_their_forms(given: str, base: str) -> None:
    assert base_address(given) == base


@pytest.mark.parametrize(
    "given", ["ftp://x/v1", "http://", "http://h:99999/", "http://me:secret@h/v1", "http://h/v1?k=1"]
)
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(UsageError) as raised:
        base_address(given)
    assert "secret" not in str(raised.value)
