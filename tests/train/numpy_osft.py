"""The factored form of orthogonal subspace fine-tuning by its equations, in numpy."""

import numpy as np


def trajectory(W, gradients, k, update, project_parameters=True):
    """Dense weights after every step of a factored run.

    Args:
      gradients: dL/dW of each step. k: directions kept.
      update: name of a factor, its gradient, the factor -> what is added to it.
      project_parameters: as mini_trainer after each step; else gradients alone, as peft.
    """
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    high = (U[:, :k] * s[:k]) @ Vt[:k]
    outside_u = lambda x: x - U[:, :k] @ (U[:, :k].T @ x)
    outside_v = lambda x: x - (x @ Vt[:k].T) @ Vt[:k]
    u, s, v = U[:, k:], s[k:], Vt[k:]
    out = []
    for G in gradients:
        du, ds, dv = outside_u(G @ v.T * s), np.diag(u.T @ G @ v.T), outside_v(s[:, None] * u.T @ G)
        u, s, v = u + update("u", du, u), s + update("s", ds, s), v + update("v", dv, v)
        if project_parameters:
            u, v = outside_u(u), outside_v(v)
        out.append(high + (u * s) @ v)
    return np.array(out)


class AdamW:
    """Decoupled weight decay; moments by the factor's name. Source: 1711.05101, algorithm 2."""

    def __init__(self, rate, decay=0.0, b1=0.9, b2=0.95, eps=1e-8):
        self.rate, self.decay, self.b1, self.b2, self.eps = rate, decay, b1, b2, eps
        self.state = {}

    def __call__(self, name, g, x):
        m, v, t = self.state.get(name, (0.0, 0.0, 0))
        m, v, t = self.b1 * m + (1 - self.b1) * g, self.b2 * v + (1 - self.b2) * g * g, t + 1
        self.state[name] = m, v, t
        step = (m / (1 - self.b1**t)) / (np.sqrt(v / (1 - self.b2**t)) + self.eps)
        return -self.rate * (step + self.decay * x)
