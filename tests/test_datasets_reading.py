"""Files of rows: formats, kinds, trace markers, and what is said of bad rows."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edger1.errors import EdgeR1Error, FormatError, UsageError
from edger1.train.datasets.kinds import KINDS
from edger1.train.datasets.reading import read

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
PAIR = {"prompt": "2+2=", "completion": "4"}


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def one(tmp_path: Path, record: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    dataset = read(lines(tmp_path / "rows.jsonl", record), **options)
    return dataset, dataset.rows[0]


class TestKinds:
    @pytest.mark.parametrize(
        ("record", "kind", "roles"),
        [
            (CHAT, "messages", ["user", "assistant"]),
            (
                {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
                "conversations",
                None,
            ),
            ({"conversations": CHAT["messages"]}, "messages", None),
            ({"system": "s", **CHAT}, "messages", ["system", "user", "assistant"]),
            (PAIR, "completion", None),
            ({"question": "a", "answer": "b"}, "completion", None),
            ({"instruction": "a", "input": "", "output": "b"}, "completion", None),
            ({"problem": "a", "solution": "b"}, "completion", None),
            ({"problem": "a", "level": 3}, "prompt", ["user"]),
            ({"messages": CHAT["messages"][:1]}, "prompt", ["user"]),
            ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", ["user"]),
        ],
    )
    def test_a_kind_is_found(self, tmp_path: Path, record: dict[str, Any], kind: str, roles: list[str] | None) -> None:
        dataset, row = one(tmp_path, record)
        assert dataset.kind == kind
        assert [m["role"] for m in row.messages] == (roles or ["user", "assistant"])
        assert kind in dataset.describe()

    def test_text_is_a_kind_of_its_own(self, tmp_path: Path) -> None:
        dataset, row = one(tmp_path, {"text": "once", "id": 4})
        assert (dataset.kind, row.text, row.messages, row.columns) == ("text", "once", None, {"id": 4})

    def test_an_instruction_is_given_with_its_input(self, tmp_path: Path) -> None:
        _, row = one(tmp_path, {"instruction": "Add.", "input": "2 2", "output": "4"})
        assert row.messages[0]["content"] == "Add.\n\n2 2"

    def test_a_prompts_other_columns_are_kept_for_rewards(self, tmp_path: Path) -> None:
        _, row = one(tmp_path, {"question": "2+2?", "answer": "4", "level": 1}, kind="prompt")
        assert row.messages == [{"role": "user", "content": "2+2?"}]
        assert row.columns == {"answer": "4", "level": 1}

    def test_preferences_given_as_whole_conversations_part_at_their_answers(self, tmp_path: Path) -> None:
        worse = [CHAT["messages"][0], {"role": "assistant", "content": "no"}]
        _, row = one(tmp_path, {"chosen": CHAT["messages"], "rejected": worse})
        assert row.messages == CHAT["messages"][:1]
        assert (row.columns["chosen"], row.columns["rejected"]) == (CHAT["messages"][1:], worse[1:])

    def test_parts_of_text_are_joined_and_pictures_refused(self, tmp_path: Path) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        _, row = one(tmp_path, {"messages": [{"role": "user", "content": parts}, CHAT["messages"][1]]})
        assert row.messages[0]["content"] == "ab"
        picture = {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, CHAT["messages"][1]]}
        with pytest.raises(FormatError, match=r"line 1: turn 1 holds .*only parts of text"):
            one(tmp_path, picture)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_kind_that_a_row_is_not_of_is_an_error(self, tmp_path: Path, kind: str) -> None:
        with pytest.raises(FormatError, match=rf'line 1: it is not of kind "{kind}"'):
            one(tmp_path, {"label": 3}, kind=kind)


class TestTraces:
    @pytest.mark.parametrize(
        ("content", "markers"),
        [
            ("<think>\nwhy\n</think>\n\nso", "R1"),
            ("why\n</think>\n\nso", "R1"),
            ("<think>\nwhy\n</think>\n<answer>\nso\n</answer>", "open-r1"),
            (
                "<|begin_of_thought|>\n\nwhy\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nso\n\n<|end_of_solution|>",
                "Sky-T1",
            ),
            ("<|begin_of_thought|>why<|end_of_thought|>so", "Sky-T1"),
        ],
    )
    def test_markers_become_one(self, tmp_path: Path, content: str, markers: str) -> None:
        record = {
            "system": "S",
            "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": content}],
        }
        dataset, row = one(tmp_path, record)
        assert row.messages == [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "<think>why</think>so"},
        ]
        assert dataset.markers == {markers: 1}

    @pytest.mark.parametrize(
        "record",
        [
            {"question": "q", "thinking_trajectories": ["why"], "attempt": "so", "solution": "S"},
            {"question": "q", "deepseek_thinking_trajectory": "why", "deepseek_attempt": "so"},
            {"problem": "q", "deepseek_reasoning": "why", "deepseek_solution": "so", "ground_truth_solution": "S"},
            {"prompt": "q", "reasoning": "why", "completion": "so"},
        ],
    )
    def test_thoughts_in_columns_of_their_own(self, tmp_path: Path, record: dict[str, Any]) -> None:
        dataset, row = one(tmp_path, record)
        assert dataset.kind == "trace"
        assert row.messages[-1]["content"] == "<think>why</think>so"
        assert set(row.columns) <= {"solution", "ground_truth_solution"}

    def test_thoughts_beside_a_turns_content(self, tmp_path: Path) -> None:
        turn = {"role": "assistant", "content": "so", "reasoning_content": "why"}
        _, row = one(tmp_path, {"messages": [CHAT["messages"][0], turn]})
        assert row.messages[1] == {"role": "assistant", "content": "<think>why</think>so"}

    def test_a_completion_in_r1s_form(self, tmp_path: Path) -> None:
        dataset, row = one(tmp_path, {"prompt": "q", "completion": "<think>\nwhy\n</think>\nso"})
        assert row.messages[1]["content"] == "<think>why</think>so"
        assert dataset.markers == {"R1": 1}

    def test_an_empty_thought_is_none(self, tmp_path: Path) -> None:
        _, row = one(tmp_path, {"prompt": "q", "completion": "<think>\n\n</think>\n\nso"})
        assert row.messages[1]["content"] == "so"

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("<think>why", "opened with <think> and not closed"),
            ("<think>why</think>", "a thought and no answer"),
            ("<|begin_of_thought|>why", "opened and not closed"),
            ("<|begin_of_thought|>why<|end_of_thought|><|begin_of_solution|>so", "opened and not closed"),
        ],
    )
    def test_a_trace_that_was_cut_short_is_a_bad_row(self, tmp_path: Path, content: str, reason: str) -> None:
        with pytest.raises(FormatError, match=reason):
            one(tmp_path, {"prompt": "q", "completion": content})


class TestFormats:
    def test_csv_with_long_and_quoted_cells(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.csv"
        long = "x" * 200_000
        limit = csv.field_size_limit()
        with path.open("w", newline="", encoding="utf-8-sig") as stream:
            csv.writer(stream).writerows([["question", "answer"], ['a,\n"b"', long], ["c", "d"]])
        dataset = read(path)
        assert [row.messages[0]["content"] for row in dataset] == ['a,\n"b"', "c"]  # type: ignore[index]
        assert dataset.rows[0].messages[1]["content"] == long  # type: ignore[index]
        assert [row.where for row in dataset] == ["rows.csv, line 2", "rows.csv, line 4"]
        assert csv.field_size_limit() == limit

    def test_json_as_a_list_an_object_with_a_list_and_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.json"
        for text in (
            json.dumps([PAIR, PAIR]),
            json.dumps({"version": 1, "data": [PAIR, PAIR]}),
            f"{json.dumps(PAIR)}\n" * 2,
        ):
            path.write_text(text)
            assert len(read(path)) == 2
        path.write_text(json.dumps(CHAT))
        assert read(path).kind == "messages"

    def test_parquet_in_batches(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        records = [{**CHAT, "n": n} for n in range(3000)]
        parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "rows.parquet")
        dataset = read(tmp_path / "rows.parquet")
        assert [row.columns["n"] for row in dataset] == list(range(3000))
        assert dataset.rows[-1].where == "rows.parquet, row 3000"

    def test_parquet_without_pyarrow_says_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "rows.parquet").write_bytes(b"PAR1")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(UsageError, match=r"edger1\[train\]"):
            read(tmp_path / "rows.parquet")

    def test_packed_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(gzip.compress(json.dumps(PAIR).encode()))
        assert len(read(path)) == 1
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(FormatError, match="damaged"):
            read(path)

    def test_a_folders_files_in_the_order_of_their_names(self, tmp_path: Path) -> None:
        lines(tmp_path / "b.jsonl", {"prompt": "3", "completion": "x"})
        lines(tmp_path / "a.jsonl", {"prompt": "1", "completion": "x"}, {"prompt": "2", "completion": "x"})
        (tmp_path / "about.json").write_text('{"license": "x"}')
        (tmp_path / "README.md").write_text("words")
        dataset = read(tmp_path)
        assert [row.messages[0]["content"] for row in dataset] == ["1", "2", "3"]  # type: ignore[index]
        assert dataset.files == ("a.jsonl", "b.jsonl")

    def test_a_path_without_rows_is_a_usage_error(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.jsonl", tmp_path, lines(tmp_path / "rows.txt", PAIR)):
            with pytest.raises(UsageError, match="jsonl"):
                read(path)


class TestBadRows:
    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b"", "line 2: the line is empty"),
            (b"{}", "line 2: it is empty"),
            (b'{"messages": [', "line 2: it is not JSON"),
            (b"[1]", "line 2: it is list"),
            (b'{"messages": []}', "line 2: its turns are"),
            (b'{"messages": "hi"}', "line 2: 'hi' should be JSON"),
            (b'{"messages": [{"role": "wizard", "content": "a"}]}', "line 2: the role of turn 1 is 'wizard'"),
            (b'{"messages": [{"role": "user", "content": ""}]}', r"line 2: turn 1 \(user\) is empty"),
            (b'{"messages": [{"role": "user"}]}', "line 2: the content of turn 1 is missing"),
            (b'{"messages": [{"role": "user", "content": "a"}]}', "line 2: it has no assistant turn"),
            (b'{"me\xff": 1}', "line 2: it is not UTF-8"),
            (b"[" * 100_000, "line 2: it is nested too deeply"),
            (b'{"name": "x"}', r"line 2: (its columns|it is not of kind)"),
        ],
    )
    def test_a_bad_row_is_named_and_can_be_left_out(self, tmp_path: Path, line: bytes, reason: str) -> None:
        path = tmp_path / "rows.jsonl"
        good = json.dumps(CHAT).encode()
        path.write_bytes(b"\n".join([good, line, good, b"", b""]))
        with pytest.raises(FormatError, match=rf"rows.jsonl, {reason}"):
            read(path)
        dataset = read(path, skip_bad=True)
        assert (len(dataset), dataset.bad_count, dataset.bad[0].where) == (2, 1, "rows.jsonl, line 2")
        assert "1 bad rows left out" in dataset.describe()

    def test_bad_rows_behind_those_looked_at_first_are_found(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "rows.jsonl", *[CHAT] * 1500, PAIR)
        with pytest.raises(FormatError, match=r'line 1501: it is not of kind "messages" but looks like "completion"'):
            read(path)

    def test_mixed_kinds_are_an_error_with_both_places(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "rows.jsonl", CHAT, CHAT, PAIR)
        with pytest.raises(FormatError, match=r'line 1 is "messages" and rows.jsonl, line 3 is "completion"'):
            read(path)
        assert len(read(path, skip_bad=True)) == 2
        with pytest.raises(FormatError, match="line 1: it is not of kind"):
            read(path, kind="completion")

    def test_rows_that_one_kind_reads_are_not_mixed(self, tmp_path: Path) -> None:
        traced = {"question": "q", "thinking": "why", "answer": "so"}
        dataset = read(lines(tmp_path / "rows.jsonl", traced, {**traced, "thinking": None}))
        assert dataset.kind == "trace"
        assert [row.messages[1]["content"] for row in dataset] == ["<think>why</think>so", "so"]  # type: ignore[index]
        both = [CHAT, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
        assert len(read(lines(tmp_path / "rows.jsonl", *both))) == 2

    def test_nothing_is_an_error_even_when_bad_rows_are_left_out(self, tmp_path: Path) -> None:
        for content in ("", "\n\n", "{}\n", "nonsense\n"):
            (tmp_path / "rows.jsonl").write_text(content)
            for skip_bad in (False, True):
                with pytest.raises(FormatError, match=r"rows.jsonl"):
                    read(tmp_path / "rows.jsonl", skip_bad=skip_bad)

    def test_a_csv_row_with_a_cell_too_many(self, tmp_path: Path) -> None:
        (tmp_path / "rows.csv").write_text("prompt,completion\na,b\na,b,c\n\nd,e\n")
        with pytest.raises(FormatError, match="line 3: it has 3 cells; the first line names 2 columns"):
            read(tmp_path / "rows.csv")
        dataset = read(tmp_path / "rows.csv", skip_bad=True)
        assert (len(dataset), dataset.bad_count) == (2, 2)

    def test_an_unknown_kind_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match='"chats" is no kind'):
            read(tmp_path, kind="chats")

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data(), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"]))
    def test_damaged_files_are_read_or_refused(self, tmp_path: Path, data: st.DataObject, suffix: str) -> None:
        whole = bytearray((json.dumps(CHAT) + "\n" + json.dumps(CHAT) + "\n").encode())
        if suffix == ".csv":
            whole = bytearray(b'prompt,completion\n"a ""b""",c\nd,e\n')
        elif suffix == ".parquet":
            pyarrow = pytest.importorskip("pyarrow")
            parquet = pytest.importorskip("pyarrow.parquet")
            sink = pyarrow.BufferOutputStream()
            parquet.write_table(pyarrow.Table.from_pylist([CHAT] * 3), sink)
            whole = bytearray(sink.getvalue().to_pybytes())
        elif suffix == ".jsonl.gz":
            whole = bytearray(gzip.compress(bytes(whole)))
        for _ in range(data.draw(st.integers(1, 6))):
            at = data.draw(st.integers(0, len(whole) - 1))
            whole[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
            if not whole:
                break
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(bytes(whole))
        for skip_bad in (False, True):
            with suppress(EdgeR1Error):
                assert len(read(path, skip_bad=skip_bad)) > 0
