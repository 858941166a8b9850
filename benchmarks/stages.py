"""Time of a training step in each stage of a run on clips, as a multiple of a step on still images.

    OMP_NUM_THREADS=1 python benchmarks/stages.py --image-size 64           # any constant of config.py

All kinds of steps are made in turns, in one process, so that a change of the machine's speed affects all alike. Prints
the median of each, and the median and range of its ratio to the step on still images over the turns. Images are random.
"""

import copy
import statistics
import sys
from collections.abc import Callable, Sequence

import numpy as np
import step
import tables
from tables import median_and_range, seconds

import command_line
import data
import dynamics
import joint
import training_step
import update
from command_line import positive

CLIPS, FRAMES = 8, 32


def random_clips(c) -> data.ImageSet:
    """Returns an ImageSet of clips with random images."""
    images = step.random_images(c, CLIPS * FRAMES)
    images.clip_offsets = np.arange(CLIPS + 1) * FRAMES
    images.train_clips, images.held_out_clips = np.arange(CLIPS), np.arange(0)
    return images


def kinds_of_steps(c, device) -> dict[str, Callable]:
    """Returns {name: function that makes a step}."""
    stills = copy.copy(c)
    stills.FOLDERS, c.FOLDERS = "ignore", "clips"
    still_state, still_images, clips = step.new_state(stills, device), step.random_images(stills), random_clips(c)
    states = {stage: step.new_state(c, device) for stage in (1, 2, 3)}
    states[2].counters["images_seen"] = int(1000 * c.VAE_KIMG)
    states[3].counters["images_seen"] = int(1000 * c.DYNAMICS_KIMG)

    def in_stage_2(share):
        def make_step():
            states[2].counters["images_seen"] = int(1000 * (c.VAE_KIMG + share * (c.DYNAMICS_KIMG - c.VAE_KIMG)))
            dynamics.motion_step(states[2], c, clips)
        return make_step

    def in_stage_3(prefix):
        def make_step():
            joint.PREFIXES = (prefix,)
            joint.joint_step(states[3], c, clips)
        return make_step

    return {
        "still images": lambda: training_step.training_step(still_state, stills, still_images),
        "stage 1": lambda: training_step.training_step(states[1], c, clips),
        **{f"stage 2, {count} frames unrolled": in_stage_2(share) for share, count in dynamics.UNROLLING},
        **{f"stage 3, prefix of {prefix}": in_stage_3(prefix) for prefix in joint.PREFIXES}}


def start(argv: Sequence[str] | None) -> None:
    parser = command_line.Parser("stages.py", __doc__)
    parser.add_argument("--repeats", type=positive(int), default=8, metavar="N", help="timed turns [%(default)s]")
    arguments = tables.parse(parser, argv)
    c, _ = command_line.parse_constants(arguments.flags)
    device = command_line.choose_device(c.DEVICE)
    update.set_up(device, c)
    steps = kinds_of_steps(c, device)
    turns = [[seconds(make_step) for make_step in steps.values()] for _ in range(arguments.repeats + 2)][2:]
    print(f"{tables.machine(device)}, batch {c.BATCH_SIZE}, {c.IMAGE_SIZE} px\n\n"
          "| step | seconds | times a step on still images |\n| --- | --- | --- |")
    for name, durations in zip(steps, zip(*turns)):
        ratios = [duration / turn[0] for duration, turn in zip(durations, turns)]
        print(f"| {name} | {statistics.median(durations):.3f} | {median_and_range(ratios)} |")


if __name__ == "__main__":
    sys.exit(command_line.run_script("stages.py", start, None))
