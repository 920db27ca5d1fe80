"""WKV-7 forward and backward, token by token, in NumPy and float64: what every form is held to."""

import numpy as np

NAMES = ("r", "log_w", "k", "v", "a", "b")


def token_loop(inputs, state, d_out=None, d_final=None, reverse=False):
    """The definition and, with cotangents, its gradients: a dict of out, final, and state, dr, dlog_w, dk, dv, da, db.

    inputs: the six arrays [B, T, H, ...] by name; state and d_final [B, H, K, V]; d_out [B, T, H, V].
    """
    r, log_w, k, v, a, b = (np.asarray(inputs[name], np.float64) for name in NAMES)
    state = np.asarray(state, np.float64)
    decay = np.exp(log_w)
    steps = range(r.shape[1])[:: -1 if reverse else 1]
    out, reads, before = np.zeros(v.shape), np.zeros(v.shape), {}
    for t in steps:
        before[t] = state
        reads[:, t] = _down(a[:, t], state)
        state = decay[:, t, ..., None] * state + _outer(b[:, t], reads[:, t]) + _outer(k[:, t], v[:, t])
        out[:, t] = _down(r[:, t], state)
    result = {"out": out, "final": state}
    if d_out is None:
        return result

    d_out, d_state = np.asarray(d_out, np.float64), np.asarray(d_final, np.float64)
    grads = {name: np.zeros(np.shape(inputs[name])) for name in NAMES}
    for t in reversed(steps):
        after = decay[:, t, ..., None] * before[t] + _outer(b[:, t], reads[:, t]) + _outer(k[:, t], v[:, t])
        grads["r"][:, t] = _across(after, d_out[:, t])
        d_state = d_state + _outer(r[:, t], d_out[:, t])
        d_read = _down(b[:, t], d_state)
        grads["k"][:, t], grads["v"][:, t] = _across(d_state, v[:, t]), _down(k[:, t], d_state)
        grads["b"][:, t], grads["a"][:, t] = _across(d_state, reads[:, t]), _across(before[t], d_read)
        grads["log_w"][:, t] = decay[:, t] * (before[t] * d_state).sum(-1)
        d_state = decay[:, t, ..., None] * d_state + _outer(a[:, t], d_read)
    return result | {"state": d_state} | {f"d{name}": x for name, x in grads.items()}


def _outer(x, y):
    return x[..., :, None] * y[..., None, :]


def _down(x, state):
    return np.einsum("bhk,bhkv->bhv", x, state)


def _across(state, y):
    return np.einsum("bhkv,bhv->bhk", state, y)
