"""The replay memory of off-policy methods: the last steps of a run, in a file of its run folder.

The file is a ring of rows, written as steps come and read through a memory map, so that it needs no memory
that other processes could not have, and a checkpoint needs to hold two things only: how many rows there have
been, and the observation that follows them. A row holds an observation and what was done there; the next
observation is that of the next row, so that none is stored twice. After the last step of an episode there is
a row more, with the observation that the episode ended with.

An observation that consists of the last frames of a game is put together when it is read: a row holds the
newest of them, and how many of the rows before it are of the same episode. Where there are too few, the first
frame of the episode stands for those before it.

The ring has room for more than its capacity: the rows of two checkpoint intervals. So long the rows that the
last checkpoint counts on, and those of the one before it, are not written over, and a run that goes on from
either samples the same steps as one that was never killed. It has no more room than the run has rows: then it
never goes round, so that a row has the same place in it when --total-timesteps has grown.
"""

import errno
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from support.flags import Stop, fail, say
from support.run_folder import Run

FILE = "replay.bin"
GIGABYTE = 10**9

# Kinds of rows
STEP = 0  # the next row follows it
TERMINAL = 1  # a step after which no value follows
LAST = 2  # no step, the observation that an episode ended with


class Transitions(NamedTuple):
    """B steps; with segments of L steps each array has the shape (B, L, ...)."""

    obs: np.ndarray  # (B, obs_dim)
    actions: np.ndarray  # (B, action_size), or (B,) numbers of choices
    rewards: np.ndarray  # (B,), those of the environment
    terminated: np.ndarray  # (B,), 1. where no value follows; truncation does not count
    next_obs: np.ndarray  # (B, obs_dim), the true one, also where an episode ended


class Taken(NamedTuple):
    """What was done, in an array of any shape."""

    obs: np.ndarray  # (..., obs_dim)
    actions: np.ndarray  # (..., action_size), or (...,) numbers of choices


def check_memory(args) -> None:
    """Rules between the flags of a script with a replay memory."""
    rows = args.checkpoint_every * args.outer_steps <= 1_000_000_000
    args.require("checkpoint_every", rows, "leave at most 1,000,000,000 steps between checkpoints")
    enough = args.buffer_size >= max(2, args.batch_size)
    args.require("buffer_size", enough, f"hold a batch, {args.batch_size} steps, and 2 rows at least")


class Replay:
    """The last `capacity` rows of one environment: --buffer-size. `spare` is how many rows a checkpoint
    interval may have at most. Observations, each of so many `frames`, are kept in the type obs_type, images
    as the bytes that they are; an action is action_size numbers, or the number of a choice where that is
    0."""

    def __init__(self, args, obs_dim: int, action_size: int, spare: int, obs_type=np.float32, frames=1):
        self.args = args
        self.capacity = args.buffer_size
        self.frames = frames
        self.frame_size = obs_dim // frames
        # Rows of the ring, with that of the next observation, and the frames before the oldest one's; or all
        # rows of the run, in which every step may end an episode
        self.size = min(args.buffer_size + 2 * spare + 1 + frames, 2 * args.total_timesteps + 1)
        action = (np.float32, (action_size,)) if action_size else (np.int32,)
        fields = [("obs", obs_type, (self.frame_size,)), ("action", *action)]
        self.row = np.zeros((), [*fields, ("reward", np.float32), ("kind", np.int16), ("before", np.int16)])
        self.kinds = np.zeros(self.size, np.int16)  # as in the file, where they lie far apart
        self.before = np.zeros(self.size, np.int16)
        self.written = 0  # rows since the run began
        self.age = 0  # how many of the last rows are of the episode that goes on, at most 1,000
        self.next_obs = None  # (obs_dim,), what follows the last row; None where an episode begins
        self.file = None
        self.check_disk()

    def check_disk(self) -> None:
        """Refuses a file that will not fit, and says how large one of more than a gigabyte will be."""
        steps = min(self.args.total_timesteps, self.size)  # with an end of episode now and then
        need = steps * self.row.nbytes
        place = Path(self.args.resume or self.args.runs_dir)
        there = getattr((place / FILE).stat(), "st_blocks", 0) * 512 if (place / FILE).exists() else 0
        free = shutil.disk_usage(place).free + there
        sizes = f"{need / GIGABYTE:.1f} GB for {FILE}, of {free / GIGABYTE:.1f} GB that are free in {place}"
        if need > GIGABYTE:
            say(f"note: the replay memory will take up to {sizes}", error=True)
        self.args.require("buffer_size", need <= free, f"be smaller, or --runs-dir elsewhere: {sizes}")

    def begin(self, run: Run) -> None:
        """Opens the file of a run, which one that goes on must have; a finished run needs none. A file of
        another size is right if all rows so far are in it: that of a run whose --total-timesteps has grown,
        which has not gone round."""
        self.run = run
        path = run.folder / FILE
        there = path.stat().st_size if path.exists() else 0
        whole = self.size * self.row.nbytes
        if run.restored and there != whole:
            if run.restored["iteration"] == run.count and not there:
                return
            if there // self.row.nbytes <= run.restored["parts"]["replay"]["written"]:
                fail(f"--resume {run.folder}: {FILE} is gone or damaged: start a new run")
        with run.storing():
            self.file = open(path, "r+b" if there else "w+b", buffering=0)
            self.file.truncate(whole)  # with a hole where nothing is written yet
            self.rows = np.memmap(path, self.row.dtype, "r", shape=self.size).view(np.ndarray)
        if there:
            self.kinds[:], self.before[:] = self.rows["kind"], self.rows["before"]

    # Writing

    def add(self, obs, action, next_obs, reward, terminated, done) -> None:
        """A step: obs and next_obs (obs_dim,), action (action_size,) or a number, and three numbers; done is
        true where the episode ended, by termination or by truncation."""
        if self.next_obs is not None and not np.array_equal(obs, self.next_obs):
            self.written += 1  # another episode has begun, where a resumed run could not go on with its own
            self.age = 0
        kind = TERMINAL if terminated else STEP
        self.write(0, obs, action, reward, kind)
        self.write(1, next_obs, 0, 0, LAST)  # a step will take its place, unless the episode has ended
        self.written += 2 if done else 1
        self.age = 0 if done else min(self.age + 1, 1000)
        self.next_obs = None if done else np.array(next_obs, np.float32)

    def write(self, ahead: int, obs, action, reward, kind) -> None:
        """The row that is `ahead` rows after the last one."""
        self.row[()] = obs[-self.frame_size :], action, reward, kind, self.age + ahead
        place = (self.written + ahead) % self.size
        self.kinds[place], self.before[place] = kind, self.age + ahead
        with self.run.storing():
            self.file.seek(place * self.row.nbytes)
            if self.file.write(self.row.tobytes()) < self.row.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # Reading

    @property
    def first(self) -> int:
        """The number of the oldest row; rows are numbered as they are written."""
        return max(0, self.written - self.capacity)

    def read(self, numbers) -> Transitions:
        """The steps in the rows of these numbers, an array of any shape."""
        obs, actions = self.taken(numbers)
        terminated = (self.kinds[numbers % self.size] == TERMINAL).astype(np.float32)
        return Transitions(obs, actions, self.rewards(numbers), terminated, self.observations(numbers + 1))

    def taken(self, numbers) -> Taken:
        """What was done there, alone."""
        return Taken(self.observations(numbers), self.rows["action"][numbers % self.size])

    def rewards(self, numbers):
        """Those of the environment, alone."""
        return self.rows["reward"][numbers % self.size]

    def observations(self, numbers):
        """Alone, (..., obs_dim)."""
        if self.frames == 1:
            return self.rows["obs"][numbers % self.size]
        before = self.before[numbers % self.size][..., None]
        back = np.minimum(before, np.arange(self.frames)[::-1])
        found = self.rows["obs"][(numbers[..., None] - back) % self.size]
        return found.reshape(*numbers.shape, self.frames * self.frame_size)

    def sample(self, count: int) -> Transitions:
        """Steps, each as likely as any other, drawn with replacement by PyTorch's generator."""
        numbers = self.first + torch.randint(self.written - self.first, (count,)).numpy()
        while (wrong := ~self.is_step(numbers)).any():
            again = torch.randint(self.written - self.first, (int(wrong.sum()),))
            numbers[wrong] = self.first + again.numpy()
        return self.read(numbers)

    def recent(self, count: int):
        """The numbers of the last steps, at most as many as `count`, in order."""
        numbers = np.arange(max(self.first, self.written - 2 * count), self.written)
        return numbers[self.is_step(numbers)][-count:]

    def is_step(self, numbers):
        return self.kinds[numbers % self.size] != LAST

    def terminates(self) -> bool:
        """Whether an episode has."""
        return bool((self.kinds[np.arange(self.first, self.written) % self.size] == TERMINAL).any())

    def segments(self, begin: int, length: int, shape: tuple[int, ...], generator: torch.Generator, end=None):
        """Segments of `length` steps, each inside one episode, from the row `begin` on, and before the row
        `end` if it is given, each as likely as any other: the numbers of their first rows, in an array of
        this shape. There are none, (0, ...), where all episodes there are shorter; where all in the memory
        are, the run ends."""
        starts = self.starts(begin, length, end)
        if not len(starts):
            return np.zeros((0, *shape[1:]), int)
        return starts[torch.randint(len(starts), shape, generator=generator).numpy()]

    def starts(self, begin: int, length: int, end=None):
        """The first rows of all such segments, in order."""
        whole = begin <= self.first and end is None
        numbers = np.arange(max(begin, self.first), self.written if end is None else end)
        ends = np.concatenate([[0], np.cumsum(~self.is_step(numbers))])  # before each of the rows
        starts = numbers[: max(0, len(numbers) - length + 1)][ends[length:] == ends[:-length]]
        if not len(starts) and whole:
            longest = np.bincount(ends[1:][self.is_step(numbers)]).max()
            what = f"--segment {length} is longer than any episode, of {longest} steps at most"
            raise Stop(f"{what}: lower it", status=2)
        return starts

    # Checkpoints, which are written after the rows that they count on are on the disk

    def state_dict(self) -> dict:
        if self.file is not None:
            with self.run.storing():
                os.fsync(self.file.fileno())
        next_obs = None if self.next_obs is None else torch.as_tensor(self.next_obs)
        return {"written": self.written, "age": self.age, "next_obs": next_obs}

    def load_state_dict(self, state: dict) -> None:
        """Rows that were written after the checkpoint do not count: they will be written again."""
        self.written, self.age = state["written"], state["age"]
        self.next_obs = None
        if state["next_obs"] is not None:
            self.next_obs = state["next_obs"].numpy()
            if self.file is not None:
                self.write(0, self.next_obs, 0, 0, LAST)

    def end(self) -> None:
        """Closes the file, which goes with the end of a finished run unless --keep-replay."""
        if self.file is not None:
            self.file.close()
            self.file = None
            if not self.args.keep_replay:
                with self.run.storing():
                    (self.run.folder / FILE).unlink(missing_ok=True)
