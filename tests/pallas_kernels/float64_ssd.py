"""SSD forward and backward, token by token, in NumPy and float64: what every form is held to."""

import numpy as np

NAMES = ("x", "log_a", "b", "c")


def token_loop(inputs, state, d_y, d_final, reverse=False):
    """The definition and its gradients: a dict of y, final, and state, dx, dlog_a, db, dc.

    inputs: the four arrays by name, as in ssd; state and d_final [B, H, P, N]; d_y [B, T, H, P].
    """
    x, log_a, b, c, state, d_y, d_state = (
        np.asarray(z, np.float64) for z in (*(inputs[name] for name in NAMES), state, d_y, d_final)
    )
    heads, groups = x.shape[2], b.shape[2]
    b, c = (np.repeat(z, heads // groups, 2) for z in (b, c))
    a = np.exp(log_a)[..., None, None]
    steps = list(range(x.shape[1]))
    steps = steps[::-1] if reverse else steps
    y, states = np.zeros(x.shape), [state]
    for t in steps:
        states.append(a[:, t] * states[-1] + x[:, t, ..., None] * b[:, t, :, None])
        y[:, t] = np.einsum("bhpn,bhn->bhp", states[-1], c[:, t])
    d_x, d_log_a, d_b, d_c = (np.zeros(z.shape) for z in (x, log_a, b, c))
    for i, t in reversed(list(enumerate(steps))):
        d_c[:, t] = np.einsum("bhpn,bhp->bhn", states[i + 1], d_y[:, t])
        d_state = d_state + d_y[:, t, ..., None] * c[:, t, :, None]
        d_x[:, t] = np.einsum("bhpn,bhn->bhp", d_state, b[:, t])
        d_b[:, t] = np.einsum("bhpn,bhp->bhn", d_state, x[:, t])
        d_state = a[:, t] * d_state
        d_log_a[:, t] = np.sum(d_state * states[i], (-2, -1))
    d_b, d_c = (z.reshape(*z.shape[:2], groups, -1, z.shape[-1]).sum(3) for z in (d_b, d_c))
    result = {"y": y, "final": states[-1], "state": d_state}
    return result | {"dx": d_x, "dlog_a": d_log_a, "db": d_b, "dc": d_c}
