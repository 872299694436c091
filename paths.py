"""Gaussian probability paths: how data become noise, and four ways to say where a point moves.

A path joins noise eps ~ N(0, I), at time t = 0, to a data point z, at t = 1:

    x = alpha_t z + beta_t eps              alpha goes from 0 to 1, beta from 1 to 0
                                            (DDPM: nearly; alpha_0 is 0.0066).

So x given z follows p_t(x|z) = N(x; alpha_t z, beta_t^2 I), and it moves with the velocity

    u_t(x|z) = alpha'_t z + beta'_t eps     the conditional vector field; ' is d/dt.

Many pairs (z, eps) meet in one x. The mean of their velocities, E[u_t(x|z) | x], is u_t(x), the
marginal vector field: its ODE carries the law of the noise to the law of the data, and it is what a
network learns. p_t(x) is the law of x when z is drawn from the data; its score, grad log p_t(x), is
the same mean of the scores of p_t(x|z).

For one pair, the two equations above are linear in z and eps. Solved for these, with the
determinant D, they give every conversion between u, eps and z; and the score of the Gaussian
p_t(x|z) is -(x - alpha z) / beta^2 = -eps / beta. At a given x all this is linear, so it holds for
the means over all pairs as well:

    D = alpha' beta - alpha beta'           1 for CondOT, pi/2 for Cosine, never 0
    z = (beta u - beta' x) / D              E[z|x], if u is the marginal field
    eps = (alpha' x - alpha u) / D          E[eps|x]
    score = -eps / beta

Lecture 4, "Classifier-free guidance" (000_9a64053bb9e2e45b.txt).
Shapes: x, z, eps, u and score are (B, ...), all alike; t is (B,) or one number, in [0, 1].
"""
import math

import torch


class GaussianPath:
    """What all paths share. A path itself is four functions of t: alpha, beta, d_alpha, d_beta."""

    def at(self, t, x):
        """alpha, beta, alpha', beta' at t, (B, 1, ..., 1): one a sample, with as many axes as x."""
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
        t = t.view(-1, *[1] * (x.ndim - 1))     # (B,) -> (B, 1, ..., 1)
        return self.alpha(t), self.beta(t), self.d_alpha(t), self.d_beta(t)

    def determinant(self, t, x):
        """D = alpha' beta - alpha beta', (B, 1, ..., 1)."""
        alpha, beta, d_alpha, d_beta = self.at(t, x)
        return d_alpha * beta - alpha * d_beta

    def sample(self, z, eps, t):
        """x = alpha z + beta eps: a draw from p_t(x|z) if eps is a draw from N(0, I)."""
        alpha, beta, _, _ = self.at(t, z)
        return alpha * z + beta * eps

    def target(self, z, eps, t):
        """u_t(x|z) = alpha' z + beta' eps at x = alpha z + beta eps."""
        _, _, d_alpha, d_beta = self.at(t, z)
        return d_alpha * z + d_beta * eps

    def u_to_data(self, u, x, t):
        """z = (beta u - beta' x) / D."""
        _, beta, _, d_beta = self.at(t, x)
        return (beta * u - d_beta * x) / self.determinant(t, x)

    def u_to_eps(self, u, x, t):
        """eps = (alpha' x - alpha u) / D."""
        alpha, _, d_alpha, _ = self.at(t, x)
        return (d_alpha * x - alpha * u) / self.determinant(t, x)

    def u_to_score(self, u, x, t):
        """grad log p_t(x) = -eps / beta; infinite at t = 1."""
        _, beta, _, _ = self.at(t, x)
        return -self.u_to_eps(u, x, t) / beta

    def eps_to_u(self, eps, x, t):
        """u = (alpha' x - D eps) / alpha; 0/0 at alpha = 0, where eps = x whatever z is."""
        alpha, _, d_alpha, _ = self.at(t, x)
        return (d_alpha * x - self.determinant(t, x) * eps) / alpha

    def data_to_u(self, z, x, t):
        """u = (D z + beta' x) / beta, on CondOT (z - x) / (1 - t); 0/0 at t = 1, where x = z."""
        _, beta, _, d_beta = self.at(t, x)
        return (self.determinant(t, x) * z + d_beta * x) / beta

    def a_b(self, t, x):
        """a = alpha'/alpha and b = (alpha' beta^2 - beta' beta alpha)/alpha; Lecture 4, FACT, which
        prints b without the beta of its second term."""
        alpha, beta, d_alpha, d_beta = self.at(t, x)
        a = d_alpha / alpha
        b = (d_alpha * beta**2 - d_beta * beta * alpha) / alpha
        return a, b

    def score_to_u(self, score, x, t):
        """u = a_t x + b_t score, for alpha > 0; Lecture 4, FACT."""
        a, b = self.a_b(t, x)
        return a * x + b * score


class CondOT(GaussianPath):
    """The straight line x = t z + (1 - t) eps, so u = z - eps; Lipman et al. 2023, section 4.1."""

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
    abar = exp(-int_0^s rate) (Song et al. 2021, SDE, eq. 33). alpha_0 is 0.0066: x at t = 0 is
    almost pure noise. beta' = -alpha alpha' / beta is infinite at t = 1, where beta = 0: there
    this quotient takes beta as 1e-3. The methods take t.
    """

    def rate(self, t): return 0.1 + 19.9 * (1 - t)
    def integral(self, t): return 0.1 * (1 - t) + 9.95 * (1 - t)**2

    def alpha(self, t): return torch.exp(-self.integral(t) / 2)
    def beta(self, t): return torch.sqrt(-torch.expm1(-self.integral(t)))
    def d_alpha(self, t): return self.alpha(t) * self.rate(t) / 2
    def d_beta(self, t): return -self.alpha(t) * self.d_alpha(t) / self.beta(t).clamp(min=1e-3)


PATHS = {"condot": CondOT(), "cosine": Cosine(), "ddpm": DDPM()}
