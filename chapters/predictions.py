"""What a network may predict: z or eps instead of u, each used as a vector field.

Many networks predict the data point z, or the noise eps, because either may be easier to learn than
u. At a given x and t each of them gives u (paths.py), so such a network becomes a vector field by
one formula, and guidance, samplers and, for z, the loss L_CFM stay as they are. Only the ends of
time need care, because the formulas divide there by a beta or alpha that goes to 0.

From z, u = (D z + beta' x) / beta; on CondOT (z - x) / (1 - t). Two uses want two things of it:

- In the loss an error of z is divided by 1 - t, so the last times would outweigh all others. So the
  formula stops at t = .98: later times are taken for .98.
- In sampling the last step must end at the predicted z, and it does if u is divided by the very
  1 - t that the step is long. So there the formula must not stop before the last step begins.

Therefore `last_t`, where the formula stops, has no default: train with .98, sample with .9999. The
network itself always gets the true t.
"""
import torch.nn as nn

from paths import per_sample


class DataField(nn.Module):
    """A network that predicts z, as a vector field: u = (D z + beta' x) / beta.

    net(x, t, y) -> z. last_t: the latest t in the formula, < 1.
    """

    def __init__(self, net, path, last_t):
        super().__init__()
        self.net = net
        self.path = path
        self.last_t = last_t

    def forward(self, x, t, y):
        z = self.net(x, t, y)
        t = per_sample(t, x).flatten().clamp(max=self.last_t)
        return self.path.data_to_u(z, x, t)


class EpsField(nn.Module):
    """A network that predicts eps, as a vector field: eps gives z, and z, clamped, gives u.

    net(x, t, y) -> eps. While alpha is small, a small error of eps is a large one of z. So z is
    clamped to [-bound, bound], the range of the data, as Ho et al. 2020 do, and the formula begins
    at t = .001. last_t: the latest t in it, < 1. Its loss is that of eps (chapters/ddpm.py).
    """

    def __init__(self, net, path, last_t, bound):
        super().__init__()
        self.net = net
        self.path = path
        self.last_t = last_t
        self.bound = bound

    def forward(self, x, t, y):
        eps = self.net(x, t, y)
        t = per_sample(t, x).flatten().clamp(0.001, self.last_t)
        z = self.path.eps_to_data(eps, x, t).clamp(-self.bound, self.bound)
        return self.path.data_to_u(z, x, t)
