"""The certificate: holds where streamed equals resident, says where not, and covers every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import streamed_models
from streamed_models import moe_families
from typer.testing import CliRunner

from edger1 import kernels, worker
from edger1.cli import app
from edger1.errors import FormatError, StreamError, UsageError
from edger1.experts import verify as verify_module
from edger1.experts.store import Store
from edger1.experts.verify import ROWS, verify
from edger1.kernels.experts_streamed import StreamedOperation

ONLY_16 = {"deepseek_v41", "kimi_k3"}
"""Families with layers that are given more than rows and masks, so that they cannot be called alone with other rows."""


@pytest.mark.families
@pytest.mark.parametrize("family", moe_families())
def test_every_family_has_its_certificate(family: str, tmp_path: Path) -> None:
    folder = streamed_models.write(tmp_path / family, family)
    certificate = verify(folder, precision="exact")
    assert certificate.holds, certificate.as_json()
    for layer in certificate.layers:
        assert layer.slots < layer.experts
        assert any(c.misses for c in layer.outputs)
        assert len(layer.outputs) == len(ROWS) or (family in ONLY_16 and layer.not_compared)


def test_tokens_are_the_models_own_however_its_config_counts_them() -> None:
    assert "vocab_size" not in families.tiny_config("phixtral")
    assert verify_module._vocabulary(families.build("phixtral")) == families.tiny_config("phixtral")["num_vocab"]


def test_other_bytes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = streamed_models.write(tmp_path / "m", "olmoe")
    read = Store._read_part

    def wrong(self: Store, part: Any, expert: int, into: Any, staging: Any) -> None:
        read(self, part, expert, into, staging)
        if expert == 3 and part.projection == "down_proj" and part.name == "scales":
            into[0] ^= 1

    monkeypatch.setattr(Store, "_read_part", wrong)
    certificate = verify(folder, precision="exact")
    assert not certificate.holds
    layer = certificate.layers[0]
    assert layer.resident_weights_sha256 != layer.streamed_weights_sha256


def test_the_command_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = streamed_models.write(tmp_path / "m", "qwen3_moe")
    out = tmp_path / "certificate.json"
    done = CliRunner().invoke(app, ["verify", str(folder), "--precision", "exact", "--output", str(out)])
    assert done.exit_code == 0, done.output
    assert "bit for bit" in done.output
    found = json.loads(out.read_text())
    assert found["holds"] is True
    assert [c["rows"] for c in found["layers"][0]["outputs"]] == list(ROWS)
    monkeypatch.setattr(verify_module, "_stored_bytes", lambda *_: iter(()))
    done = CliRunner().invoke(app, ["verify", str(folder), "--precision", "exact"])
    assert done.exit_code == 1
    assert "differs: weights" in done.output


def test_a_model_without_experts_has_nothing_to_verify(tiny_folder: Path) -> None:
    with pytest.raises(FormatError, match="no routed experts"):
        worker.call(lambda: verify(tiny_folder))


@pytest.mark.skipif(not kernels.state().available, reason="without kernels no layer is one operation")
def test_what_is_compared_is_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded model's layers with streamed experts are one operation each, where that is known to stand for them."""
    folder = streamed_models.write(tmp_path / "m", "olmoe")
    given = StreamedOperation.given
    monkeypatch.setattr(StreamedOperation, "given", lambda *arguments: given(*arguments) * 2)
    certificate = verify(folder, precision="exact")
    assert not any(layer.outputs[0].same for layer in certificate.layers)


def test_slots_that_cannot_be_are_refused(tmp_path: Path) -> None:
    folder = streamed_models.write(tmp_path / "m", "olmoe")
    for wrong in (0, "0%"):
        with pytest.raises(UsageError, match="expert_slots is"):
            verify(folder, expert_slots=wrong)


def test_a_file_that_cannot_be_read_is_no_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = streamed_models.write(tmp_path / "m", "olmoe")

    def fail(*_: Any) -> None:
        raise StreamError("cannot be read")

    monkeypatch.setattr(Store, "_read_part", fail)
    with pytest.raises(StreamError, match="cannot be read"):
        verify(folder, precision="exact")
