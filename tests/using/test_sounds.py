"""What is heard in sounds: transcripts as transformers gives them, errors in words and characters as training measures them."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from layerpeft.cli import main
from layerpeft.recipe.shipped import resolve
from layerpeft.recipe.tasks.audio import sound
from layerpeft.recipe.tasks.speech import letters
from layerpeft.recipe.toys.sounds import wav
from layerpeft.using.folder import find


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tunes(count: int) -> list[dict]:
    """Rows with whole paths, of unlike lengths."""
    place = Path(resolve("layerpeft://tunes_eval.jsonl"))
    return [{**row, "audio": str(place.parent / row["audio"])} for row in lines(place)[:count]]


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model that spells, with random weights."""
    folder = tmp_path_factory.mktemp("heard") / "speller"
    config = transformers.AutoConfig.from_pretrained(resolve("layerpeft://toy-wav2vec2"))
    words = letters(["abcdefg ü"])
    config.vocab_size, config.pad_token_id = len(words), words.pad_token_id
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForCTC(config)
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    model.save_pretrained(folder)
    hears = transformers.AutoFeatureExtractor.from_pretrained(resolve("layerpeft://toy-wav2vec2"))
    transformers.Wav2Vec2Processor(hears, words).save_pretrained(folder)
    return folder


def test_what_is_spelled_does_not_hang_on_the_batch_and_gaps_have_reasons(speller, tmp_path, capsys):
    given = tunes(5)
    (tmp_path / "none.wav").write_bytes(b"RIFF no sound")
    (tmp_path / "long.wav").write_bytes(wav(np.zeros(31 * 8000), 8000))
    bad = [{"audio": None}, {"audio": "gone.wav"}, {"audio": "none.wav"}, {"audio": "long.wav"}]
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text("\n".join(map(json.dumps, [*given[:3], *bad, *given[3:]])), encoding="utf-8")
    words = ["predict", str(speller), str(rows), "--out", str(out), "--keep", "text"]
    assert main([*words, "--batch-size", "3"]) == 0
    assert "9 rows read, 5 predicted, 4 without a prediction" in capsys.readouterr().out
    found = lines(out)
    reasons = [row["reason"] for row in found[3:7]]
    assert reasons[0] == "has no audio" and "gone.wav" in reasons[1] and reasons[3] == "is longer than max_seconds: 30"
    assert [row["kept_text"] for row in found if row["text"] is not None] == [row["text"] for row in given]
    model = transformers.Wav2Vec2ForCTC.from_pretrained(speller).eval()
    reader = transformers.AutoProcessor.from_pretrained(speller)
    said = [row["text"] for row in found if row["text"] is not None]
    for row, text in zip(given, said, strict=True):
        heard = sound({"bytes": None, "path": row["audio"]}, 16_000)
        with torch.no_grad():
            logits = model(**reader(heard, sampling_rate=16_000, return_tensors="pt")).logits
        assert text == reader.batch_decode(logits.argmax(-1))[0].strip() != ""
    judged = [{**row, "text": text} for row, text in zip(given, said, strict=True)]
    judged = [*judged[:4], {**judged[4], "text": judged[4]["text"] + " ü"}, {"audio": given[0]["audio"], "text": None}]
    rows.write_text("\n".join(map(json.dumps, judged)), encoding="utf-8")
    assert main(["eval", str(speller), str(rows), "--out", str(tmp_path / "n.json")]) == 0
    numbers = json.loads((tmp_path / "n.json").read_text())
    count = sum(len(text.split()) for text in said) + 1
    assert numbers["wer"] == pytest.approx(1 / count) and 0 < numbers["cer"] < numbers["wer"]
    assert numbers["rows"] == 5 and numbers["left_out"] == {"has no text": 1}


def test_a_model_with_a_decoder_writes_what_it_hears(tmp_path):
    toy = resolve("layerpeft://toy-whisper")
    given = tunes(3)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, given)))
    words = ["predict", toy, str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    assert main([*words, "max_new_tokens=4"]) == 0
    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(toy).eval()
    reader = transformers.AutoProcessor.from_pretrained(toy)
    for row, found in zip(given, lines(tmp_path / "out.jsonl"), strict=True):
        with wave.open(row["audio"]) as file:
            heard = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 2**15
        features = reader.feature_extractor(heard, sampling_rate=16_000, return_tensors="pt").input_features
        made = model.generate(features, max_new_tokens=4, do_sample=False)
        assert found["text"] == reader.batch_decode(made, skip_special_tokens=True)[0].strip() != ""
    assert main([*words, "--overwrite"]) == 0  # as much as it has places for
    assert main(["generate", toy, "--prompt", "x"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["speech", "whisper"])
def test_errors_are_those_that_training_measured(recipe, tmp_path):
    folder = tmp_path / "run"
    assert main(["train", recipe, f"output_dir={folder}", "max_steps=100"]) == 0
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    for batch in ("1", "8"):
        words = ["layerpeft://tunes_eval.jsonl", "--overwrite", "--batch-size", batch]
        assert main(["eval", str(folder), *words, "--out", str(tmp_path / "n.json")]) == 0
        found = json.loads((tmp_path / "n.json").read_text())
        assert found["rows"] == 48
        assert (found["wer"], found["cer"]) == pytest.approx((last["eval_wer"], last["eval_cer"]), rel=1e-6)
    kind = {"speech": "AutoModelForCTC", "whisper": "AutoModelForSpeechSeq2Seq"}[recipe]
    assert find(str(folder)).kind == kind
