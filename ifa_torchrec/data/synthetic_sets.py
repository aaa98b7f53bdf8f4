"""Users who pick from the set that they are shown, with a known ground truth.

What the option `relations` adds to the recipe of the synthetic log:

- `SHOWN` of the candidates of a request are shown, by a noisy and biased logging policy. It draws them
  one by one with probability proportional to exp(policy logit), which grows with the pull of the topic
  and with the policy's own preference for some topics, whatever the user wants.
- The policy orders the shown items by a second such draw. Attention falls by the factor `ATTENTION` per
  place. A user sees the set as a whole, and picks the item in place i with the probability
  attention(i) sigmoid(bias + strength pull - DUPLICATE near-duplicates + COMPLEMENT complements).
  Near-duplicates are the other items of the set with the same topic, complements those with the partner
  topic (0 and 1 are partners, 2 and 3, and so on). Near-duplicates lower each other's probability,
  complements raise it.
- Labels are what was picked; items that were not shown have no label, in any split.

The relations are our own, and as simple as possible: symmetric, pairwise, and the same for all topics.
So the best set and the best possible scores can be computed.
"""

from __future__ import annotations

import numpy as np

SHOWN = 10
ATTENTION = 0.95
DUPLICATE, COMPLEMENT = 0.7, 0.4
_TILT, _LIKING = 1.0, 0.7
"""The policy's weights of the pull of a topic and of its own preferences."""


def set_logits(logit: np.ndarray, topic: np.ndarray) -> np.ndarray:
    """The logits of the items of sets, given the other items of the set.

    Args:
        logit: [..., k], the logit of each item on its own.
        topic: [..., k] integers.

    Returns:
        [..., k].

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.synthetic_sets import set_logits
        >>> set_logits(np.zeros(4), np.array([0, 0, 1, 5])).round(1).tolist()  # 0 and 1 are partners
        [-0.3, -0.3, 0.8, 0.0]
    """
    of_others = topic[..., None, :]
    duplicates = (topic[..., None] == of_others).sum(-1) - 1
    complements = ((topic ^ 1)[..., None] == of_others).sum(-1)
    return logit - DUPLICATE * duplicates + COMPLEMENT * complements


def attention(places: int) -> np.ndarray:
    """The probability that the user looks at each place, [places].

    Example:
        >>> from ifa_torchrec.data.synthetic_sets import attention
        >>> attention(3).round(4).tolist()
        [1.0, 0.95, 0.9025]
    """
    return ATTENTION ** np.arange(places)


def set_reward(logit: np.ndarray, topic: np.ndarray) -> np.ndarray:
    """The expected number of items that the user picks from each set, given in the order shown.

    Args:
        logit, topic: as for ``set_logits``.

    Returns:
        [...].

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.synthetic_sets import set_reward
        >>> alike, not_alike = np.array([0, 0]), np.array([0, 2])
        >>> [round(float(set_reward(np.zeros(2), topic)), 3) for topic in (alike, not_alike)]
        [0.647, 0.975]
    """
    return (sigmoid(set_logits(logit, topic)) * attention(topic.shape[-1])).sum(-1)


def best_set(logit: np.ndarray, topic: np.ndarray, k: int) -> np.ndarray:
    """The set with the highest expected reward that a local search finds: greedy by the truth, then
    exchanging one item for another while that helps.

    Args:
        logit, topic: [m], of the candidates of a request.
        k: the size of the set; at most all candidates.

    Returns:
        [k] rows of the candidates, best first.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.synthetic_sets import best_set
        >>> best_set(np.array([2.0, 1.9, 1.0]), np.array([0, 0, 2]), k=2).tolist()
        [0, 2]
    """
    chosen = np.empty(0, np.int64)
    rows = np.arange(len(logit))

    def best_of(sets: np.ndarray) -> tuple[np.ndarray, float]:
        """The best of [n, k] sets, best item first, and its reward."""
        probability = sigmoid(set_logits(logit[sets], topic[sets]))
        order = np.argsort(-probability, axis=1, kind="stable")
        ordered = np.take_along_axis(sets, order, axis=1)
        reward = set_reward(logit[ordered], topic[ordered])
        return ordered[reward.argmax()], float(reward.max())

    reward = 0.0
    for _ in range(min(k, len(rows))):
        left = np.setdiff1d(rows, chosen)
        chosen, reward = best_of(np.column_stack([np.tile(chosen, (len(left), 1)), left]))
    left = np.setdiff1d(rows, chosen)
    while len(left) and len(chosen):
        sets = np.tile(chosen, (len(chosen) * len(left), 1))
        place = np.repeat(np.arange(len(chosen)), len(left))
        sets[np.arange(len(sets)), place] = np.tile(left, len(chosen))
        other, found = best_of(sets)
        if found <= reward + 1e-12:
            break
        chosen, reward = other, found
        left = np.setdiff1d(rows, chosen)
    return chosen


def show(rng: np.random.Generator, pull: np.ndarray, topic: np.ndarray, shown: int) -> np.ndarray:
    """The candidates that the logging policy shows for each request, in order.

    Args:
        rng: the random generator.
        pull, topic: [..., m], of the candidates.
        shown: k.

    Returns:
        [..., k] rows of the candidates.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.synthetic_sets import show
        >>> rows = show(np.random.default_rng(0), np.zeros((2, 5)), np.zeros((2, 5), int), shown=3)
        >>> rows.shape
        (2, 3)
    """
    policy = policy_logit(pull, topic)
    rows = np.argsort(-(policy + rng.gumbel(size=policy.shape)), axis=-1)[..., :shown]
    mine = np.take_along_axis(policy, rows, axis=-1)
    order = np.argsort(-(mine + rng.gumbel(size=mine.shape)), axis=-1)
    return np.take_along_axis(rows, order, axis=-1)


def policy_logit(pull: np.ndarray, topic: np.ndarray) -> np.ndarray:
    """The logits by which the logging policy draws; same shape as the arguments.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.synthetic_sets import policy_logit
        >>> policy_logit(np.array([0.0, 1.0]), np.array([0, 0])).round(1).tolist()
        [0.7, 1.7]
    """
    return _TILT * pull + _LIKING * np.cos(2.4 * topic)


def picked(rng: np.random.Generator, logit: np.ndarray, topic: np.ndarray) -> np.ndarray:
    """Draw which items the user picks from sets in the order shown, [..., k] bool; see ``set_logits``.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.synthetic_sets import picked
        >>> picked(np.random.default_rng(0), np.full(3, 9.0), np.array([0, 2, 4])).tolist()
        [True, True, True]
    """
    probability = sigmoid(set_logits(logit, topic)) * attention(topic.shape[-1])
    return rng.random(probability.shape) < probability


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logit)), elementwise.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.synthetic_sets import sigmoid
        >>> sigmoid(np.zeros(1)).tolist()
        [0.5]
    """
    return 1 / (1 + np.exp(-logit))
