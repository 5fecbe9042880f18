"""support/replay.py: what is in the ring, what is drawn from it, and what a resumed run finds in it."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support import replay as module
from support.replay import LAST, Replay


class FakeRun:
    """What a replay memory asks of the run that it belongs to."""

    def __init__(self, folder, restored=None, count=10):
        self.folder, self.restored, self.count = folder, restored, count

    def storing(self):
        return nullcontext()


class Args:
    """Flags, and refusals as exceptions."""

    def __init__(self, folder, buffer_size, resume="", total_timesteps=1000):
        self.runs_dir, self.resume, self.buffer_size = str(folder), resume, buffer_size
        self.total_timesteps = total_timesteps
        self.keep_replay = False

    def require(self, flag, ok, must):
        assert ok, f"--{flag} must {must}"


def memory(folder, capacity, spare=5, restored=None, total=1000):
    found = Replay(Args(folder, capacity, total_timesteps=total), 2, 1, spare)
    found.begin(FakeRun(folder, restored))
    return found


def steps(found, count, lengths=(), truncated=(), begin=0):
    """Adds steps begin to begin + count, observed as (step, episode). `lengths` are those of the episodes but
    for the last, which goes on; in `truncated` are the numbers of those that are cut."""
    ends = np.cumsum(lengths)
    for step in range(begin, begin + count):
        episode = int((ends <= step).sum())
        done = step + 1 in ends
        terminated = float(done and episode not in truncated)
        obs, next_obs = np.float32([step, episode]), np.float32([step + 1, episode])
        found.add(obs, np.float32([10 * step]), next_obs, 0.5 * step, terminated, done)


def stored(found):
    """All steps in the memory, the oldest first."""
    numbers = np.arange(found.first, found.written)
    return found.read(numbers[found.rows["kind"][numbers % found.size] != LAST])


def test_the_last_rows_in_order(tmp_path):
    found = memory(tmp_path, 7)
    for written in range(1, 21):
        steps(found, 1, begin=written - 1)
        expected = np.arange(max(0, written - 7), written)
        obs, actions, rewards, terminated, next_obs = stored(found)
        assert obs[:, 0].tolist() == expected.tolist()
        assert next_obs[:, 0].tolist() == (expected + 1).tolist()
        assert actions[:, 0].tolist() == (10 * expected).tolist() and not terminated.any()
        assert rewards.tolist() == (0.5 * expected).tolist()
    assert found.size == 19  # so that the ring has gone round


def test_ends_of_episodes(tmp_path):
    """The next observation of a last step is that of its own episode, and only termination is one; the row
    that it takes counts as a row of the capacity."""
    found = memory(tmp_path, 12, spare=10)
    lengths = (3, 1, 4, 2)
    for step in range(14):
        steps(found, 1, lengths, truncated={0, 2}, begin=step)
        obs, _, _, terminated, next_obs = stored(found)
        assert (next_obs[:, 1] == obs[:, 1]).all() and (next_obs[:, 0] == obs[:, 0] + 1).all()
        ends = {3: 1.0, 9: 1.0}  # episodes 1 and 3 terminate
        assert terminated.tolist() == [ends.get(int(step), 0.0) for step in obs[:, 0]]
    assert obs[:, 0].tolist() == list(range(4, 14))  # 12 rows, of which two are ends


def test_samples_are_uniform(tmp_path):
    """Chi-square over the steps of a ring that has gone round, with ends of episodes in it."""
    found = memory(tmp_path, 24)
    steps(found, 60, lengths=(7, 5, 11, 2, 2, 9, 6))
    torch.manual_seed(0)
    there = stored(found).obs[:, 0].astype(int)
    drawn = found.sample(100_000).obs[:, 0].astype(int)
    counts = np.array([(drawn == step).sum() for step in there])
    assert counts.sum() == len(drawn) and len(there) < 24
    expected = len(drawn) / len(there)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = len(there) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
    assert found.sample(3).next_obs.shape == (3, 2)


def same(one, other):
    return all((x == y).all() for x, y in zip(one, other))


def test_a_checkpoint_and_the_one_before_it_find_their_rows(tmp_path):
    """Intervals of five rows: after any later row up to the next checkpoint both states can be restored, and
    what is written again is the same file."""
    for further in range(6):
        folder = tmp_path / str(further)
        folder.mkdir()
        found = memory(folder, 7)
        steps(found, 15)
        kept = []
        for begin in (15, 20):
            kept.append((found.state_dict(), stored(found)))
            steps(found, 5 if begin == 15 else further, begin=begin)
        whole = (folder / module.FILE).read_bytes()
        for state, rows in kept[::-1]:
            state = torch.load(save(state, folder), weights_only=True)
            again = memory(folder, 7, restored={"iteration": 3})
            again.load_state_dict(state)
            assert same(stored(again), rows)
        steps(again, 5 + further, begin=15)
        assert (folder / module.FILE).read_bytes() == whole


def save(state, folder):
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


def test_the_ring_is_no_larger_than_the_run(tmp_path):
    """However rare checkpoints are: it has room for a run all of whose steps end an episode, and for one that
    goes on with more steps, also if it was killed after config.json had been told and before the file was."""
    lengths = [1] * 40
    expected = memory(tmp_path, 50, spare=10**9, total=40)
    assert expected.size == 81
    steps(expected, 40, lengths)
    rows, state = stored(expected), expected.state_dict()
    assert len(rows.obs) == 25 and expected.written == 80
    folder = tmp_path / "grows"
    folder.mkdir()
    half = memory(folder, 50, spare=10**9, total=20)
    assert half.size == 41 and (folder / module.FILE).stat().st_size == 41 * half.row.nbytes
    steps(half, 20, lengths)
    restored = {"iteration": 2, "parts": {"replay": half.state_dict()}}
    for total in (20, 40):
        again = memory(folder, 50, spare=10**9, restored=restored, total=total)
        again.load_state_dict(restored["parts"]["replay"])
        assert same(stored(again), stored(half))
    steps(again, 20, lengths, begin=20)
    assert same(stored(again), rows) and again.state_dict() == state
    assert (folder / module.FILE).read_bytes() == (tmp_path / module.FILE).read_bytes()


def test_rows_of_a_step_that_is_done_again_otherwise(tmp_path):
    """An environment that cannot go on in the middle begins another episode: the last step before keeps its
    next observation, although other rows had been written there since."""
    found = memory(tmp_path, 20)
    steps(found, 4)
    state = found.state_dict()
    steps(found, 3, begin=4)
    again = memory(tmp_path, 20, restored={"iteration": 3})
    again.load_state_dict(state)
    again.add(np.float32([50, 9]), np.zeros(1), np.float32([51, 9]), 0.0, 0.0, False)
    obs, _, _, terminated, next_obs = stored(again)
    assert obs.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [50, 9]]
    assert next_obs.tolist() == [[1, 0], [2, 0], [3, 0], [4, 0], [51, 9]] and not terminated.any()


def test_a_file_that_is_missing_or_damaged_is_refused(tmp_path, capsys):
    found = memory(tmp_path, 7)
    steps(found, 3)
    state = found.state_dict()
    (tmp_path / module.FILE).write_bytes(b"0" * (4 * found.row.nbytes - 1))  # the fourth row lacks a byte
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            memory(tmp_path, 7, restored={"iteration": 3, "parts": {"replay": state}})
        assert stop.value.code == 2 and "replay.bin is gone or damaged" in capsys.readouterr().err
        (tmp_path / module.FILE).unlink(missing_ok=True)
    finished = memory(tmp_path, 7, restored={"iteration": 10})  # which needs none
    finished.load_state_dict(state)
    finished.end()
    assert not (tmp_path / module.FILE).exists()


def test_the_file_goes_with_a_finished_run(tmp_path):
    for keep in (True, False):
        found = memory(tmp_path, 7)
        found.args.keep_replay = keep
        steps(found, 3)
        found.end()
        assert (tmp_path / module.FILE).exists() == keep
        (tmp_path / module.FILE).unlink(missing_ok=True)


def test_large_files_are_announced_and_must_fit(tmp_path, monkeypatch, capsys):
    free = SimpleNamespace(free=3 * 10**9)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: free)
    args = Args(tmp_path, 10**8)
    args.total_timesteps = 10**8
    row = (2 + 1 + 2) * 4
    Replay(args, 2, 1, 5)
    err = capsys.readouterr().err
    assert f"{row * 10**8 / 1e9:.1f} GB" in err and err.count("\n") == 1
    args.total_timesteps = 10**6
    Replay(args, 2, 1, 5)
    assert capsys.readouterr().err == ""
    args.total_timesteps, free.free = 10**8, 10**9
    with pytest.raises(AssertionError, match="--buffer_size must be smaller"):
        Replay(args, 2, 1, 5)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_not_overlooked(tmp_path, monkeypatch):
    """A write that comes to less than a row is an error."""
    found = memory(tmp_path, 7)
    monkeypatch.setattr(found, "file", SimpleNamespace(seek=lambda place: place, write=lambda data: 3))
    with pytest.raises(OSError, match="No space left"):
        steps(found, 1)


def test_rows_are_on_the_disk_before_their_number_is(tmp_path, monkeypatch):
    found = memory(tmp_path, 7)
    synced = []
    monkeypatch.setattr(module.os, "fsync", synced.append)
    steps(found, 2)
    assert not synced
    found.state_dict()
    assert synced == [found.file.fileno()]


def test_nothing_is_stored_twice(tmp_path):
    """25 numbers a step on HalfCheetah."""
    found = Replay(Args(tmp_path, 7), 17, 6, 5)
    assert found.row.nbytes == 25 * 4
