from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edger1.config import Config, load_config
from edger1.errors import UsageError
from edger1.memory import machine_bytes
from edger1.tools import ServerSettings, ToolSettings
from edger1.units import format_bytes, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GB", 6_000_000_000),
        ("6 gb", 6_000_000_000),
        ("6GiB", 6 * 2**30),
        ("512MB", 512_000_000),
        ("1.5G", 1_500_000_000),
        (".5k", 500),
        ("4096", 4096),
        (4096, 4096),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


def test_a_share_is_of_the_whole_or_of_the_machine() -> None:
    assert parse_size("25%", whole=1000) == 250
    assert parse_size("50%") == int(machine_bytes() / 2)


@pytest.mark.parametrize("text", ["", "GB", "6 XB", "-1GB", "6GB!", "0", "0%", "101%", "1e9", "nan", "٣GB", True])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a size|is no memory at all|is more than the whole"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (98_362_432, "98.4 MB"),
        (999_600, "1.00 MB"),
        (419_500_000_000, "420 GB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_format_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(min_value=1, max_value=10**15 - 10**12))
def test_what_is_printed_can_be_read_and_is_within_half_a_percent(size: int) -> None:
    assert abs(parse_size(format_bytes(size)) - size) <= size * 0.00501


def test_every_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGER1_HOME", str(tmp_path))
    assert load_config() == Config()
    (tmp_path / "config.toml").write_text(
        'memory = "6GB"\ncontext = 8192\nthreads = 2\nkv_bits = 8\ntheme = "nord"\noffline = true\nmodel = "qwen3-8b"\n'
        'accessible = true\nthoughts = false\nadapters = ["~/runs"]\n'
    )
    expected = Config(
        6_000_000_000,
        8192,
        2,
        "nord",
        True,
        accessible=True,
        model="qwen3-8b",
        thoughts=False,
        adapters=("~/runs",),
        kv_bits=8,
    )
    assert load_config() == expected


def test_tools(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        '[tools]\nfunctions = ["a.py", "/b.py"]\ntimeout_s = 5\n'
        '[mcp.files]\ncommand = "npx"\nargs = ["-y", "x y"]\nenv = { A = "b" }\ncwd = "sub"\nstart_timeout_s = 1.5\n'
        '[mcp.web]\nurl = "http://127.0.0.1:8000/mcp"\nheaders = { Authorization = "secret" }\n'
    )
    tools = load_config(path).tools
    files = ServerSettings("files", "npx", ("-y", "x y"), {"A": "b"}, tmp_path / "sub", start_timeout_s=1.5)
    web = ServerSettings("web", url="http://127.0.0.1:8000/mcp", headers={"Authorization": "secret"})
    assert tools == ToolSettings((files, web), (tmp_path / "a.py", Path("/b.py")), 5.0)
    assert files.runs == "npx -y 'x y'"
    assert "secret" not in repr(tools)


def test_a_secret_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[mcp.web]\nurl = "http://x"\nheaders = { A = "hunter2", B = 1 }\n')
    with pytest.raises(UsageError) as raised:
        load_config(path)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('memori = "6GB"', r"unknown key 'memori'. Did you mean memory\?"),
        (
            "zzz = 1",
            r"unknown key 'zzz'. Known keys: memory, context, threads, theme, offline, accessible, model",
        ),
        ('memory = "much"', r"memory: 'much' is not a size"),
        ("memory = true", r"memory is True, but a size such as"),
        ('context = "8k"', r"context is '8k', but a whole number of at least 1 was expected"),
        ("kv_bits = 6", r"kv_bits is 6, but 8 or 4 was expected"),
        ("kv_bits = true", r"kv_bits is True, but 8 or 4"),
        ("threads = 0", r"threads is 0, but a whole number of at least 1"),
        ("offline = 1", r"offline is 1, but true or false was expected"),
        ('accessible = "yes"', r"accessible is 'yes', but true or false was expected"),
        ('[tools]\nfunktions = ["a.py"]', r"unknown key 'tools.funktions'. Did you mean tools.functions\?"),
        ('[tools]\nfunctions = "a.py"', r"tools.functions is 'a.py', but a list of texts"),
        ("[tools]\ntimeout_s = 0", r"tools.timeout_s is 0, but a number of seconds"),
        ("tools = 3", r"tools is 3, but a table, \[tools\], was expected"),
        ("mcp = 3", r"mcp is 3, but a table a server"),
        ("[mcp]\ncommand = 'x'", r"mcp.command is 'x', but a table, \[mcp.command\], was expected"),
        ("[mcp.a]", r"mcp.a has neither a command nor a url"),
        ("[mcp.a]\ncommand = 'x'\nurl = 'http://y'", r"mcp.a has both a command and a url"),
        ("[mcp.a]\nurl = 'y'", r"mcp.a.url is 'y', but an address such as"),
        ("[mcp.a]\nurl = 'http://y'\nargs = []", r"mcp.a.args goes with command"),
        ("[mcp.a]\ncommand = 'x'\nheaders = {}", r"mcp.a.headers goes with url"),
        ("[mcp.a]\ncommand = 'x'\nargs = [1]", r"mcp.a.args is \[1\], but a list of texts"),
        ("[mcp.a]\ncommand = 'x'\nenv = { A = 1 }", r"mcp.a.env is no table of texts"),
        ("[mcp.a]\ncommand = 'x'\narg = []", r"unknown key 'mcp.a.arg'. Did you mean mcp.a.args\?"),
        ("[mcp.a]\ncommand = 'x'\ncall_timeout_s = true", r"call_timeout_s is True, but a number of seconds"),
        ("[mcp.'a b']\ncommand = 'x'", r"a server named 'a b'; up to 32 letters"),
        ("theme = 3", r"theme is 3, but a name in quotes was expected"),
        ('adapters = "runs"', r"adapters is 'runs', but a list of folders"),
        ("model = ''", r"model is '', but a name in quotes was expected"),
        ("offline = true\nmemory = = 1", r"not valid TOML.*line 2"),
    ],
)
def test_a_wrong_setting_names_file_key_and_expectation(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as raised:
        load_config(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read"):
        load_config(tmp_path / "config.toml")


@given(st.integers(1, 10**15))
@example(2010)
def test_a_size_rounded_up_holds_the_size(size: int) -> None:
    shown = parse_size(format_bytes(size, up=True))
    assert size <= shown <= size * 1.011
    assert format_bytes(4_070_000_000, up=True) == "4.07 GB"
    assert format_bytes(4_070_000_001, up=True) == "4.08 GB"
