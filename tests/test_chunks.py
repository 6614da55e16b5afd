"""Chunks of work that processes share through a folder: each is done, whoever dies; what is damaged is made again."""

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest

from fitscale.config.errors import UserError
from fitscale.run import chunks
from fitscale.run.chunks import ChunkFolder, DamagedChunkError, chunk_progress
from tests.waiting import wait_until

ABOUT = {"step": 7, "what": "samples"}
ROUNDS = 50


@pytest.fixture
def folder(tmp_path) -> ChunkFolder:
    made = ChunkFolder(tmp_path / "evaluation" / "one", 6)
    made.open(ABOUT)
    return made


def squares(number: int) -> dict[str, np.ndarray]:
    return {"squares": np.arange(number + 1, dtype=np.float64) ** 2}


def nothing(finished: int) -> None:
    pass


def names(folder: ChunkFolder) -> list[str]:
    return sorted(path.name for path in folder.path.iterdir() if path.name != chunks.LOCK)


def test_one_process_does_all_and_leaves_results_alone(folder):
    shown: list[int] = []
    folder.work(squares, shown.append)
    assert shown == [*range(7)] and folder.unfinished() == []
    assert names(folder) == [*(f"chunk-{i:06d}.npz" for i in range(6)), "chunks.json"]
    assert np.array_equal(folder.read(5)["squares"], np.arange(6.0) ** 2)
    folder.clear()
    assert not folder.path.exists() and not folder.exists


def begin_and_hang(path: Path, number: int) -> None:
    def compute(number: int) -> dict[str, np.ndarray]:
        (path / "begun").write_text(str(number))
        signal.pause()
        raise AssertionError

    ChunkFolder(path, 6).work(compute, nothing)


def test_what_a_killed_process_began_another_does(folder):
    process = multiprocessing.get_context("fork").Process(target=begin_and_hang, args=(folder.path, 0))
    process.start()
    wait_until(lambda: (folder.path / "begun").exists(), "a chunk to be begun")
    with folder.claimed("chunk-000000") as mine:
        assert not mine
    assert folder.unfinished() == [0, 1, 2, 3, 4, 5]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    folder.work(squares, nothing)
    assert folder.unfinished() == []


def take_over(path: Path, ready, taken) -> None:
    """In a process of its own: take every void claim, all processes the same one at a time."""
    for number in range(ROUNDS):
        ready.wait()
        if chunks._take(path / f"{number}.claim"):
            taken.put(number)


def test_of_all_who_see_that_a_claim_is_void_one_takes_it_over(folder):
    context = multiprocessing.get_context("fork")
    ready, taken = context.Barrier(6), context.Queue()
    for number in range(ROUNDS):
        claim = folder.path / f"{number}.claim"
        claim.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
        os.utime(claim, (0, 0))
    processes = [context.Process(target=take_over, args=(folder.path, ready, taken)) for _ in range(6)]
    for process in processes:
        process.start()
    numbers = sorted(taken.get() for _ in range(ROUNDS))
    for process in processes:
        process.join()
    assert numbers == [*range(ROUNDS)] and taken.empty()


def test_a_claim_of_another_host_counts_until_its_lease_is_over(folder):
    claim = folder.path / "chunk-000002.claim"
    claim.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with folder.claimed("chunk-000002") as mine:
        assert not mine
    os.utime(claim, (0, 0))
    with folder.claimed("chunk-000002") as mine:
        assert mine and json.loads(claim.read_text()) == {"host": socket.gethostname(), "pid": os.getpid()}
    assert not claim.exists()


def test_a_claim_is_renewed_while_its_work_lasts(folder, monkeypatch):
    monkeypatch.setattr(chunks, "RENEW_S", 0.01)
    claim = folder.path / "chunk-000001.claim"
    with folder.claimed("chunk-000001"):
        os.utime(claim, (0, 0))
        wait_until(lambda: claim.stat().st_mtime > 1, "the claim to be renewed")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"host": 5, "pid": "x"}', b"[" * 100_000])
def test_a_claim_that_says_nothing_counts_until_its_lease_is_over(folder, content):
    claim = folder.path / "chunk-000003.claim"
    claim.write_bytes(content)
    with folder.claimed("chunk-000003") as mine:
        assert not mine
    os.utime(claim, (0, 0))
    with folder.claimed("chunk-000003") as mine:
        assert mine


@pytest.mark.parametrize("place", [0, 30, 200, -1])
def test_a_damaged_chunk_is_named_kept_aside_and_made_again(folder, place):
    folder.work(squares, nothing)
    file = folder.file(4)
    whole = file.read_bytes()
    for damaged in (whole[:place], bytes([*whole[:-60]]), b""):
        file.write_bytes(damaged)
        with pytest.raises(DamagedChunkError, match=r"chunk-000004\.npz: damaged \(.*kept as chunk-000004\.damaged"):
            folder.read(4)
        assert folder.unfinished() == [4] and (folder.path / "chunk-000004.damaged").exists()
        folder.work(squares, nothing)
        assert file.read_bytes() == whole, "a chunk is the same bytes whenever it is made"


def test_a_flipped_number_is_noticed(folder):
    folder.work(squares, nothing)
    file = folder.file(5)
    data = bytearray(file.read_bytes())
    at = data.index(np.float64(16.0).tobytes())
    data[at + 7] ^= 0x40
    file.write_bytes(bytes(data))
    with pytest.raises(DamagedChunkError, match="CRC"):
        folder.read(5)


def test_a_full_disk_is_told_and_what_is_there_stays(folder, monkeypatch):
    def full(*args: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    folder.write(0, squares(0))
    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", full)
        with pytest.raises(UserError, match=r"chunk-000001\.npz: cannot be written \(No space left on device\)"):
            folder.work(squares, nothing)
    assert names(folder) == ["chunk-000000.npz", "chunks.json"], "no claim and no temporary file is left"
    folder.work(squares, nothing)
    assert folder.unfinished() == []


def test_a_folder_that_was_cleared_away_is_not_made_anew(folder):
    def slow(number: int) -> dict[str, np.ndarray]:
        folder.clear()
        return squares(number)

    folder.work(slow, nothing)
    assert not folder.path.exists()


def test_progress_is_seen_from_outside(folder, tmp_path):
    folder.write(3, squares(3))
    (found,) = chunk_progress(tmp_path / "evaluation")
    assert (found.step, found.what, found.done, found.count) == (7, "samples", 1, 6)
    (tmp_path / "evaluation" / "broken").mkdir()
    (tmp_path / "evaluation" / "broken" / "chunks.json").write_text("[]")
    assert len(chunk_progress(tmp_path / "evaluation")) == 1
    assert chunk_progress(tmp_path / "none") == []


def work_until_done(path: Path, done: Path) -> None:
    def compute(number: int) -> dict[str, np.ndarray]:
        with open(done, "a") as file:
            file.write(f"{number}\n")
        return squares(number)

    ChunkFolder(path, 40).work(compute, nothing)


def test_processes_share_the_chunks_and_each_is_done_once(tmp_path):
    many = ChunkFolder(tmp_path / "many", 40)
    many.open(ABOUT)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work_until_done, args=(many.path, tmp_path / "done")) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sorted(int(line) for line in (tmp_path / "done").read_text().split()) == list(range(40))
