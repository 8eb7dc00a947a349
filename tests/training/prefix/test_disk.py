"""States on disk: shared by processes, whole after any kill, within a limit; what goes wrong there costs speed alone."""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import os
import pickle
import random
import resource
import shutil
import signal
import stat
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash

from layerpeft.training.prefix import disk, folders, journals
from layerpeft.training.prefix.disk import Disk
from layerpeft.training.prefix.folders import BELONGS, DATA, JOURNAL, LOCK, USED, Handle, locked

BASE = {"weights": "a", "cut": "model.layers.3", "dtype": "torch.bfloat16"}
WIDTH = 16


def key(number: int) -> bytes:
    return xxhash.xxh3_128_digest(str(number).encode())


def state(number: int) -> torch.Tensor:
    """That of a row, which its number says: of 1 to 9 tokens, in three types."""
    kind = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
    draw = torch.Generator().manual_seed(number)
    return torch.randn(1 + number % 9, WIDTH, generator=draw).to(kind)


def fill(store: Disk, numbers: range) -> Disk:
    for number in numbers:
        store.put(key(number), state(number))
    store.flush()
    return store


def found(store: Disk, numbers: range) -> list[int]:
    """The rows that are there, which are right to the bit."""
    there = []
    for number in numbers:
        if (states := store.get([key(number)])) is not None:
            assert states[0].dtype == state(number).dtype and torch.equal(states[0], state(number)), number
            there.append(number)
    return there


def total(root: Path) -> int:
    return sum(f.stat().st_size for f in root.rglob("*") if f.is_file())


def files(root: Path, kind: str) -> list[Path]:
    return sorted(root.rglob(f"*{kind}"))


def child(act: Callable[[], object]) -> int:
    """Runs something in a process of its own, which ends with 0 if it is true; its id."""
    pid = os.fork()
    if not pid:
        try:
            os._exit(int(not act()))
        except BaseException:
            traceback.print_exc()
        os._exit(2)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(disk, "note", lines.append)
    return lines


def test_states_come_back_from_what_waits_and_from_the_folder_in_any_process(tmp_path, said):
    root = tmp_path / "new" / "root"
    threads = threading.active_count()
    store, other = Disk(root, BASE), Disk(root, BASE)
    assert not store.has(key(0)) and store.get([key(0)]) is None and store.rows == store.size == 0
    assert threading.active_count() == threads and not root.exists()  # nothing is made before something is kept
    with locked(root):  # nobody writes
        for number in range(40):
            store.put(key(number), state(number))
            store.put(key(number), state(number + 1))  # what is kept stays
        assert found(store, range(41)) == list(range(40)) and store.rows == 40
        assert not other.has(key(3))
    store.flush()
    assert found(store, range(41)) == found(other, range(41)) == list(range(40))
    assert store.rows == other.rows == 40 and store.size == total(root)
    assert store.get([key(1), key(99)]) is None and store.get([]) == []
    assert ended(child(lambda: len(found(fill(Disk(root, BASE), range(40, 50)), range(50))) == 50)) == 0
    assert found(store, range(50)) == found(other, range(50)) == list(range(50))
    other.ahead([key(number) for number in (1, 2, 77)])
    assert json.loads((store.folder / BELONGS).read_text()).items() >= BASE.items()
    for apart in (Disk(root, BASE | {"weights": "b"}), Disk(root, BASE, bits=8)):
        assert apart.folder != store.folder and not apart.has(key(0))
    store.close()
    assert store.get([key(0)]) is None and not store.has(key(0))
    store.put(key(60), state(60))
    assert not Disk(root, BASE).has(key(60)) and not said


def test_eight_bits_are_the_same_while_they_wait_and_after(tmp_path):
    store = Disk(tmp_path, BASE, bits=8)
    with locked(tmp_path):
        store.put(key(1), state(1))
        waiting = store.get([key(1)])
    store.flush()
    written = Disk(tmp_path, BASE, bits=8).get([key(1)])
    assert waiting is not None and written is not None and torch.equal(waiting[0], written[0])
    assert not torch.equal(written[0], state(1))
    assert torch.allclose(written[0].float(), state(1).float(), atol=0.02)


def test_copies_of_a_model_share_it_and_forks_have_their_own_writer(tmp_path):
    store = fill(Disk(tmp_path, BASE, limit=10**6, bits=None), range(5))
    assert copy.deepcopy({"a": store})["a"] is store
    again = pickle.loads(pickle.dumps(store))
    assert found(again, range(5)) == list(range(5)) and again.limit == 10**6
    with locked(tmp_path):
        store.put(key(5), state(5))  # waits while the process forks
        pid = child(lambda: len(found(fill(store, range(6, 9)), range(9))) >= 8)
    assert ended(pid) == 0
    store.flush()
    assert found(store, range(9)) == list(range(9)) and len(files(tmp_path, JOURNAL)) == 2
    until = time.monotonic() + 5
    while any(thread.name == "layerpeft-prefix" for thread in threading.enumerate()):
        assert time.monotonic() < until, "the writer stays though nothing waits"
        time.sleep(0.02)
    assert found(fill(store, range(9, 12)), range(12)) == list(range(12))


def test_a_lock_ends_with_its_process_whoever_it_has_forked(tmp_path):
    reading, writing = os.pipe()

    def dies() -> None:
        with locked(tmp_path):
            child(lambda: os.close(writing) or os.read(reading, 1))
            os.kill(os.getpid(), signal.SIGKILL)

    assert ended(child(dies)) == -signal.SIGKILL
    time.sleep(0.05)
    handle = Handle(tmp_path / LOCK, os.O_RDWR)
    fcntl.flock(handle.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(writing)
    os.close(reading)


def killed(root: Path, numbers: range, draw: random.Random) -> None:
    """A process writes, and is killed: at some time, or in the middle of a write, with a part of its bytes written."""
    calls, whole, late = draw.randint(1, 2 * len(numbers)), Handle.write, draw.random() < 0.3

    def write(self: Handle, data: memoryview, offset: int) -> None:
        nonlocal calls
        calls -= 1
        if not calls and not late:
            whole(self, data[: draw.randint(0, len(data))], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, data, offset)

    def act() -> bool:
        Handle.write = write  # type: ignore[method-assign]
        store = Disk(root, BASE)
        for number in numbers:
            store.put(key(number), state(number))
            if number % 7 == 0:
                store.flush()
        return not store.flush()

    pid = child(act)
    if late:
        time.sleep(draw.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
    ended(pid)


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_after_every_kill_what_is_found_is_right_and_stays(tmp_path, kills):
    draw, rows, before = random.Random(kills), range(150), set()
    for _ in range(kills):
        killed(tmp_path, rows, draw)
        there = set(found(Disk(tmp_path, BASE), rows))
        assert there >= before
        before = there
    assert len(before) > 0
    store = fill(Disk(tmp_path, BASE), rows)
    assert found(store, rows) == found(Disk(tmp_path, BASE), rows) == list(rows)


def test_processes_that_fill_one_folder_at_once_write_each_row_once(tmp_path):
    rows = range(200)

    def act(seed: int) -> bool:
        store, numbers = Disk(tmp_path, BASE), list(rows)
        random.Random(seed).shuffle(numbers)
        for number in numbers:
            found(store, range(number, number + 1))
            store.put(key(number), state(number))
        store.close()
        return True

    assert [ended(pid) for pid in [child(lambda seed=seed: act(seed)) for seed in range(3)]] == [0, 0, 0]
    store = Disk(tmp_path, BASE)
    assert found(store, rows) == list(rows) and store.rows == len(rows)
    assert sum(f.stat().st_size for f in files(tmp_path, DATA)) == sum(state(n).nbytes for n in rows)


def test_what_is_made_between_two_looks_is_not_held_for_reading_alone(tmp_path, monkeypatch):
    real, path = os.open, tmp_path / USED

    def late(name, flags, *more):
        if path.exists():
            return real(name, flags, *more)
        path.write_bytes(bytes(8))
        raise FileNotFoundError(errno.ENOENT, "not there yet", str(name))

    monkeypatch.setattr(os, "open", late)
    with pytest.raises(FileNotFoundError):
        Handle(path, os.O_RDWR, os.O_RDONLY)
    assert os.pwrite(Handle(path, os.O_RDWR, os.O_RDONLY).fd, b"1", 0) == 1


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "bits of the data": lambda data, _: flip(data, 70),
    "bits of the journal": lambda _, journal: flip(journal, 64 * 3 + 30),
    "its key": lambda _, journal: flip(journal, 64 * 5 + 2),
    "data cut short": lambda data, _: os.truncate(data, data.stat().st_size // 2),
    "journal cut short": lambda _, journal: os.truncate(journal, journal.stat().st_size // 2 - 7),
    "no data": lambda data, _: data.unlink(),
    "no journal": lambda _, journal: journal.unlink(),
}


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def test_what_is_damaged_is_missing_and_can_be_put_again(tmp_path, said):
    rows = range(12)
    for number, (name, damage) in enumerate(DAMAGES.items()):
        for known in (False, True):  # whether the entries were known before
            root = tmp_path / f"{number} {known}"
            fill(Disk(root, BASE), rows).close()
            store = Disk(root, BASE)
            assert not known or store.rows == 12
            if known and name == "no journal":
                continue  # it is open, and goes on being read
            damage(*files(root, DATA), *files(root, JOURNAL))
            if known and name == "its key":
                assert store.get([key(n) for n in rows]) is None, name
            there = found(store, rows)
            assert len(there) < 12 and (len(there) == 11 or "no" in name or "cut" in name), (name, known)
            missing = [n for n in rows if not store.has(key(n))]
            assert sorted(there + missing) == list(rows), (name, known)
            fill(store, rows)
            assert found(store, rows) == found(Disk(root, BASE), rows) == list(rows), (name, known)
    assert len(said) <= 2 * len(DAMAGES) and any("damaged" in line for line in said)


def test_the_root_stays_within_its_limit_and_unused_folders_go_first(tmp_path, said):
    limit, stores = 9000, {}
    for number, name in enumerate("abc"):
        store = fill(Disk(tmp_path, {"weights": name}, limit), range(6))
        assert store.rows == 6
        stores[name] = store
        os.utime(store.folder / USED, (number, number))
    own = stores["c"].size
    (tmp_path / ("f" * 32)).mkdir()
    strangers = [tmp_path / ("f" * 32) / f"mine{DATA}", tmp_path / "notes.txt"]
    for file in strangers:
        file.write_bytes(bytes(10))
    assert 3 * own < limit - 300
    stores["b"].close()
    tight = total(tmp_path) + own // 2
    new = fill(Disk(tmp_path, {"weights": "d"}, tight), range(6))
    assert new.rows == 6 and total(tmp_path) <= tight + 20  # what is not ours does not count
    assert not stores["b"].folder.exists()  # the only one that nobody uses, though `a` is older
    assert found(stores["a"], range(6)) == found(stores["c"], range(6)) == list(range(6)) and not said
    for first in range(6, 200, 10):
        fill(new, range(first, first + 10))
        assert total(tmp_path) <= tight + 20
    assert 6 < new.rows < 200 and [line for line in said if "is full" in line] == said and len(said) == 1
    assert len(found(new, range(200))) == new.rows
    for name in "ac":
        stores[name].close()
    for name, last in (("a", 9), ("c", 3)):
        os.utime(stores[name].folder / USED, (last, last))
    fill(new, range(200, 204))
    assert not stores["c"].folder.exists() and stores["a"].folder.exists()  # one was enough, the longest unused
    nothing = fill(Disk(tmp_path, {"weights": "e"}, 100), range(3))
    assert nothing.rows == 0 and not nothing.folder.exists() and all(file.exists() for file in strangers)
    assert stores["a"].folder.exists()  # what would not help does not go


def test_without_a_limit_half_of_what_is_free_is_left(tmp_path, monkeypatch):
    for name in ("LAYERPEFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/x")
    assert folders.default_root() == Path("/home/x/.cache/layerpeft/prefix")
    monkeypatch.setenv("XDG_CACHE_HOME", "/y")
    assert folders.default_root() == Path("/y/layerpeft/prefix")
    monkeypatch.setenv("LAYERPEFT_CACHE", "/z")
    assert folders.default_root() == Path("/z/prefix")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4000 - total(tmp_path)))
    for _ in range(3):  # the same for later runs
        fill(Disk(tmp_path, BASE), range(40))
        assert 1500 < total(tmp_path) <= 2000


def test_a_writer_that_lags_drops_and_never_blocks(tmp_path, said, monkeypatch):
    monkeypatch.setattr(disk, "WAITING", 3 * state(8).nbytes)
    store = Disk(tmp_path, BASE)
    with locked(tmp_path):  # a disk that does not answer
        for number in range(50):
            store.put(key(8 + 9 * number), state(8 + 9 * number))
        assert sum(s.nbytes for s in store._waiting.values()) <= disk.WAITING and 3 <= store.rows < 10
    store.flush()
    assert store.rows == Disk(tmp_path, BASE).rows >= 3 and len(said) == 1 and "more slowly" in said[0]
    store.put(key(1), torch.zeros(9, 10 * WIDTH))  # larger than all that may wait, and nothing waits
    store.flush()
    assert store.has(key(1))


def test_few_files_are_open_whatever_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr(journals, "OPEN", 3)
    for first in range(0, 60, 5):
        fill(Disk(tmp_path, BASE), range(first, first + 5)).close()
    before, store = len(os.listdir("/proc/self/fd")), Disk(tmp_path, BASE)
    assert len(files(tmp_path, JOURNAL)) == 12 and found(store, range(60)) == list(range(60))
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    store.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_full_disk_costs_speed_alone(tmp_path, said):
    def act() -> bool:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))
        store = Disk(tmp_path, BASE)
        with locked(tmp_path):
            for number in range(60):
                store.put(key(number), state(number))
        for first in range(0, 60, 3):
            fill(store, range(first, first + 3))
        there = found(store, range(60))
        assert there[:5] == list(range(5)) and len(there) < 12, there  # as many as there is room for
        assert len(said) == 1 and "File too large" in said[0], said
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        return found(fill(store, range(60)), range(60)) == list(range(60)) and len(said) == 1  # there is room again

    assert ended(child(act)) == 0
    assert found(Disk(tmp_path, BASE), range(60)) == list(range(60))


def test_where_a_disk_is_full_what_nobody_uses_makes_room(tmp_path, said, monkeypatch):
    for name in "ab":
        fill(Disk(tmp_path, {"weights": name}), range(20)).close()
    whole, most = Handle.write, total(tmp_path) + 500

    def write(self: Handle, data: memoryview, offset: int) -> None:
        if total(tmp_path) + len(data) > most:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, data, offset)

    monkeypatch.setattr(Handle, "write", write)
    store = fill(Disk(tmp_path, BASE), range(12))
    assert store.rows < 12
    assert found(fill(store, range(12)), range(12)) == list(range(12))
    assert len(said) == 1 and "No space left" in said[0]
    assert len(list(tmp_path.glob(f"*/{USED}"))) == 2  # one of the two was enough


def test_a_folder_is_as_old_as_its_last_use(tmp_path):
    store = fill(Disk(tmp_path, BASE), range(2))
    os.utime(store.folder / USED, (5, 5))
    reader = Disk(tmp_path, BASE, pinned=True)  # pinned where it can be
    assert found(reader, range(2)) == [0, 1]
    assert (store.folder / USED).stat().st_mtime > 5
    os.utime(store.folder / USED, (5, 5))
    reader.close()
    assert (store.folder / USED).stat().st_mtime > 5


def test_what_cannot_be_written_or_was_removed_costs_speed_alone(tmp_path, said):
    (tmp_path / "file").touch()
    nowhere = fill(Disk(tmp_path / "file" / "root", BASE), range(9))
    assert nowhere.get([key(1)]) is None and nowhere.rows == nowhere.size == 0
    assert said and all("file/root cannot be" in line for line in said) and len(set(said)) == len(said) <= 2
    said.clear()
    store = fill(Disk(tmp_path / "a", BASE), range(9))
    shutil.rmtree(tmp_path / "a")
    assert store.get([key(20)]) is None and not said
    fill(store, range(9, 15))
    assert found(store, range(9, 15)) == found(Disk(tmp_path / "a", BASE), range(15)) == list(range(9, 15))
    assert len(said) == 1 and "was removed" in said[0]


def test_a_folder_that_is_read_only_is_read(said):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        fill(Disk(root, BASE), range(9))
        for path in (*root.rglob("*"), root):
            path.chmod(stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH | (0o111 if path.is_dir() else 0))

        def act() -> bool:
            if os.geteuid() == 0:
                os.seteuid(65534)
            store = fill(Disk(root, BASE), range(20))
            return found(store, range(20)) == list(range(9)) and len(said) == 1 and "Permission denied" in said[0]

        assert ended(child(act)) == 0
        for path in (root, *root.rglob("*")):
            path.chmod(0o755)
