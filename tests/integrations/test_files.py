"""Files as wholes: a crash in the middle leaves the old one, headers are read and refused, versions and digests have one owner."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerpeft.integrations import files
from layerpeft.integrations.files import digest_of, fingerprint, header_of, note_in, replace_file, replacing, version_of
from layerpeft.selection.scores import Scores
from layerpeft.training import optimizer_states
from layerpeft.training.optimizer_states import load_store, save_store
from tests.helpers.processes import in_a_process

SCORES = Scores((1.0, 2.0), "random", "f" * 64, "layers")


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="full"), replacing(path) as beside:
        beside.write_bytes(b"ne")
        raise RuntimeError("the disk is full")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]
    with replacing(path) as beside:
        beside.write_bytes(b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a.bin"]


KILLED = """
import os, sys
from pathlib import Path
from layerpeft.integrations.files import replacing
from tests.helpers.processes import in_a_process
with replacing(Path(sys.argv[1])) as beside:
    beside.write_bytes(b"half")
    os._exit(9)
"""


def test_a_killed_process_leaves_the_old_file_and_the_next_write_clears_up(tmp_path):
    path, other = tmp_path / "a[1].bin", tmp_path / ".a1.bin.0123.tmp"
    path.write_bytes(b"old")
    other.write_bytes(b"somebody else's")
    assert in_a_process(KILLED, path).returncode == 9
    assert path.read_bytes() == b"old" and len(names(tmp_path)) == 3
    replace_file(path, b"shared")  # another process may be at it: what lies there is not touched
    assert path.read_bytes() == b"shared" and len(names(tmp_path)) == 3
    with replacing(path) as beside:
        beside.write_bytes(b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == [other.name, path.name]


def test_what_vouches_for_others_is_forced_to_disk_and_newer_than_they(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files.os, "fsync", synced.append)
    path, later = tmp_path / "m.json", 4_000_000_000_000_000_000
    with replacing(path, later) as beside:
        beside.write_text("{}")
    assert path.stat().st_mtime_ns > later and len(synced) == 2  # the file, and the folder that names it
    replace_file(path, b"")
    assert len(synced) == 2


def test_scores_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    SCORES.save(path)
    assert path.read_text() == json.dumps(SCORES.to_dict(), indent=1) + "\n" and Scores.load(path) == SCORES

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Scores((3.0,), "random", "f" * 64, "layers").save(path)
    assert Scores.load(path) == SCORES and names(tmp_path) == ["scores.json"]


def test_states_that_cannot_be_written_leave_those_of_before(tmp_path, monkeypatch):
    save_store(tmp_path, {"a": {"step": 3, "exp_avg": torch.ones(2)}})

    def half(_tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(optimizer_states, "save_file", half)
    with pytest.raises(OSError, match="full"):
        save_store(tmp_path, {"a": {"step": 4}})
    assert load_store(tmp_path)["a"]["step"] == 3 and names(tmp_path) == [optimizer_states.FILE]


def test_a_version_is_told_or_none():
    assert version_of("torch") == torch.__version__ and version_of("no-such-package") is None
    assert files.versions_of(["no-such-package"]) == {"no-such-package": "not installed"}


def test_a_digest_is_of_the_content_alone(tmp_path):
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1, "sha256": "x"}) != digest_of({"a": 2})
    (tmp_path / "a").write_bytes(b"abc")
    found = fingerprint(tmp_path / "a")
    assert found["size"] == 3 and found["sha256"].startswith("ba7816bf") and found == fingerprint(tmp_path / "a", True)


def written(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_header_gives_shapes_and_types_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"b": torch.ones(3, 4), "a": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(0, 2)}
    save_file(tensors, path, {"said": '{"x": 1}'})
    offsets = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    offsets.pop("__metadata__")
    assert header_of(path) == {"b": ((3, 4), "F32"), "a": ((5,), "BF16"), "c": ((0, 2), "F32")}
    order = [n for n in header_of(path) if n != "c"]
    assert order == sorted(order, key=lambda n: offsets[n]["data_offsets"])
    assert note_in(path, "said") == {"x": 1} and note_in(path, "unsaid") == {}
    assert load_file(path).keys() == header_of(path).keys()


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"b": torch.ones(3, 4), "a": torch.ones(5)}, path)
    whole = path.read_bytes()
    for data in (*(whole[:end] for end in range(len(whole))), whole + b"\0"):
        path.write_bytes(data)
        with pytest.raises(ValueError):
            header_of(path)
    with pytest.raises(FileNotFoundError) as caught:
        header_of(tmp_path / "nowhere")
    assert caught.value.strerror == os.strerror(2)


@pytest.mark.parametrize(
    "part",
    [
        {"dtype": "U8", "shape": [4], "data_offsets": [1, 5]},
        {"dtype": "U8", "shape": [5], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]},
        {"dtype": "WAT", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [4]},
        [],
    ],
)
def test_wrong_offsets_shapes_and_types_are_refused(tmp_path, part):
    written(tmp_path / "a", {"a": part}, b"0" * (part["data_offsets"][-1] if "data_offsets" in part else 4))
    with pytest.raises(ValueError):
        header_of(tmp_path / "a")
