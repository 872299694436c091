"""Gaussian probability paths: how data become noise, and four ways to say where a point moves.

A path joins noise eps ~ N(0, I), at time t = 0, to a data point z, at t = 1:

    x = alpha_t z + beta_t eps              alpha goes from 0 to 1, beta from 1 to 0
                                            (DDPM: nearly; its alpha_0 is 0.0066).

So x given z has the distribution p_t(x|z) = N(x; alpha_t z, beta_t^2 I). It moves with the velocity

    u_t(x|z) = alpha'_t z + beta'_t eps     the conditional vector field; ' is d/dt.

Many pairs (z, eps) meet in one x. The mean of their velocities, E[u_t(x|z) | x], is the marginal
vector field u_t(x). Its ODE carries the noise to the data, and a network learns it. p_t(x) is the
density of x when z is drawn from the data. Its score is
grad log p_t(x) = E[grad log p_t(x|z) | x].

For one pair, the two equations above are linear in z and eps. D is their determinant. Solved for
z and eps, they give every conversion. The score of the Gaussian p_t(x|z) is
-(x - alpha z) / beta^2 = -eps / beta. At a given x they are linear, so they hold for the
means over all pairs too:

    D = alpha' beta - alpha beta'           1 for CondOT, pi/2 for Cosine
    z = (beta u - beta' x) / D              E[z|x], if u is the marginal field
    eps = (alpha' x - alpha u) / D          E[eps|x]
    score = -eps / beta

Lecture 4, "Classifier-free guidance".
Shapes: x, z, eps, u and score are (B, ...), all of one shape; t is (B,) or one number, in [0, 1].
Other shapes raise ValueError.
"""
import math

import torch
import torch.nn as nn


def one_per_sample(t, x):
    """t as (B,), one for each sample of x (B, ...), in float32 or wider. t: (B,) or a number."""
    wide = torch.promote_types(x.dtype, torch.float32)      # bfloat16 would round t
    t = torch.as_tensor(t, dtype=wide, device=x.device)
    if t.ndim > 0 and t.shape != x.shape[:1]:
        raise ValueError(f"t of shape {tuple(t.shape)}: expected a number or ({len(x)},)")
    return t.expand(len(x))


class GaussianPath:
    """What all paths share. A path itself is four functions of t: alpha, beta, d_alpha, d_beta."""

    def at(self, t, x, other=None):
        """alpha, beta, alpha', beta' at t, each (B, 1, ..., 1), with as many axes as x.

        They are computed in float32 or wider, then take the type of x (float32 for integers).
        Raises ValueError if other and x differ in shape.
        """
        if other is not None and other.shape != x.shape:
            raise ValueError(f"shapes {tuple(other.shape)} and {tuple(x.shape)} differ")
        t = one_per_sample(t, x)
        t = t.view(-1, *[1] * (x.ndim - 1))     # (B,) -> (B, 1, ..., 1)
        kind = x.dtype if x.is_floating_point() else t.dtype
        return [f(t).to(kind) for f in (self.alpha, self.beta, self.d_alpha, self.d_beta)]

    def determinant(self, t, x):
        """D = alpha' beta - alpha beta', (B, 1, ..., 1)."""
        alpha, beta, d_alpha, d_beta = self.at(t, x)
        return d_alpha * beta - alpha * d_beta

    def divide_by_D(self, numerator, t, x):
        """numerator / D. Raises ValueError where D = 0: there u does not determine z and eps."""
        D = self.determinant(t, x)
        if (D == 0).any():
            raise ValueError(f"{type(self).__name__}: D = alpha' beta - alpha beta' is 0 at a t, "
                             "where u gives no z, eps or score; use euler, or start later (t0)")
        return numerator / D

    def sample(self, z, eps, t):
        """x = alpha z + beta eps: a draw from p_t(x|z) if eps is a draw from N(0, I)."""
        alpha, beta, _, _ = self.at(t, z, eps)
        return alpha * z + beta * eps

    def target(self, z, eps, t):
        """u_t(x|z) = alpha' z + beta' eps at x = alpha z + beta eps."""
        _, _, d_alpha, d_beta = self.at(t, z, eps)
        return d_alpha * z + d_beta * eps

    def u_to_data(self, u, x, t):
        """z = (beta u - beta' x) / D."""
        _, beta, _, d_beta = self.at(t, x, u)
        return self.divide_by_D(beta * u - d_beta * x, t, x)

    def u_to_eps(self, u, x, t):
        """eps = (alpha' x - alpha u) / D."""
        alpha, _, d_alpha, _ = self.at(t, x, u)
        return self.divide_by_D(d_alpha * x - alpha * u, t, x)

    def u_to_score(self, u, x, t):
        """grad log p_t(x) = -eps / beta; infinite at t = 1."""
        _, beta, _, _ = self.at(t, x)
        return -self.u_to_eps(u, x, t) / beta

    def eps_to_u(self, eps, x, t):
        """u = (alpha' x - D eps) / alpha; 0/0 at alpha = 0, where eps = x whatever z is."""
        alpha, _, d_alpha, _ = self.at(t, x, eps)
        return (d_alpha * x - self.determinant(t, x) * eps) / alpha

    def eps_to_data(self, eps, x, t):
        """z = (x - beta eps) / alpha; infinite at alpha = 0."""
        alpha, beta, _, _ = self.at(t, x, eps)
        return (x - beta * eps) / alpha

    def data_to_u(self, z, x, t):
        """u = (D z + beta' x) / beta, on CondOT (z - x) / (1 - t); 0/0 at t = 1, where x = z."""
        _, beta, _, d_beta = self.at(t, x, z)
        return (self.determinant(t, x) * z + d_beta * x) / beta

    def a_b(self, t, x, other=None):
        """a = alpha'/alpha and b = (alpha' beta^2 - beta' beta alpha)/alpha; Lecture 4, FACT.

        The slides print b without the beta of its second term. Infinite at alpha = 0.
        """
        alpha, beta, d_alpha, d_beta = self.at(t, x, other)
        a = d_alpha / alpha
        b = (d_alpha * beta**2 - d_beta * beta * alpha) / alpha
        return a, b

    def score_to_u(self, score, x, t):
        """u = a_t x + b_t score, for alpha > 0; Lecture 4, FACT."""
        a, b = self.a_b(t, x, score)
        return a * x + b * score


class CondOT(GaussianPath):
    """The straight line x = t z + (1 - t) eps, so u = z - eps; Lipman et al. 2023."""

    def alpha(self, t): return t
    def beta(self, t): return 1 - t
    def d_alpha(self, t): return torch.ones_like(t)
    def d_beta(self, t): return -torch.ones_like(t)


class Cosine(GaussianPath):
    """alpha = sin(pi t / 2), beta = cos(pi t / 2): variance-preserving, alpha^2 + beta^2 = 1."""

    def alpha(self, t): return torch.sin(math.pi / 2 * t)
    def beta(self, t): return torch.sin(math.pi / 2 * (1 - t))      # cos, but exactly 0 at t = 1
    def d_alpha(self, t): return math.pi / 2 * self.beta(t)
    def d_beta(self, t): return -math.pi / 2 * self.alpha(t)


class DDPM(GaussianPath):
    """Ho et al. 2020: alpha = sqrt(abar), beta = sqrt(1 - abar), s = 1 - t = t_DDPM / T.

    Their noise rates 1e-4 ... 0.02 at T = 1000 are rate(s) = 0.1 + 19.9 s in continuous time, and
    abar = exp(-int_0^s rate) (Song et al. 2021, arXiv 2011.13456). alpha_0 is 0.0066: x at t = 0 is
    almost pure noise. beta' = -alpha alpha' / beta is infinite at t = 1, where beta = 0. There the
    code divides by 1e-3.
    """

    def rate(self, t): return 0.1 + 19.9 * (1 - t)
    def integral(self, t): return 0.1 * (1 - t) + 9.95 * (1 - t)**2

    def alpha(self, t): return torch.exp(-self.integral(t) / 2)
    def beta(self, t): return torch.sqrt(-torch.expm1(-self.integral(t).clamp(min=0)))
    def d_alpha(self, t): return self.alpha(t) * self.rate(t) / 2
    def d_beta(self, t): return -self.alpha(t) * self.d_alpha(t) / self.beta(t).clamp(min=1e-3)


PATHS = {"condot": CondOT(), "cosine": Cosine(), "ddpm": DDPM()}


class DataField(nn.Module):
    """A network that predicts z, as a vector field: u = (D z + beta' x) / beta.

    net(x, t, y) -> z. beta is 0 at t = 1, where a solver may ask for u. So from last_t on, the
    formula uses last_t; net gets the true t. To go from data back to noise, start at t = 0.9 with
    x = path.sample(z, eps, 0.9): nearer to 1, errors of z are divided by a small beta.
    """

    def __init__(self, net, path, last_t=0.98):
        super().__init__()
        self.net = net
        self.path = path
        self.last_t = last_t

    def forward(self, x, t, y):
        z = self.net(x, t, y)
        t = one_per_sample(t, x).clamp(max=self.last_t)
        return self.path.data_to_u(z, x, t)
