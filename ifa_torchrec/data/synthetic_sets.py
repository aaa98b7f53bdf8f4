"""Users who pick from the set that they are shown, where the truth is known.

What the synthetic log's option `relations` adds to its recipe:

- Of the candidates of a request `SHOWN` are shown, by a logging policy that is noisy and biased: it
  draws them one by one in proportion to exp(policy logit), which rises with the pull of the topic and
  with a liking of the policy's own for some topics, whatever the user wants.
- The policy orders what it shows by such draws anew, and attention falls with the place, by the factor
  `ATTENTION` each; a user sees the set as a whole, and picks what is in place i with the probability
  attention(i) sigmoid(bias + strength pull - DUPLICATE near-duplicates + COMPLEMENT complements).
  Near-duplicates are the other items of the set of the same topic, complements those of the partner
  topic (0 and 1 are partners, 2 and 3, and so on). They take from each other, and lift each other.
- Labels are what was picked; what was not shown has none, in no split.

The relations are ours, and as simple as they can be: symmetric, of pairs, alike for all topics. So the
best set can be found, and what a scorer could know at best computed.
"""

from __future__ import annotations

import numpy as np

SHOWN = 10
ATTENTION = 0.95
DUPLICATE, COMPLEMENT = 0.7, 0.4
_TILT, _LIKING = 1.0, 0.7
"""Of the policy: what the pull of a topic adds to its logit, and how far its own likings go."""


def set_logits(logit: np.ndarray, topic: np.ndarray) -> np.ndarray:
    """The logits of the items of sets, each beside the others.

    Args:
        logit: [..., k], of each item alone.
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
    """How likely the user looks at each place, [places].

    Example:
        >>> from ifa_torchrec.data.synthetic_sets import attention
        >>> attention(3).round(4).tolist()
        [1.0, 0.95, 0.9025]
    """
    return ATTENTION ** np.arange(places)


def set_reward(logit: np.ndarray, topic: np.ndarray) -> np.ndarray:
    """The expected number of items that the user picks of sets, in the order in which they are shown.

    Args:
        logit, topic: as ``set_logits``'.

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
    """The set of the highest expected reward, as far as a search finds it: greedily by the truth, then
    by exchanging one item for another as long as that helps.

    Args:
        logit, topic: [m], of the candidates of a request.
        k: items of the set; all, where there are fewer.

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
    """What the logging policy shows of each request, in its order.

    Args:
        rng: what is random.
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
    """What the logging policy draws by; of the shape of its arguments.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.synthetic_sets import policy_logit
        >>> policy_logit(np.array([0.0, 1.0]), np.array([0, 0])).round(1).tolist()
        [0.7, 1.7]
    """
    return _TILT * pull + _LIKING * np.cos(2.4 * topic)


def picked(rng: np.random.Generator, logit: np.ndarray, topic: np.ndarray) -> np.ndarray:
    """What the user picks of sets in their order, [..., k] bool, of ``set_logits``' arguments.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.synthetic_sets import picked
        >>> picked(np.random.default_rng(0), np.full(3, 9.0), np.array([0, 2, 4])).tolist()
        [True, True, True]
    """
    probability = sigmoid(set_logits(logit, topic)) * attention(topic.shape[-1])
    return rng.random(probability.shape) < probability


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logit)), of the logit's shape.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.synthetic_sets import sigmoid
        >>> sigmoid(np.zeros(1)).tolist()
        [0.5]
    """
    return 1 / (1 + np.exp(-logit))
