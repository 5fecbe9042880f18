"""A film of a page, a small GIF, from a video of a policy.

    python blpo_continuous.py --evaluate RUN --capture-video
    python tools/film.py RUN/videos/NAME.mp4 figures/walker.gif
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from moviepy import VideoFileClip
from PIL import Image  # which matplotlib and moviepy need, too

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.flags import fail, parse_args, shown


@dataclass
class Args:
    video: tyro.conf.Positional[str]
    """the mp4 file"""
    gif: tyro.conf.Positional[str]
    """the file to write"""
    begin: float = 1.0
    """seconds of the video that are left out"""
    seconds: float = 3.0
    """length of the film, or what the video has left"""
    width: int = 240
    """pixels; the height follows"""
    fps: int = 20
    """frames a second"""


def frames(args: Args, step: float) -> list[Image.Image]:
    """Frames of the film, one every `step` seconds, of the same 64 colours."""
    with VideoFileClip(args.video, audio=False) as video:
        end = min(args.begin + args.seconds, video.duration)
        times = np.arange(args.begin, end, step)
        pictures = [Image.fromarray(video.get_frame(time)) for time in times]
    if not pictures:
        fail(f"--begin {args.begin:g} is not before the end of {args.video}, {video.duration:g} s")
    size = args.width, max(1, args.width * pictures[0].height // pictures[0].width)
    small = [picture.resize(size) for picture in pictures]
    palette = Image.fromarray(np.concatenate(small)).quantize(64)
    return [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in small]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse_args(Args, __doc__, argv)
    for name in ("seconds", "width", "fps"):
        if not getattr(args, name) > 0:
            fail(f"--{name} must be above 0, got {getattr(args, name):g}")
    if not 0 <= args.begin < math.inf:
        fail(f"--begin must be at least 0 and finite, got {args.begin:g}")
    if args.fps > 50:
        fail(f"--fps must be at most 50, which is as fast as films are shown, got {args.fps}")
    if not Path(args.video).is_file():
        fail(f"{args.video} is no file")
    delay = 10 * round(100 / args.fps)  # milliseconds: a GIF counts in hundredths of a second
    try:
        first, *others = frames(args, delay / 1000)
        first.save(args.gif, "GIF", save_all=True, append_images=others, duration=delay, loop=0)
    except OSError as problem:  # of moviepy, whose messages have many lines, or of the disk
        fail(f"{args.video} cannot be made into {args.gif}: {shown(problem)[:80]}")


if __name__ == "__main__":
    main()
