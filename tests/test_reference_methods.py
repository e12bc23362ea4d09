"""Every method against the reference, update by update over epochs: loss, examples, row weights, parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from engine_helpers import serve_any_half
from nets import sgd
from torch import nn

import ham_kernels as ham
from ham_kernels.attack.pgd import PGD, Attack
from ham_kernels.engine import PLAIN
from ham_kernels.methods.objective import EpochEnd
from ham_kernels.methods.registry import class_of, names
from ham_reference import METHODS
from ham_reference.attack import attack
from ham_reference.method import draw_seed

CLASSES, SEED = 5, 5
L2 = {"eps": 0.6, "step_size": 0.2, "steps": 4, "norm": "l2"}  # smooth in the gradient: no rounding grows to a sign
SCREENED = {"early_drop": True, "screen_steps": 2}
ONE_STEP = ("fgsm_rs", "n_fgsm", "natural")
RULES = ("hard_share", "kl_ball", "chi2", "exponentiated", "hedge", "dafa")


def distils(name: str) -> bool:
    return class_of(name).needs_teacher


def case(method: str, **switches):
    told = ", ".join(f"{name}={value}" for name, value in switches.items())
    return pytest.param(method, switches, id=f"{method}({told})")


CASES = [
    *(case(name) for name in METHODS),
    *(case(name, loss="boosted_ce", label_smoothing=0.1) for name in METHODS if not distils(name)),
    *(case(name, awp=0.01) for name in METHODS),
    *(case(name, **SCREENED, easy=easy) for name in METHODS for easy in ("drop", "stop", "jump")),
    *(case("pgd_at", class_weights=rule, class_from=2) for rule in RULES),
    *(case("pgd_at", class_weights=rule, class_strength=2.0, class_memory=0.5) for rule in RULES),
    *(case("ham", class_weights=rule) for rule in RULES),
    case("trades", class_weights="hard_share", reweight=True, **SCREENED, easy="stop", awp=0.01),
    case("pgd_at", **SCREENED, easy="jump", reweight=True, lam=0.3, step_sizes=(0.1, 0.6, 0.3, 0.2)),
    case("mart", class_weights="kl_ball", reweight=True, lam=0.2),
    case("gairat", class_weights="chi2", reweight=True, shift=0.5),
    case("cfa", base="pgd_at"),
    case("cfa", base="pgd_at", loss="boosted_ce", **SCREENED, easy="stop", lam_eps=0.4),
    case("cfa", class_weights="hard_share", lam_eps=0.6, lam_beta=0.1),
    case("dafa", strength=2.0, beta=3.0, step_sizes=(1.0, 0.5)),
    *(case(name, eps_factor=1.25) for name in METHODS),
    *(case(name, trust=0.5) for name in METHODS),
    case("pgd_at", trust=1.0, **SCREENED, easy="jump", reweight=True, class_weights="hedge"),
    case("fair", fast=True),
    case("fair", fast=True, loss="boosted_ce", trust=0.0, eps_factor=1.0, **SCREENED, easy="jump"),
    case("fair", fast=True, **SCREENED, easy="jump", awp=0.01),
    case("wat", eta=0.5, beta=2.0),
    case("wat", eta=0.5, class_from=3),
    case("rslad", clean_share=0.5, class_weights="hard_share", reweight=True),
    case("fair_ard", base="rslad", power=1.0),
    case("fair_ard", temperature=2.0, **SCREENED, easy="stop"),
    case("absld", rate=0.4),
    case("fair_tat", temperature=20.0, lam_eps=0.2),
    case("fair_tat", adaptive_eps=False, class_weights="hard_share"),
    case("cfol", gamma=0.2, eta=3.0, loss="boosted_ce", step_sizes=(1.0, 0.5)),
    case("frl", rate=0.5, eps_rate=2.0, slack=0.0),
    case("frl", remargin=False, rate=2.0, slack=0.02, most=0.3, class_weights="chi2"),
    case("fsr", share=0.7, lowered=0.5, class_weights="hard_share"),
    case("fsr", share=0.7, class_from=3),
    case("bat", beta=2.0, entropy=0.3, reweight=True, class_weights="hard_share"),
    case("bat", **SCREENED, easy="stop", reweight=True, step_sizes=(0.1, 0.6, 0.3, 0.2), awp=0.01),
    case("fat", base="trades", reweight=True, class_weights="hard_share"),
    case("fat", base="mart", beta=2.0, tau_from=(), **SCREENED, easy="stop"),
    case("mail", base="pgd_at", mail_from=1, slope=3.0),
    case("mail", base="pgd_at", reweight=True, class_weights="hard_share", **SCREENED, easy="stop", awp=0.01),
    case("mail", base="mart"),
    case("mail", base="mart", beta=2.0, slope=5.0, bias=-0.5, **SCREENED, easy="jump"),
    case("mail", beta=2.0, slope=5.0, bias=-0.5, mail_from=1),
]


def smooth_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.GELU(), nn.Flatten(), nn.Linear(6 * 36, CLASSES)
    )  # fmt: skip


@pytest.fixture
def any_half(monkeypatch):
    serve_any_half(monkeypatch)


@pytest.fixture
def epochs(seed):
    """Three epochs of batches (x, y) from a few patterns with noise; the second has no row of the last class."""
    g = torch.Generator().manual_seed(seed)
    patterns = torch.rand(CLASSES, 1, 6, 6, generator=g)

    def batch(classes: int):
        y = torch.randint(0, classes, (30,), generator=g)
        noise = torch.rand(30, 1, 6, 6, generator=g)
        return 0.5 * patterns[y] + 0.5 * noise, torch.where(noise[:, 0, 0, 0] < 0.2, (y + 1) % classes, y)

    return [[batch(c) for _ in range(n)] for c, n in ((CLASSES, 3), (CLASSES - 1, 2), (CLASSES, 2))]


# ---------------------------------------------------------------- ours and theirs
def trainer_of(model: nn.Module, name: str, switches: dict, **how) -> ham.Trainer:
    """Ours, by the method from the first epoch on; class-wise methods begin in the second."""
    fields = {"start_epoch": 1, **early(name), **switches}
    teacher = teacher_of(name)
    return ham.Trainer(model, sgd(model), class_of(name)(**fields), **L2, seed=SEED, **teacher, **how)


def reference_of(name: str, switches: dict):
    return METHODS[name](CLASSES, **L2, **teacher_of(name), **{**early(name), **switches})


def teacher_of(name: str) -> dict:
    """The same one for all, sure enough to have something to say."""
    if not distils(name):
        return {}
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        teacher = smooth_net()
        teacher[-1].weight.data.mul_(8)
        teacher(torch.rand(30, 1, 6, 6))
    return {"teacher": teacher}


def early(name: str) -> dict:
    return {
        "dafa": {"class_from": 2},
        "cfa": {"class_from": 2},
        "mail": {"mail_from": 2},
        "fat": {"tau_from": (2, 3)},
    }.get(name, {})


def examples_of(trainer: ham.Trainer) -> list:
    """A list that gets the Examples of every batch from here on."""
    made, objective = [], trainer.phases.method
    usual = objective.group_examples

    def noted(*batch, **how):
        parts = usual(*batch, **how)
        made.extend(parts)
        return parts

    objective.group_examples = noted
    return made


def weights_of(examples) -> torch.Tensor:
    """Row weights in the loss, but those that a method keeps for one of its terms (DAFA's)."""
    return torch.ones(examples.n_kept) if examples.weights is None else examples.weights


def end_epoch(trainer: ham.Trainer, epoch: int) -> None:
    trainer.phases.method.end_epoch(EpochEnd(epoch, trainer.model, None, None))


def same_start(trainer: ham.Trainer, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer]:
    twin = copy.deepcopy(trainer.model).to(dtype)
    optimizer = sgd(twin)
    optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
    return twin, optimizer


def test_every_method_has_a_reference():
    ours = {name for name in names() if class_of(name).__module__.startswith("ham_kernels.")}
    assert ours - set(METHODS) == {"atta", "free_at", "offsets", *ONE_STEP}  # in tests of their own


@pytest.mark.parametrize(("name", "switches"), CASES)
def test_same_updates_as_the_reference(name, switches, epochs):
    """Each from the same weights, since differences of rounding would grow; the class state is each one's own.

    The truth is the reference in fp64; what its fp32 errs by says how much rounding decides in this batch: much in an
    attack on a KL divergence that is still near 0, and in weights that go by differences between classes, divided by
    their spread. One run may be spared by chance, so that a second one, from images one rounding away, is asked too.
    """
    trainer, reference = trainer_of(smooth_net(), name, switches), reference_of(name, switches)
    made, kept = examples_of(trainer), []
    for epoch, batches in enumerate(epochs, 1):
        for x, y in batches:
            noise = {"seed": SEED, "step": trainer.steps_done, "epoch": epoch}

            def stepped(images, dtype=torch.float32, y=y, noise=noise, before=reference):
                """(after, update, state_dict) of the reference, from the trainer's weights."""
                twin, optimizer = same_start(trainer, dtype)
                after = copy.deepcopy(before)
                return after, after.step(twin, optimizer, images.to(dtype), y, **noise), twin.state_dict()

            plains = [stepped(images) for images in (x, torch.nextafter(x, torch.full_like(x, 0.5)))]
            if min(update.least_margin for _, update, _ in plains) < 1e-5:
                continue  # rounding may decide whether a row is hard
            _, truth, state = stepped(x, torch.float64)
            reference, _, _ = plains[0]
            loss = trainer.train_step(x, y, epoch).loss
            ours, rows = made[-1], truth.rows
            kept.append(ours.n_kept)
            assert ours.n_kept == len(rows)
            assert all(torch.equal(update.rows, rows) for _, update, _ in plains)
            assert_near("x_adv", ours.x_adv, truth.x_adv[rows], [u.x_adv[rows] for _, u, _ in plains], L2["eps"])
            assert_near("weights", weights_of(ours), truth.weights, [u.weights for _, u, _ in plains])
            assert_near("loss", loss, truth.loss, [u.loss for _, u, _ in plains], max(1, abs(truth.loss)))
            for key, value in trainer.model.state_dict().items():
                assert_near(key, value, state[key], [plain[key] for _, _, plain in plains])
        end_epoch(trainer, epoch)
        reference.end_epoch()
    assert len(kept) >= 4  # of 7


def assert_near(of: str, ours, truth, plains, scale: float = 1) -> None:
    """Ours errs by 2e-6 of the scale at most, and ten times as much as the worst of the plain fp32 runs does."""
    ours, truth, *plains = (torch.as_tensor(values, dtype=torch.float64) for values in (ours, truth, *plains))
    assert ours.shape == truth.shape
    if ours.numel():
        allowed = 2e-6 * scale + 10 * max((plain - truth).abs().max().item() for plain in plains)
        assert (ours - truth).abs().max().item() <= allowed, of


@pytest.mark.parametrize(
    ("name", "switches"), [case("fair"), case("mart"), case("wat"), case("dafa"), case("cfa"), case("faal")]
)
def test_same_losses_in_a_loop_of_ones_own(name, switches, epochs):
    """ham.loss with an Objective made once, which learns of epochs by end_epoch alone."""
    fields = {**early(name), **switches}
    objective = ham.methods.Objective(class_of(name)(**fields), PGD(**L2))
    model, reference, generator = smooth_net(), reference_of(name, switches), torch.Generator()
    optimizer = sgd(model)
    for epoch, batches in enumerate(epochs, 1):
        for seed, (x, y) in enumerate(batches):
            twin, tried = copy.deepcopy(model), copy.deepcopy(reference)
            drawn = draw_seed(generator.manual_seed(seed))
            update = tried.step(twin, sgd(twin), x, y, seed=drawn, step=0, epoch=epoch)
            if update.least_margin < 1e-5:
                continue  # rounding may decide whether a row is hard
            reference = tried
            loss = ham.loss(objective, model, x, y, generator=generator.manual_seed(seed))
            assert loss.item() == pytest.approx(update.loss, rel=2e-5, abs=1e-6)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        objective.end_epoch(EpochEnd(epoch, model, None, None))
        reference.end_epoch()


@pytest.mark.parametrize("raises", ["ce", "kl"])
def test_rows_with_an_eps_of_their_own_under_linf(raises, epochs):
    """The sign of a gradient near 0 is rounding, and moves the row from there on: at most 2 rows of 30."""
    model, (x, y) = smooth_net(), epochs[0][0]
    eps = torch.linspace(0.01, 0.3, len(x))
    pgd = PGD(eps, eps / 3, 5, "linf", loss=raises)
    with PLAIN.attacking(model):
        ours = Attack(model, x, y, pgd, seed=SEED, step=2)
        ours.steps(5)
    theirs = attack(model, x, y, eps=eps, step_size=eps / 3, steps=5, norm="linf", seed=SEED, step=2, raises=raises)
    differ = (ours.rows.x_adv - theirs.x_adv).abs().flatten(1).amax(1) > 1e-6
    assert int(differ.sum()) <= 2


@pytest.mark.parametrize("easy", ["drop", "stop", "jump"])
def test_cases_have_easy_and_hard_rows(easy, epochs):
    """Or the screening above would compare nothing."""
    model = smooth_net()
    trainer = trainer_of(model, "pgd_at", {**SCREENED, "easy": easy})
    shares = [trainer.train_step(*b, epoch).n_hard / 30 for epoch, bs in enumerate(epochs, 1) for b in bs]
    assert any(0.1 < share < 0.95 for share in shares)


ROUNDED = [
    *(case(name) for name in METHODS if name != "fair_tat"),
    case("pgd_at", awp=0.2),
    case("fair_tat", temperature=0.0),  # else rounding may draw another class to attack towards
]


@pytest.mark.parametrize(("name", "switches"), ROUNDED)
def test_bf16_errs_at_most_twice_as_much_as_autocast(name, switches, epochs, any_half):
    """Changes of all parameters in updates from the same weights, against fp32; both errors are summed over them."""
    trainer, reference = trainer_of(smooth_net(), name, switches, precision="bf16"), reference_of(name, switches)
    halved, errors = copy.deepcopy(reference), torch.zeros(2)
    for epoch, batches in enumerate(epochs, 1):
        for x, y in batches:
            full, optimizer = same_start(trainer)
            half, half_optimizer = same_start(trainer)
            step = trainer.steps_done
            reference.step(full, optimizer, x, y, seed=SEED, step=step, epoch=epoch)
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                halved.step(half, half_optimizer, x, y, seed=SEED, step=step, epoch=epoch)
            trainer.train_step(x, y, epoch)
            errors += torch.stack([distance(trainer.model, full), distance(half, full)])
        end_epoch(trainer, epoch)
        reference.end_epoch()
        halved.end_epoch()
    assert trainer.precision == "bf16"
    assert 0 < errors[0] <= 2 * errors[1]


def distance(model: nn.Module, other: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        squares = [((p - q) ** 2).sum() for p, q in zip(model.parameters(), other.parameters(), strict=True)]
        return torch.stack(squares).sum().sqrt()
