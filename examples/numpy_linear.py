"""Fit a line with numpy: a worker that is no torch. Usage: python numpy_linear.py HOST:PORT"""

import sys

import numpy as np

import windlass

HIDDEN = np.arange(1, 9, dtype=np.float32)  # what the data knows: y = x . HIDDEN + 3


def micro_batch(step, slot):
    x = np.random.default_rng((step, slot)).standard_normal((32, 8), np.float32)
    return x, x @ HIDDEN + 3


start = {"weight": np.zeros(8, np.float32), "bias": np.zeros(1, np.float32)}
with windlass.Client.connect(sys.argv[1], start) as client:
    for work in client:
        gradients, loss_sum = {name: np.zeros_like(value) for name, value in start.items()}, 0.0
        for slot in work.slots:
            x, y = micro_batch(work.step, slot)
            error = x @ work.weights["weight"] + work.weights["bias"] - y
            loss_sum += float(np.mean(error**2))
            gradients["weight"] += 2 * x.T @ error / len(x)
            gradients["bias"] += 2 * np.mean(error)
        client.push(work, gradients, loss_sum)
    print(client.reason)
    print(client.pull()["weight"].round(2), client.pull()["bias"].round(2))
