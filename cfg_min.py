"""Classifier-free guidance, whole: the loss, the guidance rule, the guided field, two samplers.

Copy this file: it works alone. A path (paths.py, or yours) is an argument. Lecture 4 of MIT 6.S184;
paths.py introduces x, z, eps, u and the score.

The aim: images of class y, more clearly of class y than the data are. One network u_t(x|y) learns
to be conditional and unconditional at once. While it trains, y becomes NULL with probability eta,
so u_t(x|NULL) is u_t(x). The guided field starts from u_t(x|NULL), goes to u_t(x|y), and beyond:

    (1 - w) u_t(x|NULL) + w u_t(x|y)        w is the guidance scale: 0 unconditional,
                                            1 conditional, > 1 guided.

Shapes: x, z, eps (B, ...); t (B,) or a number, 0 noise, 1 data; y (B,) int64;
net(x, t, y) -> (B, ...), like x. Other shapes raise ValueError.
"""
import math
from itertools import pairwise

import torch
import torch.nn.functional as F

NULL = 10       # the label for "no label", after MNIST's 0 ... 9


def require(condition, message):
    if not condition:
        raise ValueError(message)


def require_same_shape(a, b):
    require(a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ")


def require_label_each(y, x):
    require(y.shape == x.shape[:1], f"labels of shape {tuple(y.shape)}: expected ({len(x)},)")


# ---------------------------------------------------------------- training

def drop_labels(y, eta, null=NULL):
    """y <- null with probability eta, independently for each sample, as a new tensor.

    y: (B,). Lecture 4, "Classifier-Free Guidance Training".
    """
    require(y.ndim == 1, f"labels of shape {tuple(y.shape)}: expected (B,)")
    require(0 <= eta <= 1, f"eta = {eta} is not in [0, 1]")
    dropped = torch.rand(len(y), device=y.device) < eta
    return torch.where(dropped, null, y)


def cfg_cfm_loss(net, path, z, y, eta=0.1, t=None, null=NULL):
    """L_CFM^CFG = E || u_theta(x|y) - u_t(x|z) ||^2, mean over pixels.

    net(x, t, y) -> u. t: (B,), or None for the lecture's t ~ U[0, 1).
    Lecture 4, "Classifier-Free Guidance Training".
    """
    require_label_each(y, z)
    y = drop_labels(y, eta, null)               # with probability eta, y <- null
    if t is None:
        t = torch.rand(len(z), device=z.device)
    eps = torch.randn_like(z)
    x = path.sample(z, eps, t)                  # x ~ p_t(x|z)
    u = net(x, t, y)
    require_same_shape(u, x)
    return F.mse_loss(u, path.target(z, eps, t))


# ---------------------------------------------------------------- guidance

def guide(cond, uncond, w):
    """Classifier-free guidance: (1 - w) u_t(x|null) + w u_t(x|y).

    Any two predictions of one kind (u, score, eps or z), of the same shape. w = 1 gives cond, w = 0
    gives uncond. For all kinds guidance is the same: at given x and t each kind is a x plus b times
    another, and the weights 1 - w and w add to 1.
    Lecture 4, "Classifier-free guidance"; Ho & Salimans 2022, whose w is ours minus 1.
    """
    require_same_shape(cond, uncond)
    return uncond + w * (cond - uncond)


def add_axes(w, x):
    """A scale for each sample, w (B,), with the axes of x: (B, 1, ..., 1). A number is kept."""
    if not isinstance(w, torch.Tensor) or w.ndim == 0:
        return w
    require(w.shape == x.shape[:1], f"w of shape {tuple(w.shape)}: expected ({len(x)},)")
    return w.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def guided_field(net, x, t, y, w, null=NULL):
    """The field of Lecture 4, Algorithm 8: one call of net on 2B, or on B where w is 0 or 1.

    w: a number or (B,). With a label y' as null, guidance leads away from y': the field is
    u_t(x|y) + (w - 1) (u_t(x|y) - u_t(x|y')). By Bayes' rule for y and for y', the difference is
    b_t (grad log p_t(y|x) - grad log p_t(y'|x)).
    """
    require_label_each(y, x)
    wide = torch.promote_types(x.dtype, torch.float32)      # bfloat16 would round t
    t = torch.as_tensor(t, dtype=wide, device=x.device)
    require(t.ndim == 0 or t.shape == y.shape, f"t of shape {tuple(t.shape)}: expected (B,)")
    t = t.expand(len(x))
    other = torch.full_like(y, null)
    if isinstance(w, (int, float)) and w == 1:
        return net(x, t, y)                     # Algorithm 7
    if isinstance(w, (int, float)) and w == 0:
        return net(x, t, other)
    both = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, other]))     # (2B, ...)
    cond, uncond = both.chunk(2)
    require_same_shape(cond, x)
    return guide(cond, uncond, add_axes(w, x))


# ---------------------------------------------------------------- samplers
#
# They go from noise x at t = t0 to a sample at t = 1, in equal steps from t to s = t + h.
# field(x, t) -> u is a guided field whose y and w are filled in, and t is a Python number.

def times(steps, t0=0.0):
    """The steps, as pairs (t, s) from t0 to exactly 1; none where t0 = 1."""
    require(steps >= 1, f"steps = {steps}: at least one is needed")
    require(0 <= t0 <= 1, f"t0 = {t0} is not in [0, 1]")
    if t0 == 1:
        return iter(())
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

    sigma: a number, a function of t, or None for sigma_t = sqrt(2 beta_t), with which nothing is
    infinite at t = 1. randn(x) -> noise like x.
    """
    for t, s in times(steps, t0):
        x = euler_maruyama_step(field, x, t, s, path, sigma, randn)
    return x


def euler_maruyama_step(field, x, t, s, path, sigma=None, randn=torch.randn_like):
    """X_s = X_t + h (u + sigma_t^2/2 score) + sqrt(h) sigma_t xi, with h = s - t, xi ~ N(0, I).

    As score = -eps / beta_t, the drift is u - k eps with k = sigma_t^2 / (2 beta_t). The step adds
    noise of variance h sigma_t^2. X_s has noise of variance beta_s^2 in all, so sigma_t
    is capped at beta_s / sqrt(h), in the noise and in the drift.
    """
    h = s - t
    beta = value_at(path.beta, t)
    if sigma is None:
        sigma_t = math.sqrt(2 * beta)
    elif callable(sigma):
        sigma_t = float(sigma(t))
    else:
        sigma_t = sigma
    sigma_t = min(sigma_t, value_at(path.beta, s) / math.sqrt(h))
    k = sigma_t**2 / (2 * beta)
    u = field(x, t)
    drift = u - k * path.u_to_eps(u, x, t)
    return x + h * drift + math.sqrt(h) * sigma_t * randn(x)
