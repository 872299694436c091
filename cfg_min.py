"""Classifier-free guidance (CFG), whole: loss, guidance rule, guided field, two samplers.

The aim: samples that show class y more clearly than the data do. In four lines (Lecture 4; b_t is
the factor of the score in u = a_t x + b_t score, paths.py):

    grad log p_t(x|y) = grad log p_t(x) + grad log p_t(y|x)     Bayes' rule
    u_t(x|y) = u_t(x) + b_t grad log p_t(y|x)                   times b_t, plus a_t x: the fields
    u_t(x) + w b_t grad log p_t(y|x)                            guidance adds w times as much
      = (1 - w) u_t(x) + w u_t(x|y)                             line 2 again: no classifier

w is the guidance scale: 0 is unconditional, 1 conditional, and beyond 1 the label counts for more
than the data say. One network gives both fields: while it trains, y becomes NULL with probability
eta. Samples without a label are of all classes, so u_t(x|NULL) learns u_t(x).

Copy this file and paths.py, which introduces x, z, eps, u and the score. The path is passed in, so
any will do. For K classes, labels are 0 ... K - 1: write NULL = K below, before anything else.

Shapes: x, z, eps (B, ...); t (B,) or a number, 0 noise, 1 data; y (B,), int64 for classes;
net(x, t, y) -> like x, where t is (B,). Shapes that torch would stretch are a ValueError.
"""
import math
from itertools import pairwise
from numbers import Real

import torch
import torch.nn.functional as F

from paths import per_sample, require_same_shape

NULL = 10       # the label for "no label", after MNIST's 0 ... 9


def call(net, x, t, y):
    """net(x, t, y), which must be like x. t: (B,)."""
    if y.shape != x.shape[:1]:
        raise ValueError(f"y of shape {tuple(y.shape)}: expected ({x.shape[0]},)")
    out = net(x, t, y)
    if out.shape != x.shape:
        raise ValueError(f"the network returned {tuple(out.shape)} for x of {tuple(x.shape)}")
    return out


# ---------------------------------------------------------------- training

def drop_labels(y, eta, null=NULL):
    """y <- null with probability eta, independently for each sample, as a new tensor.

    y: (B,), no label above null. Lecture 4, "Classifier-Free Guidance Training".
    """
    if y.ndim != 1 or (y > null).any():
        raise ValueError(f"y is not (B,), or has a label above null = {null}: for K classes write "
                         "NULL = K in cfg_min.py")
    dropped = torch.rand(y.shape[0], device=y.device) < eta
    return y.masked_fill(dropped, null)


def draw_times(z, t=None):
    """The lecture's t ~ U[0, 1), (B,), unless a t is given: a tensor in [0, 1]."""
    if t is None:
        return torch.rand(z.shape[0], device=z.device)
    if ((t < 0) | (t > 1)).any():
        raise ValueError("t of the loss is not in [0, 1]; for DDPM's k = 0 ... T it is 1 - k / T")
    return t.expand(z.shape[0])


def cfg_cfm_loss(net, path, z, y, eta=0.1, t=None, null=NULL):
    """L_CFM^CFG = E || u_theta(x|y) - u_t(x|z) ||^2, mean over pixels.

    net(x, t, y) -> u. t: a tensor (B,), or None for the lecture's t ~ U[0, 1).
    Lecture 4, "Classifier-Free Guidance Training".
    """
    y = drop_labels(y, eta, null)               # with probability eta, y <- null
    t = draw_times(z, t)
    eps = torch.randn_like(z)
    x = path.sample(z, eps, t)                  # x ~ p_t(x|z)
    u = call(net, x, t, y)
    return F.mse_loss(u, path.target(z, eps, t))


# ---------------------------------------------------------------- guidance

def guide(cond, uncond, w):
    """Classifier-free guidance: (1 - w) u_t(x|null) + w u_t(x|y).

    Any two predictions of one kind (u, score, eps or z), of the same shape (B, ...). w: a number or
    (B,). w = 1 gives cond, w = 0 gives uncond. The rule is the same for all kinds: at given x and t
    each kind is an affine function of any other, and weights that add to 1 commute with those.
    Lecture 4, "Classifier-free guidance"; Ho & Salimans 2022, whose w is ours minus 1.
    """
    w = per_sample(w, cond, uncond)
    return uncond + w * (cond - uncond)


def guided_field(net, x, t, y, w, null=NULL):
    """The field of Lecture 4, Algorithm 8: `guide` on u_t(x|y) and u_t(x|null), by one call of net.

    w: a number or (B,).
    """
    t = per_sample(t, x).flatten()              # (B,)
    no_label = torch.full_like(y, null)
    if isinstance(w, Real) and w in (0, 1):     # one field alone: half the work
        return call(net, x, t, y if w == 1 else no_label)
    both = call(net, torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, no_label]))
    cond, uncond = both.unflatten(0, (2, x.shape[0]))       # (2B, ...) -> (B, ...) each
    return guide(cond, uncond, w).to(x.dtype)


# ---------------------------------------------------------------- samplers
#
# They go from x at t = t0 (noise, if t0 = 0) to t = 1, in equal steps from t to s = t + h.
# field(x, t) -> u is a guided field whose y and w are filled in, and t is a Python number.

def times(steps, t0=0.0):
    """The steps, as pairs (t, s) from t0 to exactly 1."""
    return pairwise((1 - k / steps) * t0 + k / steps for k in range(steps + 1))


def euler(field, x, steps, t0=0.0):
    """X_s = X_t + h u_t(X_t); Lecture 4, Algorithms 7 and 8. x: (B, ...), in and out."""
    for t, s in times(steps, t0):
        u = field(x, t)
        require_same_shape(u, x)
        x = x + (s - t) * u
    return x


def value_at(function, t):
    """alpha or beta of a path at the number t, as a number."""
    return function(torch.tensor(t, dtype=torch.float64)).item()


def euler_maruyama(field, x, steps, path, sigma=None, t0=0.0, randn=torch.randn_like):
    """dX = [u + sigma_t^2/2 score] dt + sigma_t dW; Lecture 4, guidance for diffusion models.

    sigma: a number, a function of t, or None for sigma_t^2 = 2 beta_t. Then the drift is u - eps,
    because sigma_t^2/2 score = beta_t (-eps / beta_t), so nothing is infinite at t = 1.
    randn(x) -> noise like x.
    """
    for t, s in times(steps, t0):
        x = euler_maruyama_step(field, x, t, s, path, sigma, randn)
    return x


def euler_maruyama_step(field, x, t, s, path, sigma=None, randn=torch.randn_like):
    """X_s = X_t + h (u + sigma_t^2/2 score) + sqrt(h) sigma_t xi, with h = s - t, xi ~ N(0, I).

    In eps, the drift is u - k eps with k = sigma_t^2 / (2 beta_t). The noise of a step has variance
    h sigma_t^2. It is kept to at most beta_s^2, all that the path has at s, and the drift takes
    that sigma_t too. So the last step, where beta_s = 0, is Euler's.
    """
    h = s - t
    beta = value_at(path.beta, t)
    if sigma is None:
        sigma_t = math.sqrt(2 * beta)
    else:
        sigma_t = float(sigma(t)) if callable(sigma) else sigma
    sigma_t = min(sigma_t, value_at(path.beta, s) / math.sqrt(h))
    k = sigma_t**2 / (2 * beta)
    u = field(x, t)
    drift = u - k * path.u_to_eps(u, x, t)
    return x + h * drift + math.sqrt(h) * sigma_t * randn(x)
