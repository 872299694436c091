"""Gaussian probability paths p_t(x|z) = N(x; alpha_t z, beta_t^2 I): noise at t = 0, data at t = 1.

Lecture 4, "Classifier-free guidance" (000_9a64053bb9e2e45b.txt): alpha goes from 0 to 1, beta from
1 to 0. A point of a path is x = alpha z + beta eps, its velocity u = alpha' z + beta' eps: two
equations in z and eps, whose solution is every conversion between u, score, eps and z.

    z = (beta u - beta' x) / W,    eps = (alpha' x - alpha u) / W,    score = -eps / beta,
    W = alpha' beta - alpha beta'       (1 for CondOT, pi/2 for Cosine, never 0).

x, z, eps, u, score: (B, ...), all of one shape. t: (B,), or one number for the batch, in [0, 1].
"""
import math

import torch

class GaussianPath:
    """What all paths share. A path itself is four functions of t: alpha, beta, d_alpha, d_beta."""

    def at(self, t, x):
        """alpha, beta, alpha', beta' at t, (B, 1, ..., 1): over the batch, never over width."""
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
        t = t.view(-1, *[1] * (x.ndim - 1))     # (B,) -> (B, 1, ..., 1)
        return self.alpha(t), self.beta(t), self.d_alpha(t), self.d_beta(t)

    def sample(self, z, eps, t):
        """x = alpha z + beta eps: a draw from p_t(x|z) if eps is one from N(0, I)."""
        alpha, beta, _, _ = self.at(t, z)
        return alpha * z + beta * eps

    def target(self, z, eps, t):
        """u_t(x|z) = alpha' z + beta' eps, the conditional vector field at that x; no division."""
        _, _, d_alpha, d_beta = self.at(t, z)
        return d_alpha * z + d_beta * eps

    def solve(self, u, x, t):
        """z and eps of the point x that moves with u; of a marginal field, E[z|x] and E[eps|x]."""
        alpha, beta, d_alpha, d_beta = self.at(t, x)
        W = d_alpha * beta - alpha * d_beta
        return (beta * u - d_beta * x) / W, (d_alpha * x - alpha * u) / W

    def u_to_data(self, u, x, t): return self.solve(u, x, t)[0]
    def u_to_eps(self, u, x, t): return self.solve(u, x, t)[1]

    def u_to_score(self, u, x, t):
        """grad log p_t(x) = -eps / beta; infinite at t = 1."""
        return -self.solve(u, x, t)[1] / self.at(t, x)[1]

    def eps_to_u(self, eps, x, t):
        """u = (alpha' x - W eps) / alpha; 0/0 at alpha = 0, where eps = x for any z."""
        alpha, beta, d_alpha, d_beta = self.at(t, x)
        return (d_alpha * x - (d_alpha * beta - alpha * d_beta) * eps) / alpha

    def a_b(self, t, x):
        """a = alpha'/alpha, b = (alpha' beta^2 - beta' beta alpha)/alpha; Lecture 4, FACT."""
        alpha, beta, d_alpha, d_beta = self.at(t, x)
        return d_alpha / alpha, (d_alpha * beta**2 - d_beta * beta * alpha) / alpha

    def score_to_u(self, score, x, t):
        """u = a_t x + b_t score, for alpha > 0; Lecture 4, FACT."""
        a, b = self.a_b(t, x)
        return a * x + b * score

class CondOT(GaussianPath):
    """The straight line x = t z + (1 - t) eps, u = z - eps; Lipman et al. 2023, section 4.1."""

    def alpha(self, t): return t
    def beta(self, t): return 1 - t
    def d_alpha(self, t): return torch.ones_like(t)
    def d_beta(self, t): return -torch.ones_like(t)

class Cosine(GaussianPath):
    """alpha = sin(pi t / 2), beta = cos(pi t / 2): variance-preserving, alpha^2 + beta^2 = 1."""

    def alpha(self, t): return torch.sin(math.pi / 2 * t)
    def beta(self, t): return torch.sin(math.pi / 2 * (1 - t))      # 0 at t = 1, where cos rounds
    def d_alpha(self, t): return math.pi / 2 * self.beta(t)
    def d_beta(self, t): return -math.pi / 2 * self.alpha(t)

class DDPM(GaussianPath):
    """Ho et al. 2020: alpha = sqrt(abar), beta = sqrt(1 - abar), s = 1 - t = t_DDPM / T.
    Their noise rates 1e-4 ... 0.02 at T = 1000 are r(s) = 0.1 + 19.9 s, and abar = exp(-int_0^s r)
    (Song et al. 2021, eq. 33). alpha_0 = 0.0066. beta', infinite at t = 1, is held there."""

    def alpha(self, t): return torch.exp(-(0.1 * (1 - t) + 9.95 * (1 - t)**2) / 2)
    def beta(self, t): return torch.sqrt(-torch.expm1(-(0.1 * (1 - t) + 9.95 * (1 - t)**2)))
    def d_alpha(self, t): return self.alpha(t) * (0.1 + 19.9 * (1 - t)) / 2
    def d_beta(self, t): return -self.alpha(t) * self.d_alpha(t) / self.beta(t).clamp(min=1e-3)

PATHS = {"condot": CondOT(), "cosine": Cosine(), "ddpm": DDPM()}
