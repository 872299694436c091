"""Gaussian probability paths: how data become noise, and four ways to say where a point moves.

A path joins noise eps ~ N(0, I), at time t = 0, to a data point z, at t = 1:

    x = alpha_t z + beta_t eps              alpha goes from 0 to 1, beta from 1 to 0;
                                            on the straight line alpha = t, beta = 1 - t.

So x given z has the distribution p_t(x|z) = N(x; alpha_t z, beta_t^2 I). It moves with the velocity

    u_t(x|z) = alpha'_t z + beta'_t eps     the conditional vector field; ' is d/dt.

Many pairs (z, eps) meet in one x. The mean of their velocities, E[u_t(x|z) | x], is the marginal
vector field u_t(x). A network learns it, because following it carries the noise to the data. The
loss needs no more than this: `sample` gives x, and `target` gives u_t(x|z).

The rest translates u into three other things that a network may predict: z, eps and the score,
grad log p_t(x), where p_t is the density of x when z is drawn from the data. For one pair, x and u
are two linear equations in z and eps, and D is their determinant. Solved, they give z and eps. The
score of the Gaussian p_t(x|z) is -(x - alpha z) / beta^2 = -eps / beta, and that of p_t(x) is its
mean over all pairs that meet in x. Because these formulas are linear, they hold for means: the
marginal field gives the mean of z at x, the mean of eps, and the score.

    D = alpha' beta - alpha beta'           1 for CondOT, pi/2 for Cosine
    z = (beta u - beta' x) / D              E[z|x], if u is the marginal field
    eps = (alpha' x - alpha u) / D          E[eps|x]
    score = -eps / beta
    u = a x + b score                       and back, as the lecture has it (`a_b` gives a and b)

Lecture 4, "Classifier-free guidance".
Shapes: x, z, eps, u and score are (B, ...), all of one shape; t is (B,) or one number, in [0, 1].
"""
import math

import torch


def require_same_shape(a, b):
    """ValueError where the shapes differ, because torch might stretch one tensor over the other."""
    if a.shape != b.shape:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ")


def per_sample(value, *alike):
    """Reshape t or w, a number or (B,), to (B, 1, ..., 1), so that it multiplies tensors (B, ...).

    In float32 or wider, because bfloat16 would round t. ValueError where value is neither, or where
    the tensors differ in shape.
    """
    x = alike[0]
    for other in alike[1:]:
        require_same_shape(x, other)
    wide = torch.promote_types(x.dtype, torch.float32)
    value = torch.as_tensor(value, dtype=wide, device=x.device)
    if value.ndim > 0 and value.shape != x.shape[:1]:
        raise ValueError(f"t or w of shape {tuple(value.shape)}: a number or ({x.shape[0]},) is "
                         "expected")
    return value.expand(x.shape[0]).view(-1, *[1] * (x.ndim - 1))


def cast_like(x, value):
    """value in the type of x, since factors are wide; where x holds integers, as it is."""
    return value.to(x.dtype) if x.is_floating_point() else value


class GaussianPath:
    """What all paths share. A path itself is four functions of t: alpha, beta, d_alpha, d_beta."""

    # ------------------------------------------------ what the loss needs

    def sample(self, z, eps, t):
        """x = alpha z + beta eps: a draw from p_t(x|z) if eps is a draw from N(0, I)."""
        t = per_sample(t, z, eps)
        return cast_like(z, self.alpha(t) * z + self.beta(t) * eps)

    def target(self, z, eps, t):
        """u_t(x|z) = alpha' z + beta' eps at x = alpha z + beta eps."""
        t = per_sample(t, z, eps)
        return cast_like(z, self.d_alpha(t) * z + self.d_beta(t) * eps)

    # ------------------------------------------------ conversions

    def D(self, t):
        """The determinant alpha' beta - alpha beta'. Where it is 0, u does not give z and eps."""
        return self.d_alpha(t) * self.beta(t) - self.alpha(t) * self.d_beta(t)

    def u_to_data(self, u, x, t):
        """z = (beta u - beta' x) / D."""
        t = per_sample(t, x, u)
        return cast_like(x, (self.beta(t) * u - self.d_beta(t) * x) / self.D(t))

    def u_to_eps(self, u, x, t):
        """eps = (alpha' x - alpha u) / D."""
        t = per_sample(t, x, u)
        return cast_like(x, (self.d_alpha(t) * x - self.alpha(t) * u) / self.D(t))

    def u_to_score(self, u, x, t):
        """grad log p_t(x) = -eps / beta; infinite at t = 1."""
        eps = self.u_to_eps(u, x, t)
        t = per_sample(t, x)
        return cast_like(x, -eps / self.beta(t))

    def eps_to_u(self, eps, x, t):
        """u = (alpha' x - D eps) / alpha; 0/0 at alpha = 0, where x = eps says nothing of z."""
        t = per_sample(t, x, eps)
        return cast_like(x, (self.d_alpha(t) * x - self.D(t) * eps) / self.alpha(t))

    def eps_to_data(self, eps, x, t):
        """z = (x - beta eps) / alpha; infinite at alpha = 0."""
        t = per_sample(t, x, eps)
        return cast_like(x, (x - self.beta(t) * eps) / self.alpha(t))

    def data_to_u(self, z, x, t):
        """u = (D z + beta' x) / beta, on CondOT (z - x) / (1 - t); 0/0 at t = 1, where x = z."""
        t = per_sample(t, x, z)
        return cast_like(x, (self.D(t) * z + self.d_beta(t) * x) / self.beta(t))

    def a_b(self, t, x):
        """a = alpha'/alpha and b = (alpha' beta^2 - beta' beta alpha)/alpha.

        Factors for x, (B, 1, ..., 1) each, infinite at alpha = 0. Lecture 4, the slide with "FACT".
        """
        t = per_sample(t, x)
        alpha, beta = self.alpha(t), self.beta(t)
        a = self.d_alpha(t) / alpha
        b = (self.d_alpha(t) * beta**2 - self.d_beta(t) * beta * alpha) / alpha
        return a, b

    def score_to_u(self, score, x, t):
        """u = a_t x + b_t score, for alpha > 0; Lecture 4, the slide with "FACT"."""
        require_same_shape(score, x)
        a, b = self.a_b(t, x)
        return cast_like(x, a * x + b * score)


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
