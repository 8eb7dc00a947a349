"""What is saved goes to the hub and comes back as it was, through the hub's own client and the calls that it makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from peft import PeftModel
from transformers import AutoModelForCausalLM

import layerpeft
from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.saving.card import GAP
from tests.helpers.hub import standing_in, talk_to
from tests.helpers.short import short_llama

CLIENT = """
import sys
from huggingface_hub import HfApi, snapshot_download
api = HfApi()
api.create_repo("me/mine", exist_ok=True)
api.upload_folder(repo_id="me/mine", folder_path=sys.argv[1], ignore_patterns=["checkpoint-*"])
snapshot_download("me/mine", local_dir=sys.argv[2])
"""


def base() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(short_llama(2), dtype=torch.float32)


def test_a_folder_arrives_and_comes_back_byte_by_byte(tmp_path: Path) -> None:
    folder, back = tmp_path / "adapter", tmp_path / "back"
    config = LayerLoraConfig(select="last:1", r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    get_peft_model(base(), config).save_pretrained(str(folder))
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "optimizer.pt").write_bytes(b"large")
    with standing_in() as hub:
        told = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "secret"}
        words = [sys.executable, "-c", CLIENT, str(folder), str(back)]
        env = {**os.environ, **told, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert hub.repositories["me/mine"] == files and {"README.md", "layerpeft.json"} <= files.keys()
    assert {p.name: p.read_bytes() for p in back.iterdir() if p.is_file()} == files
    assert layerpeft.load(back).peft_config["default"].r == 2  # which checks every digest
    for call in ("POST /api/repos/create", "POST /api/validate-yaml", "POST /me/mine.git/info/lfs/objects/batch"):
        assert call in hub.asked
    assert "Bearer secret" in hub.tokens


def test_push_to_hub_of_a_model_leaves_the_card_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own takes the card from the repository, or a blank one: the folder goes first."""
    config = LayerLoraConfig(
        select="last:1", r=2, target_modules=["up_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = get_peft_model(base(), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    with standing_in() as hub:
        talk_to(hub, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        HfApi(token="secret").create_repo("me/mine")
        HfApi(token="secret").upload_folder(repo_id="me/mine", folder_path=tmp_path / "adapter")
        model.push_to_hub("me/mine", token="secret")
    arrived = hub.repositories["me/mine"]
    card = arrived["README.md"].decode()
    assert {"adapter_model.safetensors", "layerpeft.json"} <= arrived.keys() and len(hub.commits["me/mine"]) == 3
    assert GAP not in card and "Why these: 1 of 2 layers" in card and str(short_llama(2)) not in card
    (tmp_path / "back").mkdir()
    for name, data in arrived.items():
        (tmp_path / "back" / name).write_bytes(data)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        there = PeftModel.from_pretrained(base(), str(tmp_path / "back")).eval()(ids).logits
        assert torch.equal(there, model.eval()(ids).logits)
