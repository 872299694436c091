"""Classifier-free guidance (CFG), whole: loss, guidance rule, guided field, two samplers.

The aim: samples that show class y more clearly than the data do. In four lines (Lecture 4; b_t is
the factor of the score in u = a_t x + b_t score, paths.py):

    grad log p_t(x|y) = grad log p_t(x) + grad log p_t(y|x)     Bayes' rule
    u_t(x|y) = u_t(x) + b_t grad log p_t(y|x)                   what the label adds to the field
    u_t(x) + w b_t grad log p_t(y|x)                            guidance adds w times as much
      = (1 - w) u_t(x) + w u_t(x|y)                             line 2 again: no classifier

w is the guidance scale: 0 is unconditional, 1 conditional, and beyond 1 the label counts for more
than the data say. One network gives both fields: while it trains, y becomes NULL with probability
eta, so u_t(x|NULL) learns u_t(x).

Copy this file and paths.py, which introduces x, z, eps, u and the score. The path is passed in, so
any will do: the loss uses its `sample` and `target`, the SDE its `beta` and `u_to_eps`.

Shapes: x, z, eps (B, ...); t (B,) or a number, 0 noise, 1 data; y (B,), int64 for classes;
net(x, t, y) -> like x, where t is (B,). Other shapes and values raise ValueError or TypeError.
"""
import math
from itertools import pairwise
from numbers import Real

import torch
import torch.nn.functional as F

NULL = 10       # the label for "no label", after MNIST's 0 ... 9


# ---------------------------------------------------------------- what is refused

def require(condition, message):
    if not condition:
        raise ValueError(message)


def require_same_shape(a, b):
    require(a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ")


def require_label_each(y, x, null=NULL):
    """y must be a tensor (len(x),), and null a value of its type."""
    if not isinstance(y, torch.Tensor):
        raise TypeError(f"labels are a tensor ({len(x)},), not {type(y).__name__}")
    require(y.shape == x.shape[:1], f"labels of shape {tuple(y.shape)}: expected ({len(x)},)")
    require(y.is_floating_point() or null == int(null), f"null = {null}, but labels are integers")


def apply(net, x, t, y):
    """net(x, t, y), which must be like x."""
    out = net(x, t, y)
    require_same_shape(out, x)
    return out


# ---------------------------------------------------------------- training

def drop_labels(y, eta, null=NULL):
    """y <- null with probability eta, independently for each sample, as a new tensor.

    y: (B,), no label above null. Lecture 4, "Classifier-Free Guidance Training".
    """
    require_label_each(y, y, null)
    require(0 <= eta <= 1, f"eta = {eta} is not in [0, 1]")
    require((y <= null).all(), f"a label is above null = {null}: for K classes pass null=K")
    dropped = torch.rand(len(y), device=y.device) < eta
    return y.masked_fill(dropped, null)         # of y's type


def draw_times(z, t=None):
    """t (B,), or where it is None the lecture's t ~ U[0, 1), one for each sample of z."""
    if t is None:
        return torch.rand(len(z), device=z.device)
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"t is a tensor ({len(z)},), not {type(t).__name__}")
    require(((t > -1e-5) & (t < 1 + 1e-5)).all(), "a t of the loss is not in [0, 1]")
    return t


def cfg_cfm_loss(net, path, z, y, eta=0.1, t=None, null=NULL):
    """L_CFM^CFG = E || u_theta(x|y) - u_t(x|z) ||^2, mean over pixels.

    net(x, t, y) -> u. t: (B,), or None for the lecture's t ~ U[0, 1).
    Lecture 4, "Classifier-Free Guidance Training".
    """
    require_label_each(y, z, null)
    y = drop_labels(y, eta, null)               # with probability eta, y <- null
    t = draw_times(z, t)
    eps = torch.randn_like(z)
    x = path.sample(z, eps, t)                  # x ~ p_t(x|z)
    u = apply(net, x, t, y)
    return F.mse_loss(u, path.target(z, eps, t))


# ---------------------------------------------------------------- guidance

def guide(cond, uncond, w):
    """Classifier-free guidance: (1 - w) u_t(x|null) + w u_t(x|y).

    Any two predictions of one kind (u, score, eps or z), of the same shape (B, ...). w: a number or
    (B,). w = 1 gives cond, w = 0 gives uncond. The rule is the same for all kinds: at given x and t
    each kind is c x + d times another, with numbers c and d, and as the weights 1 - w and w add to
    1, c x comes out once on both sides.
    Lecture 4, "Classifier-free guidance"; Ho & Salimans 2022, whose w is ours minus 1.
    """
    require_same_shape(cond, uncond)
    return uncond + scale_each(w, cond) * (cond - uncond)


def scale_each(w, x):
    """The scale w as a factor for x: a number, or from (B,) the shape (B, 1, ..., 1)."""
    if isinstance(w, Real):
        return float(w)                         # numpy's numbers too
    if not isinstance(w, torch.Tensor):
        raise TypeError(f"w is a number or a tensor ({len(x)},), not {type(w).__name__}")
    if w.ndim > 0:
        require(w.shape == x.shape[:1], f"w of shape {tuple(w.shape)}: expected ({len(x)},)")
        w = w.view(-1, *[1] * (x.ndim - 1))     # (B,) -> (B, 1, ..., 1)
    return w.to(x)


def guided_field(net, x, t, y, w, null=NULL):
    """The field of Lecture 4, Algorithm 8: one call of net on 2B, or on B where w is 0 or 1.

    w: a number or (B,). With a label y' as null, guidance leads away from y': the field is
    u_t(x|y) + (w - 1) (u_t(x|y) - u_t(x|y')). By Bayes' rule for y and for y', the difference is
    b_t (grad log p_t(y|x) - grad log p_t(y'|x)).
    """
    t = check_inputs(x, t, y, null)             # (B,)
    no_label = torch.full_like(y, null)
    if isinstance(w, Real) and w == 1:
        return apply(net, x, t, y)              # unguided: Algorithm 7
    if isinstance(w, Real) and w == 0:
        return apply(net, x, t, no_label)
    both = apply(net, torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, no_label]))
    cond, uncond = both.chunk(2)                # of (2B, ...)
    return guide(cond, uncond, w)


def check_inputs(x, t, y, null=NULL):
    """t as (B,), in float32 or wider, since bfloat16 would round it."""
    require_label_each(y, x, null)
    t = torch.as_tensor(t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    require(t.ndim == 0 or t.shape == x.shape[:1],
            f"t of shape {tuple(t.shape)}: expected a number or ({len(x)},)")
    return t.expand(len(x))


# ---------------------------------------------------------------- samplers
#
# They go from x at t = t0 (noise, if t0 = 0) to t = 1, in equal steps from t to s = t + h.
# field(x, t) -> u is a guided field whose y and w are filled in, and t is a Python number.

def times(steps, t0=0.0):
    """The steps, as pairs (t, s) from t0 to exactly 1; none where t0 = 1."""
    require(steps >= 1, f"steps = {steps}: at least one is needed")
    require(0 <= t0 <= 1, f"t0 = {t0} is not in [0, 1]")
    if t0 == 1:
        return iter(())
    return pairwise((1 - k / steps) * t0 + k / steps for k in range(steps + 1))


def require_finite(x):
    """x, if it is finite. Every sampler ends so: one infinite value makes all later ones so."""
    require(x.isfinite().all(), "samples are not finite: w may be too large, or the field infinite "
            "where it starts, as a classifier's guidance is at t = 0 (start later: t0=0.01)")
    return x


def euler(field, x, steps, t0=0.0):
    """X_s = X_t + h u_t(X_t); Lecture 4, Algorithms 7 and 8. x: (B, ...), in and out."""
    for t, s in times(steps, t0):
        u = field(x, t)
        require_same_shape(u, x)
        x = x + (s - t) * u
    return require_finite(x)


def value_at(function, t):
    """alpha or beta of a path at the number t, as a number."""
    require(-1e-5 < t < 1 + 1e-5, f"t = {t} is not in [0, 1]")
    return function(torch.tensor(t, dtype=torch.float64)).item()


def euler_maruyama(field, x, steps, path, sigma=None, t0=0.0, randn=torch.randn_like):
    """dX = [u + sigma_t^2/2 score] dt + sigma_t dW; Lecture 4, guidance for diffusion models.

    sigma: a number, a function of t, or None for sigma_t = sqrt(2 beta_t), with which nothing is
    infinite at t = 1. randn(x) -> noise like x.
    """
    for t, s in times(steps, t0):
        x = euler_maruyama_step(field, x, t, s, path, sigma, randn)
    return require_finite(x)


def euler_maruyama_step(field, x, t, s, path, sigma=None, randn=torch.randn_like):
    """X_s = X_t + h (u + sigma_t^2/2 score) + sqrt(h) sigma_t xi, with h = s - t, xi ~ N(0, I).

    As score = -eps / beta_t, the drift is u - k eps with k = sigma_t^2 / (2 beta_t). At time s the
    path has noise of variance beta_s^2. The step must not add more, so sigma_t is at most
    beta_s / sqrt(h), in the noise and in the drift; the last step, where beta_s = 0, adds none.
    """
    h = s - t
    beta = value_at(path.beta, t)
    if sigma is None:
        sigma_t = math.sqrt(2 * beta)
    elif callable(sigma):
        sigma_t = float(sigma(t))
    else:
        sigma_t = sigma
    require(sigma_t >= 0, f"sigma = {sigma_t} is negative")
    sigma_t = min(sigma_t, value_at(path.beta, s) / math.sqrt(h))
    k = sigma_t**2 / (2 * beta)
    u = field(x, t)
    xi = randn(x)
    require_same_shape(u, x)
    require_same_shape(xi, x)
    drift = u - k * path.u_to_eps(u, x, t)
    return x + h * drift + math.sqrt(h) * sigma_t * xi
