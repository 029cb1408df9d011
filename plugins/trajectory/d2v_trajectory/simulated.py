"""The built-in trajectories: a pendulum pushed left, not at all or right, by policies of differing quality.

Length and strength of the motor differ from episode to episode and are seen only in what follows from an action. The
agents are simple rules with noise, from random to one that swings the pendulum up and holds it. Nothing is downloaded.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from d2v_core.keyed import generator

Array = np.ndarray
Episode = Mapping[str, Array]
NAMES = ("observations", "actions", "rewards")
POLICIES = ("random", "swing up", "spin", "brake", "wrong way")
SECONDS = 0.025  # of a simulated step, four to one of an episode


def episodes(split: str, numbers: Sequence[int], steps: int) -> list[Episode]:
    """observations (steps, 3) float32: cosine and sine of the angle from upright, radians a second; actions (steps, 1)
    int64 of 3; rewards (steps, 1) float32, -1 (hanging or fast) to 1 (upright and still).

    Each follows from split, number and steps alone; they are simulated side by side.
    """
    rngs = [generator(0, "episode", split, number) for number in numbers]
    # Of each: policy; gravity over length, 1 / s^2; motor over that, too weak to lift it in one go; share of random
    # actions; angle and speed at first.
    low, high = [0, 4, 0.25, 0, -np.pi, -2.5], [len(POLICIES), 10, 0.6, 0.25, np.pi, 2.5]
    rule, stiffness, motor, noise, angle, speed = np.array([rng.uniform(low, high) for rng in rngs]).T
    policy, motor = rule.astype(int), stiffness * motor
    luck = np.stack([rng.random((steps, 2)) for rng in rngs], 1)
    whim = np.stack([np.repeat(rng.integers(0, 3, steps), 4)[:steps] for rng in rngs], 1)  # a random one, held
    seen, done, got = [], [], []
    for step in range(steps):
        wanted = _act(policy, angle, speed, stiffness, whim[step])
        action = np.where(luck[step, :, 0] < noise, (luck[step, :, 1] * 3).astype(int), wanted)
        seen.append(np.stack([np.cos(angle), np.sin(angle), speed], 1))
        done.append(action[:, None])
        got.append(np.clip(np.cos(angle) - 0.02 * speed**2, -1, 1)[:, None])
        for _ in range(4):
            speed = speed + (stiffness * np.sin(angle) + motor * (action - 1) - 0.1 * speed) * SECONDS
            angle = angle + speed * SECONDS
    columns = [np.stack(seen, 1).astype(np.float32), np.stack(done, 1), np.stack(got, 1).astype(np.float32)]
    return [dict(zip(NAMES, one, strict=True)) for one in zip(*columns, strict=True)]


def _act(policy: Array, angle: Array, speed: Array, stiffness: Array, whim: Array) -> Array:
    """What each episode's policy wants, 0 to 2: motor to the left, off, to the right."""
    energy = 0.5 * speed**2 + stiffness * (np.cos(angle) - 1)  # 0 = just enough to stand upright
    pump = np.where(speed >= 0, 1, -1)
    lean = np.arctan2(np.sin(angle), np.cos(angle)) + 0.6 * speed / np.sqrt(stiffness)
    hold = np.where(np.abs(lean) > 0.05, -np.sign(lean), 0)
    near = (np.cos(angle) > 0.8) & (np.abs(speed) < 2.5)
    swing_up = np.where(near, hold, np.where(energy < 0, pump, np.where(energy > 1, -pump, 0)))
    return np.choose(policy, [whim - 1, swing_up, pump, -pump * (np.abs(speed) > 0.3), -swing_up]).astype(np.int64) + 1
