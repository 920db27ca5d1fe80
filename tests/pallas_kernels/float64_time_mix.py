"""What stands around WKV-7, in NumPy and float64: what every form is held to."""

import numpy as np

from pallas_kernels.time_mix import LowRank


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def shifted(x, by, carry=None):
    y = np.zeros_like(x)
    if by < 0:
        y[:, :-1] = x[:, 1:]
    else:
        y[:, 1:] = x[:, :-1]
        y[:, 0] = 0 if carry is None else carry
    return y


def token_mixes(x, mu, carry, sides):
    near = [shifted(x, 1, carry) if side == "previous" else shifted(x, -1) for side in sides]
    return [[x + (y - x) * m for y, m in zip(near, mus, strict=True)] for mus in mu]


def channel_shift(x, mu_previous, mu_next, carry, block=None):
    y = x + (shifted(x, 1, carry) - x) * mu_previous
    if mu_next is None:
        return y
    near = shifted(x, -1)
    if block is not None:
        near[:, block - 1 :: block] = 0
    return y + (near - x) * mu_next


def values(raw):
    """Of arrays, or of a LowRank."""
    if not isinstance(raw, LowRank):
        return raw
    return [raw.hidden[..., start : start + len(up)] @ up for up, start in zip(raw.ups, raw.starts, strict=True)]


def operands(k, v, raw, w0, a0, k_k, k_a, blend, head_dim, a_scale, valid=None):
    w, a, *gate = values(raw)
    heads = (*k.shape[:2], -1, head_dim)
    rate = a_scale * sigmoid(a0 + a)
    kappa = (k * k_k).reshape(heads)
    length = np.sqrt((kappa**2).sum(-1, keepdims=True))
    kappa = kappa / np.maximum(length, 1e-12)
    if blend is not None:
        v_first, v0 = blend
        v = v + (v_first - v) * sigmoid(v0 + gate[0])
    log_w = -np.exp(-0.5) * sigmoid(w0 + w)
    results = log_w, k * (1 + (rate - 1) * k_a), v, -kappa, kappa * rate.reshape(heads)
    results = [x.reshape(heads) for x in results]
    return results if valid is None else [np.where(valid[..., None, None], x, 0) for x in results]


def finish(sides, vectors, merge):
    done = []
    for (out, r, k, v, gate), (r_k, scale, bias) in zip(sides, vectors, strict=True):
        (gate,) = values(gate) if isinstance(gate, LowRank) else (gate,)
        o = (out - out.mean(-1, keepdims=True)) / np.sqrt(out.var(-1, keepdims=True) + 64e-5)
        bonus = (r * k * r_k.reshape(r.shape[2:])).sum(-1, keepdims=True) * v
        done.append((o.reshape(gate.shape) * scale + bias + bonus.reshape(gate.shape)) * gate)
    if merge is None:
        return sum(done)
    (raw,) = values(merge[0]) if isinstance(merge[0], LowRank) else (merge[0],)
    share = sigmoid(merge[1] + raw)
    return 2 * (share * done[0] + ((1 - share) * done[1] if len(done) > 1 else 0))
