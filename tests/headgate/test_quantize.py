"""`headgate quantize` as people meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headgate.quantize import main


def test_it_writes_a_checkpoint_and_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("def main(path):\n    return path\n" * 8)
    assert main(["headgate-demo", str(tmp_path / "out"), "--bits", "8", "--text", str(text)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["weights", "bits", "size", "perplexity", "change"]
    assert [line.split()[0] for line in lines[1:5]] == ["original", "int8", "int4", "fp8"]
    assert [line.endswith("%  written") for line in lines[1:5]] == [False, True, False, False]
    assert lines[5].endswith(f"headgate serve --model {tmp_path / 'out'}")
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
    )


@pytest.mark.parametrize(
    ("model", "out", "more", "sentence"),
    [
        ("headgate-demo", "there", [], "there is there already; nothing is overwritten"),
        ("nonsense", "out", [], "there is no folder nonsense"),
        ("wall", "out", [], "wall has random weights: there is nothing to quantize"),
        ("headgate-demo", "out", ["--text", "none.txt"], "none.txt cannot be read: No such file"),
        ("headgate-demo", "none/out", [], "there is no folder"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_status_2(
    model: str, out: str, more: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    assert main([model, str(tmp_path / out), "--bits", "4", *more]) == 2
    told = capsys.readouterr().err
    assert told.startswith("headgate: ") and sentence in told and told.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]
