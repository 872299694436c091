"""The exact network of images, against the oracle, autograd and counting by hand."""
import re
from functools import partial

import pytest
import torch
from conftest import error_line
from test_cfg import ALL_PATHS, MANY, MIX, close, double, gradient, labels

from cfg_min import NULL, euler, guided_field
from chapters import exact
from chapters.exact import ExactNet, count_images, effective_number, find_nearest
from chapters.oracle import Mixture
from chapters.ways import interval_field
from experiments import guides
from experiments.exact import Digits, Grouped
from paths import CondOT
from support.command import execute

IMAGES, LABELS = MIX.mu, MIX.label              # four points of the plane, of three labels
SOFT = torch.rand(4, 10, generator=torch.Generator().manual_seed(0)).double()      # p(y|i)
TIMES = pytest.mark.parametrize("t", [0.02, 0.45, 0.97])


@ALL_PATHS
@TIMES
@pytest.mark.parametrize("width, std", [(0.0, 1e-6), (0.4, 0.4)])
def test_fields_are_those_of_a_mixture_of_narrow_gaussians(path, t, width, std, x):
    """u_t(x|y), for y of each kind and none, and p_t(y|x)."""
    mixture = Mixture(IMAGES, std=[std] * 4, weight=[0.25] * 4, label=LABELS)
    net = ExactNet(IMAGES, LABELS, path, width)
    for y in (MANY, labels(NULL, x)):
        close(net(x, t, y), mixture.u(path, x, t, y), tol=1e-6)
    close(net.posterior(x, t), mixture.posterior(path, x, t), tol=1e-6)


@ALL_PATHS
@TIMES
@pytest.mark.parametrize("width", [0.0, 0.4])
def test_score_with_unsure_labels_is_the_gradient_of_log_p(path, t, width, x):
    """p_t(x|y) is in proportion to sum_i p(y|i) N(x; alpha z_i, alpha^2 width^2 + beta^2)."""
    alpha, beta = path.alpha(double(t)), path.beta(double(t))
    var = alpha**2 * width**2 + beta**2
    net = ExactNet(IMAGES, SOFT, path, width)
    for p_y, y in ((SOFT[:, 7], labels(7, x)), (torch.ones(4), labels(NULL, x))):
        def log_p(v):
            distances = (v[:, None] - alpha * IMAGES).square().sum(dim=2)
            return (p_y.log() - distances / (2 * var)).logsumexp(dim=1)

        close(path.u_to_score(net(x, t, y), x, t), gradient(log_p, x))


def test_a_batch_is_its_images_one_by_one():
    """Images (B, C, H, W), each with its own t (B,) and label, or in rows of pixels."""
    net = ExactNet(torch.randn(9, 1, 2, 3).double(), torch.arange(9) % 3)
    x = torch.randn(6, 1, 2, 3).double()
    t = torch.rand(6).double()
    u = net(x, t, MANY)
    for k in range(6):
        row = x[k:k + 1].flatten(1)
        close(u[k:k + 1].flatten(1), net(row, t[k].item(), MANY[k:k + 1]))


def test_late_guidance_changes_nothing_and_samples_are_images():
    """At t = 0.9 x says which image it is; without guidance all images come equally often."""
    net = ExactNet(IMAGES, LABELS)
    y = torch.tensor([0, 1, 2]).repeat(300)
    x = torch.randn(900, 2).double()
    z = euler(partial(guided_field, net, y=y, w=1), x, 25)
    found = find_nearest(IMAGES, z)
    close(z, IMAGES[found])
    assert torch.equal(LABELS[found], y)
    assert effective_number(IMAGES, z[y == 0], y[y == 0])[0] == pytest.approx(2, abs=0.05)
    x = CondOT().sample(z, 0.3 * torch.randn_like(z), 0.9)
    close(guided_field(net, x, 0.9, y, 8), guided_field(net, x, 0.9, y, 1))


def test_an_interval_field_minds_rounding(x):
    """0.1 + 0.2 is a little more than 0.3."""
    net = ExactNet(IMAGES, LABELS)
    for t, w in ((0.1 + 0.2, 3), (0.31, 1), (0.1, 3), (0.09, 1)):
        u = interval_field(net, x, t, MANY, 3, low=0.1, high=0.3)
        close(u, guided_field(net, x, t, MANY, w))


@TIMES
def test_grouped_by_label_it_is_the_same_network(t, x):
    """experiments.exact.Grouped, which the tables use; y of each kind, and none."""
    net = ExactNet(IMAGES, LABELS, width=0.4)
    grouped = Grouped(IMAGES, LABELS, width=0.4)
    for y in (MANY, labels(NULL, x)):
        close(grouped(x, t, y), net(x, t, y))
        close(grouped(x, double(t).expand(6), y), net(x, t, y))


# ---------------------------------------------------------------- counting

def count_pairs(found, of):
    """Pairs of samples of a label, over those of them that are one image; one by one."""
    pairs = [(i, j) for i in range(len(of)) for j in range(i) if of[i] == of[j]]
    return len(pairs) / sum(found[i] == found[j] for i, j in pairs)


def test_effective_number_counts_pairs():
    """Image 7 for both labels is no pair. Error: sqrt((n-1)/n sum (each left out - mean)^2)."""
    found, of = [7, 7, 7, 4, 7, 5, 5, 5, 6], [0, 0, 0, 0, 1, 1, 1, 1, 1]
    number, error = count_images(torch.tensor(found), torch.tensor(of))
    assert number == count_pairs(found, of) == 16 / 6
    without = double([count_pairs(found[:k] + found[k + 1:], of[:k] + of[k + 1:])
                      for k in range(9)])
    close(error, (8 / 9 * (without - without.mean()).square().sum()).sqrt())


def test_error_is_the_spread_of_the_effective_number():
    """400 samples, 300 times, of ten images, drawn unevenly: 1 / sum p^2 in the mean."""
    p = double([16, 8, 8, 4, 4, 2, 2, 1, 1, 1])
    p = p / p.sum()
    draws = torch.multinomial(p.expand(300, 10), 400, replacement=True)     # (300, 400)
    counts = double([count_images(found, labels(0, found)) for found in draws])
    number, error = counts.mean(dim=0)
    assert number.item() == pytest.approx(1 / p.square().sum().item(), rel=0.01)
    assert error.item() == pytest.approx(counts[:, 0].std().item(), rel=0.15)


def test_rules_are_counted_on_exact_fields():
    """At w = 1 most rules do not guide, so that the two images of a label come equally often."""
    def left(name, w):
        rule = guides.rules_of(1 / 25)[name]
        return guides.count_left(IMAGES.float(), LABELS, rule, w, steps=25)

    assert left("CFG", 1.0) == left("interval", 1.0) == left("rising scale", 1.0)
    assert left("CFG", 1.0) == pytest.approx(3 / 2.5, abs=0.02)         # labels have 2, 1 and 1
    assert left("CFG", 8.0) < left("interval", 8.0)


# ---------------------------------------------------------------- the command

def test_command_counts_on_any_data(few, capsys):
    """Each way has a row, and every sample its label; then the t from which guidance is free."""
    argv = ["--data", str(few), "--digits", "5", "--samples", "4", "--w", "2.5"]
    assert not execute(partial(exact.main, argv))
    out = capsys.readouterr().out
    assert out.count("100.0 %") == 9 + 10
    assert "Algorithm 8, w = 2.5 " in out and "guidance costs nothing from t = " in out


def test_the_first_t_that_costs_nothing(capsys):
    """Within two errors of the unguided count, 100 +- 3; where there is none, t = 1."""
    exact.print_first_free([0, 0.04, 0.08], [(80, 9), (95, 9), (120, 9)], (100, 3), "w = 3")
    exact.print_first_free([0, 0.04], [(80, 9), (93, 9)], (100, 3), "w = 3")
    assert re.findall("from t = (.{4}) on", capsys.readouterr().out) == ["0.04", "1.00"]


@pytest.mark.parametrize("line", ["--digits 200", "--data none.npz", "--w many", "--samples 1"])
def test_bad_input_is_one_line(line, few, capsys):
    argv = ["--data", str(few), *line.split()]
    try:
        assert execute(partial(exact.main, argv)) == 2
    except SystemExit as error:                 # argparse's way out
        assert error.code == 2
    assert line.split()[1] in error_line(capsys)


@torch.no_grad()
def test_the_tables_of_starts_are_those_of_the_lesson():
    """experiments.exact guides as chapters.exact does: the same noise ends at the same digits."""
    digits = Digits(5, 4)
    y, net = digits.y, ExactNet(digits.images, digits.labels)
    ours = digits.euler(3, low=0.1, high=1.0)()
    theirs = euler(partial(interval_field, net, y=y, w=3, low=0.1), digits.x, 25)
    assert torch.equal(find_nearest(digits.images, ours), find_nearest(digits.images, theirs))
