"""Promises of the masking policy."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch leaves much of what is used here untyped.
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from d2v_core.contract import (
    Layout,
    Masks,
    StatesShare,
)
from d2v_core.keyed import generator
from d2v_core.promises.case import (
    Broken,
    Case,
    form,
)

NUM_DRAWS = 400  # of a mask, for its mean share


def masks(case: Case) -> str:
    """Masks avoid padding, ask for something in every sample, leave something visible, and repeat for a seed.

    A hidden token that is padding teaches nothing; a sample without a scored one wastes its step; a mask that cannot
    be repeated cannot be resumed.
    """
    real = case.mini.layouts
    sets = [real, real[:1]]
    if all(len(layout.shape) == 1 and layout.maskable is None for layout in real):
        sets += [[Layout((size,)) for size in (real[0].num_tokens, 2, 5)], [Layout((3,))]]
    alike = 0
    copies_alike = 0
    draws = [(layouts, seed) for layouts in sets for seed in range(20)]
    for layouts, seed in draws:
        one, again, other = (case.masks(layouts, 3, s) for s in (seed, seed, seed + 1000))
        _check_masks(layouts, one)
        if not _equal_masks(one, again):
            raise Broken(
                "Two masks drawn with the same generators differ. Draw from the generators that the policy is given, "
                "one per sample, and from nothing else."
            )
        alike += torch.equal(one.scored, other.scored)
        copies_alike += torch.equal(one.scored[:, 0], one.scored[:, 1])
    if alike == len(draws):
        raise Broken("Masks are the same for every seed: the policy does not use the generators that it is given.")
    if copies_alike == len(draws):
        raise Broken("All masked copies of a sample are alike. Draw one mask for each of num_copies.")
    return f"{len(draws)} batches of 3 masked copies"


def _check_masks(layouts: Sequence[Layout], masks: Masks) -> None:
    longest = max(layout.num_tokens for layout in layouts)
    expected = (len(layouts), 3, longest)
    for name, value in (("hidden", masks.hidden), ("scored", masks.scored), ("fill", masks.fill)):
        kind = torch.int64 if name == "fill" else torch.bool
        if value is not None and (value.shape != expected or value.dtype != kind):
            raise Broken(f"Masks.{name} is {form(value)}; expected {expected} {kind}: samples, copies, tokens.")
    if not torch.equal(masks.scored_rows, masks.scored.flatten().nonzero().squeeze(1)):
        raise Broken("Masks.scored_rows does not list the True places of Masks.scored. Make masks with Masks.of(...).")
    for row, layout in enumerate(layouts):
        size = layout.num_tokens
        for name, value in (("hides", masks.hidden), ("scores", masks.scored)):
            if value[row, :, size:].any():
                raise Broken(
                    f"The policy {name} padding: a sample of {size} tokens stands in a batch of {longest}, and places "
                    f"from {size} on are not its own. Draw each mask over its layout.num_tokens."
                )
        if layout.maskable is not None and masks.hidden[row][:, :size][:, ~torch.as_tensor(layout.maskable)].any():
            raise Broken("The policy hides tokens that layout.maskable rules out.")
        if not masks.scored[row].any(-1).all():
            raise Broken(
                f"A sample of {size} tokens has none that is scored, so nothing is learnt from it. Score at least one, "
                "however short the sample."
            )
        if size > 1 and masks.hidden[row, :, :size].all(-1).any():
            raise Broken(
                f"All {size} tokens of a sample are hidden: there is nothing left to predict them from. Leave at least "
                "one."
            )
        if masks.visible is not None:
            _check_visible(masks, row, size)


def _check_visible(masks: Masks, row: int, size: int) -> None:
    assert masks.visible is not None
    for hidden, visible in zip(masks.hidden[row], masks.visible[row], strict=True):
        given = visible.tolist()
        if len(set(given)) < len(given):
            raise Broken("Masks.visible names a place twice in one row.")
        shown = {place for place in given if place < size}
        meant = set((~hidden[:size]).nonzero().flatten().tolist())
        if size > 1 and shown - meant:
            raise Broken(
                f"Masks.visible shows the student places that are hidden, such as {min(shown - meant)}. Rows with "
                "fewer visible tokens are filled up with padding, never with what is hidden."
            )
        if meant - shown:
            raise Broken(f"Masks.visible leaves out places that are not hidden, such as {min(meant - shown)}.")


def _equal_masks(one: Masks, two: Masks) -> bool:
    pairs = [(getattr(one, f.name), getattr(two, f.name)) for f in dataclasses.fields(Masks)]
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def share(case: Case) -> str:
    """As many tokens are hidden as the policy says.

    The share that is hidden decides how hard the task is; a policy that states it (`hidden_share`) is held to it.
    """
    layout = case.mini.layouts[1]
    shares = np.array([
        float(case.policy([layout], 1, [generator(seed, "share")]).hidden.sum()) / layout.num_tokens
        for seed in range(NUM_DRAWS)
    ])  # fmt: skip
    mean, error = float(shares.mean()), float(shares.std()) / math.sqrt(NUM_DRAWS)
    measured = f"{100 * mean:.1f} % of {layout.num_tokens} tokens"
    if not isinstance(case.policy, StatesShare):
        return f"{measured}; the policy states nothing (hidden_share)"
    low, high = case.policy.hidden_share(layout)
    if not low - 4 * error - 1e-9 <= mean <= high + 4 * error + 1e-9:
        raise Broken(
            f"The policy states that {100 * low:.1f} to {100 * high:.1f} % of {layout.num_tokens} tokens are hidden, "
            f"but the mean over {NUM_DRAWS} masks is {100 * mean:.1f} % (standard error {100 * error:.2f}). Either the "
            "masks or hidden_share() are not what was meant."
        )
    return f"{measured}, stated {100 * low:.1f}" + (f" to {100 * high:.1f}" if high > low else "")
