"""Train routers on texts: one softmax regression for each layer; all other weights are frozen."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

STEPS = 200
LEARNING_RATE = 0.1
#: Factor of the penalty, the mean square of the scaled router. Without a penalty, the router would
#: grow without limit on texts that can be separated.
PENALTY = 0.05


@dataclass(frozen=True)
class Fitted:
    """The trained router of a layer.

    Attributes:
        rows: (experts, hidden) float32.
        loss: mean cross-entropy in nats; each expert has the same total weight.
        accuracy: share of tokens whose expert has the largest logit.
    """

    rows: np.ndarray
    loss: float
    accuracy: float


def fit_router(x: mx.array, owners: np.ndarray, experts: int) -> Fitted:
    """Train a router to tell which expert's text a token comes from.

    It minimises the cross-entropy of softmax(R x) plus a penalty on R. First, each dimension of x
    is scaled to mean square 1 / hidden, because some dimensions are many times larger than others;
    then one learning rate works for models of any width. Training begins at zero and uses all
    tokens in each step, so nothing is random.

    Args:
        x: (tokens, hidden) float32, the input of the layer's router.
        owners: (tokens,), the number of each token's expert.
        experts: number of experts.
    """
    hidden = x.shape[1]
    scale = mx.rsqrt(mx.maximum(mx.mean(x * x, axis=0), 1e-12)) * hidden**-0.5
    features, labels = x * scale, mx.array(owners.astype(np.uint32))
    sizes = np.bincount(owners, minlength=experts)
    present = np.count_nonzero(sizes)
    weights = mx.array((1 / (present * sizes[owners])).astype(np.float32))

    def loss(parameters: dict[str, mx.array]) -> mx.array:
        rows = parameters["rows"]
        losses = nn.losses.cross_entropy(features @ rows.T, labels)
        return (losses * weights).sum() + PENALTY * mx.mean(rows * rows)

    parameters = {"rows": mx.zeros((experts, hidden))}
    optimizer = optim.Adam(optim.cosine_decay(LEARNING_RATE, STEPS))
    step = mx.value_and_grad(loss)
    for _ in range(STEPS):
        _, gradient = step(parameters)
        parameters = optimizer.apply_gradients(gradient, parameters)
        mx.eval(parameters, optimizer.state)
    logits = features @ parameters["rows"].T
    final = (nn.losses.cross_entropy(logits, labels) * weights).sum()
    right = mx.mean(mx.argmax(logits, axis=-1) == labels)
    return Fitted(np.array(parameters["rows"] * scale), float(final), float(right))
