"""Networks that predict z or eps, as vector fields."""
from functools import partial

import torch
from test_cfg import ALL_PATHS, MANY, MIX, TIMES, close, distance

from cfg_min import euler
from chapters.predictions import DataField, EpsField
from paths import CondOT


@ALL_PATHS
def test_a_network_that_predicts_z_is_the_field_of_that_z(path, x):
    """u = (D z + beta' x) / beta, from last_t on with the alpha and beta of last_t."""
    def net(x, t, y):
        return MIX.data_and_eps(path, x, t, y)[0]

    for t in TIMES:
        close(DataField(net, path, 0.98)(x, t, MANY), MIX.u(path, x, t, MANY), 1e-6)


@ALL_PATHS
def test_from_last_t_on_the_formulas_take_it_for_t(path, x):
    """u(.95) = u(.9) for last_t = .9, though net gets the true t; EpsField begins at .001."""
    data = DataField(lambda x, t, y: x.sin(), path, 0.9)
    close(data(x, 0.95, MANY), path.data_to_u(x.sin(), x, 0.9))
    eps = EpsField(lambda x, t, y: x.cos(), path, 0.9, bound=9.0)
    close(eps(x, 0.95, MANY), path.eps_to_u(x.cos(), x, 0.9))
    close(eps(x, 0.0, MANY), eps(x, 0.001, MANY))
    seen = DataField(lambda x, t, y: 0 * x + t, path, 0.9)
    z = path.u_to_data(seen(x, 0.95, MANY), x, 0.9)
    close(z, torch.full_like(x, 0.95))


def test_the_last_step_of_euler_ends_at_the_networks_z(x):
    """x + (1 - t) (z - x) / (1 - t) = z, on CondOT; but not where last_t < t: noise is left."""
    def end(t, last_t):
        field = partial(DataField(lambda x, t, y: x.sin(), CondOT(), last_t), y=MANY)
        return euler(field, x, 1, t0=t)

    close(end(0.96, 0.98), x.sin())
    close(end(0.995, 0.9999), x.sin())
    assert distance(end(0.995, 0.98), x.sin()) > 0.1


@ALL_PATHS
def test_a_network_that_predicts_eps_is_the_field_of_the_clamped_z(path, x):
    """z = (x - beta eps) / alpha, clamped to [-bound, bound], gives u."""
    def net(x, t, y):
        return MIX.data_and_eps(path, x, t, y)[1]

    for t in TIMES:
        z, _ = MIX.data_and_eps(path, x, t, MANY)
        close(EpsField(net, path, 0.98, bound=9.0)(x, t, MANY), MIX.u(path, x, t, MANY), 1e-6)
        u = EpsField(net, path, 0.98, bound=0.4)(x, t, MANY)
        close(path.u_to_data(u, x, t), z.clamp(-0.4, 0.4), 1e-6)
