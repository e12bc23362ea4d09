"""A training step of each method as the authors' published code does it, in an ordinary loop written anew.

Each loop computes what that code computes, the needless passes included; `forwards` of K steps is what its passes cost.
For the comparison of results (`like_ours`) a loop takes the package's definitions where the code's differ: the named
uniform start, an attack in eval mode, class statistics from the attack's last look. `differs` says which those are.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training.steps import CLASSES, TINY_EPS, Arm, K

from ham_reference.noise import in_cube

START = "starts from 0.001 * N(0, 1)"
TRAIN_MODE = "attacks in train mode"
BETA = 6.0


class Loop(Arm):
    """Madry's PGD-AT as common code has it: the attack's backward() makes the parameters' gradients as well."""

    kinds = ("step",)
    forwards = 3 * K + 3
    gaussian_start = False
    tolerance = 2e-5  # of a loss, relative: how far `like_ours` may be from our method's
    differs: tuple[str, ...] = ()

    def __init__(self, name: str, model: nn.Module, lr: float = 0.0, eps: float = TINY_EPS, like_ours: bool = False):
        super().__init__(name, model, lr)
        self.eps, self.step_size, self.like_ours = eps, eps / K, like_ours
        self.steps_done, self.loss = 0, torch.zeros(())
        self.seen = torch.zeros(0)  # logits at the attack's last look

    def step(self, kind: str, x: Tensor, y: Tensor) -> tuple[int, int]:
        self.train_batch(x, y)
        self.steps_done += 1
        return len(y), len(y)

    def train_batch(self, x: Tensor, y: Tensor) -> None:
        x_adv = self.attack(x, y)
        self.model.train()
        self.learn(lambda: F.cross_entropy(self.model(x_adv), y))

    def end_epoch(self) -> None:
        """What it keeps over epochs."""

    # ------------------------------------------------------------ what loops are made of
    def start(self, x: Tensor, eps: float | Tensor) -> Tensor:
        if self.like_ours:
            return (x + in_cube(x, 1.0, 0, self.steps_done) * eps).clamp(0, 1)
        if self.gaussian_start:
            return x + 0.001 * torch.randn_like(x)
        return (x + (2 * torch.rand_like(x) - 1) * eps).clamp(0, 1)

    def gradient(self, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Of the attack's loss to the images; here the gradients of the parameters are made and thrown away."""
        self.seen = self.model(x_adv)
        F.cross_entropy(self.seen, y, reduction="sum").backward()
        return x_adv.grad

    def attack(
        self, x: Tensor, y: Tensor, eps: float | Tensor | None = None, step_size: float | Tensor | None = None
    ) -> Tensor:
        self.mode_of_attack()
        eps = self.eps if eps is None else eps
        step_size = self.step_size if step_size is None else step_size
        x_adv = self.start(x, eps)
        for _ in range(K):
            x_adv.requires_grad_()
            gradient = self.gradient(x_adv, x, y)
            x_adv = x_adv.detach() + step_size * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
        return x_adv

    def mode_of_attack(self) -> None:
        self.model.train(TRAIN_MODE in self.differs and not self.like_ours)

    def learn(self, loss_of) -> None:
        self.optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()


def kl(p_logits: Tensor, q: Tensor) -> Tensor:
    """(n,) KL(q || p) of each row, as kl_div has it."""
    return F.kl_div(F.log_softmax(p_logits, 1), q, reduction="none").sum(1)


# ------------------------------------------------------------ regularised losses
class TRADES(Loop):
    """The clean prediction anew in every step of the attack, and twice in the update."""

    forwards = 3 * K + 9
    gaussian_start = True
    differs = (START,)

    def gradient(self, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        self.seen = self.model(x_adv)
        loss = kl(self.seen, F.softmax(self.model(x), 1)).sum()
        return torch.autograd.grad(loss, [x_adv])[0]

    def train_batch(self, x: Tensor, y: Tensor) -> None:
        x_adv = self.attack(x, y)
        self.model.train()
        self.learn(lambda: self.loss_of(x, x_adv, y))

    def loss_of(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        natural = F.cross_entropy(self.model(x), y)
        return natural + BETA * kl(self.model(x_adv), F.softmax(self.model(x), 1)).mean()


class MART(Loop):
    forwards = 2 * K + 6
    gaussian_start = True
    differs = (START,)
    beta = 5.0

    def gradient(self, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        self.seen = self.model(x_adv)
        return torch.autograd.grad(F.cross_entropy(self.seen, y), [x_adv])[0]

    def train_batch(self, x: Tensor, y: Tensor) -> None:
        x_adv = self.attack(x, y)
        self.model.train()
        self.learn(lambda: self.loss_of(self.model(x), self.model(x_adv), y))

    def loss_of(self, clean: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        p = F.softmax(adversarial, 1)
        ranked = p.argsort(1)
        other = torch.where(ranked[:, -1] == y, ranked[:, -2], ranked[:, -1])
        boosted = F.cross_entropy(adversarial, y) + F.nll_loss(torch.log(1.0001 - p + 1e-12), other)
        q = F.softmax(clean, 1)
        true = q.gather(1, y[:, None]).squeeze(1)
        divergence = F.kl_div(torch.log(p + 1e-12), q, reduction="none").sum(1)
        return boosted + self.beta * (divergence * (1.0000001 - true)).mean()


# ------------------------------------------------------------ weights perturbed
class AWP(Loop):
    """PGD-AT with a proxy that takes the step of ascent, a last look of the attack, and a clean pass for the log."""

    forwards = 3 * K + 8
    differs = (TRAIN_MODE,)
    tolerance = 1e-4  # the proxy's step is rounded to the size of its weights
    gamma = 0.01

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.proxy = copy.deepcopy(self.model)
        self.proxy_optimizer = torch.optim.SGD(self.proxy.parameters(), lr=0.01)

    def train_batch(self, x: Tensor, y: Tensor) -> None:
        x_adv = self.attack(x, y)
        with torch.no_grad():
            F.cross_entropy(self.model(x_adv), y, reduction="none")  # of restarts the attack keeps the best
        self.model.train()
        shift = self.ascent(x_adv, y)
        self.move(shift, self.gamma)
        self.learn(lambda: F.cross_entropy(self.model(x_adv), y))
        self.move(shift, -self.gamma)
        F.cross_entropy(self.model(x), y).item()

    def ascent(self, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.proxy.load_state_dict(self.model.state_dict())
        self.proxy.train()
        self.proxy_optimizer.zero_grad()
        (-F.cross_entropy(self.proxy(x_adv), y)).backward()
        self.proxy_optimizer.step()
        shift, moved = {}, self.proxy.state_dict()
        for name, old in self.model.state_dict().items():
            if "weight" in name and old.dim() > 1:
                by = moved[name] - old
                shift[name] = old.norm() / (by.norm() + 1e-20) * by
        return shift

    @torch.no_grad()
    def move(self, shift: dict[str, Tensor], gamma: float) -> None:
        for name, p in self.model.named_parameters():
            if name in shift:
                p.add_(gamma * shift[name])


# ------------------------------------------------------------ rows counted
class GAIRAT(Loop):
    """Counts the right looks of each row one by one, in Python."""

    shift = -1.0

    def gradient(self, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        gradient = super().gradient(x_adv, x, y)
        predicted = self.seen.argmax(1)
        for i in range(len(y)):
            if predicted[i] == y[i]:
                self.right[i] += 1
        return gradient

    def train_batch(self, x: Tensor, y: Tensor) -> None:
        self.right = torch.zeros(len(y))
        x_adv = self.attack(x, y)
        weights = (1 + torch.tanh(self.shift + 5 * (1 - 2 * self.right / K))) / 2
        weights = (weights * len(y) / weights.sum()).to(y.device)
        self.model.train()
        self.learn(lambda: (weights * F.cross_entropy(self.model(x_adv), y, reduction="none")).mean())


class BAT(TRADES):
    """Two attacks, from which rows leave one by one; each differentiates its clean pass in every step as well."""

    differs = (START, "two attacks with different noise", "the clean images pass last in the update")

    @staticmethod
    def forwards(h: float) -> float:
        """h: share of the rows that are wrong from the start, where no other row turns."""
        found = 9.0
        for looks in (1, 2):  # of a row that is wrong, before it leaves
            steps = K if h < 1 else looks
            found += 1 + 2 * steps + 3 * (looks + (steps - looks) * (1 - h))
        return found

    def step(self, kind: str, x: Tensor, y: Tensor) -> tuple[int, int]:
        super().step(kind, x, y)
        return self.wrong_at_start, len(y)

    def train_batch(self, x: Tensor, y: Tensor) -> None:
        last_right, _, order = self.walked(x, y, looks=0, before=True)
        past, clean, _ = self.walked(x, y, looks=1, before=False)
        self.model.train()
        self.learn(lambda: self.of_points(last_right, past, clean, y[order]))

    def walked(self, x: Tensor, y: Tensor, looks: int, before: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(points, their clean images, their rows), as rows leave: at a wrong look after so many others, or at the
        point before it."""
        self.model.eval()
        x_adv, rows, left = self.start(x, self.eps).clamp(0, 1), torch.arange(len(y), device=y.device), []
        control = [looks] * len(y)
        q, previous = self.model(x), x_adv
        for k in range(K):
            x_adv = x_adv.detach().requires_grad_()
            z = self.model(x_adv)
            predicted, goes, stays = z.argmax(1), [], []
            for i in range(len(rows)):
                wrong = predicted[i] != y[rows[i]]
                (goes if wrong and control[i] == 0 else stays).append(i)
                control[i] -= int(wrong)
            if k == 0:
                self.wrong_at_start = int((predicted != y).sum())
            left.append(((previous if before else x_adv)[goes].detach(), rows[goes]))
            self.model.zero_grad()
            kl(z, F.softmax(q, 1)).sum().backward(retain_graph=True)
            gradient, control = x_adv.grad[stays], [control[i] for i in stays]
            x_adv, rows, q = x_adv.detach()[stays], rows[stays], q[stays]
            previous = x_adv
            if not stays:
                break
            x_adv = x_adv + self.step_size * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x[rows] - self.eps), x[rows] + self.eps).clamp(0, 1)
        points, order = (torch.cat(parts) for parts in zip(*left, (x_adv, rows), strict=True))
        return points, x[order], order

    def of_points(self, last_right: Tensor, past: Tensor, clean: Tensor, y: Tensor) -> Tensor:
        if self.like_ours:  # what the running statistics see last
            z = self.model(clean)
        right, wrong = self.model(last_right), self.model(past)
        if not self.like_ours:
            z = self.model(clean)
        uniform = torch.full_like(wrong, 0.1)
        natural, robust = F.cross_entropy(right, y), kl(wrong, F.softmax(z, 1)).mean()
        return natural + BETA * robust + sum(kl(uniform, F.softmax(f, 1)).mean() for f in (right, wrong))


# ------------------------------------------------------------ classes
def by_label(values: Tensor, y: Tensor) -> Tensor:
    """(n, 1, 1, 1) value of each row's class, as published loops expand it: row by row in Python."""
    rows = torch.ones(len(y), 1, 1, 1, device=y.device)
    for i in range(len(y)):
        rows[i] = values[y[i]]
    return rows


def sums_by_class(values: Tensor, y: Tensor) -> Tensor:
    return torch.stack([values[y == c].sum(0) for c in range(CLASSES)])


class CFA(Loop):
    """On PGD-AT: eps by class, and a clean pass in train mode for the log."""

    forwards = 3 * K + 4
    differs = (TRAIN_MODE, "robust accuracies of classes are of the update's logits")
    lam_eps, lam_beta = 0.5, 0.5

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        device = next(self.model.parameters()).device
        self.right, self.rows = torch.zeros(2, CLASSES, device=device)
        self.robust = self.right / self.rows

    def train_batch(self, x: Tensor, y: Tensor) -> None:
        x_adv = self.attack(x, y, self.eps_of(y))
        self.model.train()
        self.learn(lambda: F.cross_entropy(self.adversarial(x_adv, y), y))
        F.cross_entropy(self.model(x), y).item()

    def adversarial(self, x_adv: Tensor, y: Tensor) -> Tensor:
        z = self.model(x_adv)
        judged = self.seen if self.like_ours else z.detach()
        self.right += sums_by_class((judged.argmax(1) == y).float(), y)
        self.rows += torch.bincount(y, minlength=CLASSES)
        return z

    def eps_of(self, y: Tensor) -> Tensor:
        return self.eps * by_label(self.factors(self.lam_eps), y)

    def factors(self, lam: float) -> Tensor:
        """(classes,) 1 in the first epoch, and for a class that had no rows in the last one."""
        return torch.where(self.robust.isnan(), 1.0, lam + self.robust)

    def end_epoch(self) -> None:
        self.robust = self.right / self.rows
        self.right, self.rows = torch.zeros_like(self.right), torch.zeros_like(self.rows)


class CFATRADES(CFA):
    """On TRADES: eps and beta by class."""

    forwards = 3 * K + 10
    gaussian_start = True
    differs = (START, *CFA.differs[1:])
    lam_eps = 0.3
    gradient = TRADES.gradient

    def train_batch(self, x: Tensor, y: Tensor) -> None:
        x_adv = self.attack(x, y, self.eps_of(y))
        self.model.train()
        self.learn(lambda: self.loss_of(x, x_adv, y, BETA * self.factors(self.lam_beta)[y]))
        F.cross_entropy(self.model(x), y).item()

    def loss_of(self, x: Tensor, x_adv: Tensor, y: Tensor, beta: Tensor) -> Tensor:
        natural = F.cross_entropy(self.model(x), y, reduction="none")
        divergence = kl(self.adversarial(x_adv, y), F.softmax(self.model(x), 1))
        return ((natural + beta * divergence) / (1 + beta)).mean()


class DAFA(Loop):
    """TRADES without needless passes; eps, step and weight by class from the second epoch on."""

    forwards = 2 * K + 7
    gaussian_start = True
    differs = (START, "predictions by class are of the update's logits")

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        device = next(self.model.parameters()).device
        self.sums, self.rows = torch.zeros(CLASSES, CLASSES, device=device), torch.zeros(CLASSES, device=device)
        self.class_weights: Tensor | None = None

    def gradient(self, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        self.seen = self.model(x_adv)
        return torch.autograd.grad(kl(self.seen, self.clean).sum(), [x_adv])[0]

    def train_batch(self, x: Tensor, y: Tensor) -> None:
        self.mode_of_attack()
        with torch.no_grad():
            self.clean = F.softmax(self.model(x), 1)
        factor = 1.0 if self.class_weights is None else self.class_weights[y].view(-1, 1, 1, 1)
        x_adv = self.attack(x, y, factor * self.eps, factor * self.step_size)
        weights = 1.0 if self.class_weights is None else self.class_weights[y]
        self.model.train()
        self.learn(lambda: self.loss_of(x, x_adv, y, weights))

    def loss_of(self, x: Tensor, x_adv: Tensor, y: Tensor, weights: float | Tensor) -> Tensor:
        clean, adversarial = self.model(x), self.model(x_adv)
        if self.class_weights is None:
            judged = self.seen if self.like_ours else adversarial.detach()
            self.sums += sums_by_class(F.softmax(judged.detach(), 1), y)
            self.rows += torch.bincount(y, minlength=CLASSES)
        natural = weights * F.cross_entropy(clean, y, reduction="none")
        return (natural + BETA * kl(adversarial, F.softmax(clean, 1))).mean()

    def end_epoch(self) -> None:
        if self.class_weights is not None:
            return
        s = self.sums / self.rows[:, None].clamp_min(1)
        w = [1.0] * CLASSES
        for i in range(CLASSES):
            for j in range(CLASSES):
                if i != j:
                    w[i] += float(s[i, j] * s[j, j] if s[i, i] < s[j, j] else -s[j, i] * s[i, i])
        self.class_weights = torch.tensor(w, device=self.sums.device).clamp_min(0.05)


class WAT(Loop):
    """TRADES whose attack makes the parameters' gradients through both branches; rows weighed by class.

    Its pass over held-out images once an epoch is not part of a step.
    """

    forwards = 6 * K + 6
    gaussian_start = True
    differs = (START, "costs of classes are of held-out images, after each epoch")
    eta = 0.1

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        device = next(self.model.parameters()).device
        self.totals, self.costs = torch.zeros(CLASSES + 1, device=device), []

    def gradient(self, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        z, clean = self.model(x_adv), self.model(x)
        kl(z, F.softmax(clean, 1)).sum().backward()
        self.seen, self.clean = z.detach(), clean.detach()
        return x_adv.grad

    def train_batch(self, x: Tensor, y: Tensor) -> None:
        x_adv = self.attack(x, y)
        if self.like_ours:
            with torch.no_grad():
                cost = F.cross_entropy(self.clean, y, reduction="none") + BETA * kl(self.seen, self.clean.softmax(1))
            self.costs.append((cost, y))
        w = CLASSES * torch.softmax(self.eta * self.totals, 0)
        weights = w[y] + w[-1]
        self.model.train()
        self.learn(lambda: self.loss_of(self.model(x), self.model(x_adv), y, weights))

    def loss_of(self, clean: Tensor, adversarial: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        rows = F.cross_entropy(clean, y, reduction="none") + BETA * kl(adversarial, F.softmax(clean, 1))
        return (weights * rows).mean()

    def end_epoch(self) -> None:
        if not self.costs:
            return
        cost, y = (torch.cat(parts) for parts in zip(*self.costs, strict=True))
        counts = torch.bincount(y, minlength=CLASSES)
        means = torch.where(counts > 0, sums_by_class(cost, y) / counts.clamp_min(1), cost.mean())
        self.totals += torch.cat([means, cost.mean()[None]])
        self.costs = []


class FSR(Loop):
    """TRADES behind a pass of its own, which attacks all images once more, each batch on a copy of the model.

    Of that pass, made before each epoch, a step has one batch. The update's clean and attacked passes are made twice.
    """

    forwards = 3 * K + 12 + 3 * K + 2
    gaussian_start = True
    differs = (START, "confusions are counts, of a pass of its own by PGD on the cross entropy")
    gradient = TRADES.gradient
    share, lowered = 0.3, 0.1

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.counts, self.rows = torch.zeros(CLASSES, CLASSES), torch.zeros(CLASSES)
        self.confusion = torch.ones(CLASSES, CLASSES)

    def train_batch(self, x: Tensor, y: Tensor) -> None:
        if not self.like_ours:
            self.count(self.pgd_pass(x, y), y)
        x_adv = self.attack(x, y)
        if self.like_ours:
            self.count(self.seen.detach().clone(), y)
        self.model.train()
        self.learn(lambda: self.loss_of(x, x_adv, y))

    def pgd_pass(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits of a copy of the model under PGD, whose backward() makes the copy's gradients too."""
        copied = copy.deepcopy(self.model).eval()
        copied(x)
        x_adv = x + (2 * torch.rand_like(x) - 1) * self.eps
        for _ in range(K):
            x_adv = x_adv.detach().requires_grad_()
            F.cross_entropy(copied(x_adv), y).backward()
            x_adv = (x + (x_adv + self.step_size * x_adv.grad.sign() - x).clamp(-self.eps, self.eps)).clamp(0, 1)
        with torch.no_grad():
            return self.model.eval()(x_adv)

    def count(self, z: Tensor, y: Tensor) -> None:
        for i in range(len(y)):
            z[i, y[i]] -= self.lowered * (z[i, y[i]].abs() if self.like_ours else z[i, y[i]])
        predicted = z.argmax(1)
        for i in range(len(y)):
            if predicted[i] != y[i]:
                self.counts[predicted[i], y[i]] += 1
        if self.like_ours:
            self.rows += torch.bincount(y.cpu(), minlength=CLASSES)

    def loss_of(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        natural = F.cross_entropy(self.model(x), y)
        robust = kl(self.model(x_adv), F.softmax(self.model(x), 1)).mean()
        z = self.model(x_adv)
        predicted, weights = z.argmax(1), torch.zeros(len(y))
        for i in range(len(y)):
            weights[i] = self.confusion[predicted[i], y[i]]
        confused = (weights.to(y.device) * F.cross_entropy(z, y, reduction="none")).mean()
        return (1 - self.share) * natural + BETA * robust + self.share * confused

    def end_epoch(self) -> None:
        u, _, v = torch.svd(self.counts / self.rows.clamp_min(1) if self.like_ours else self.counts)
        g = torch.outer(u[:, 0], v[:, 0])
        if g.max() > g.min():
            self.confusion = 2 * (g - g.min()) / (g.max() - g.min()) + 0.01
        self.counts, self.rows = torch.zeros_like(self.counts), torch.zeros_like(self.rows)


class FAAL(Loop):
    """PGD-AT whose class weights solve a convex problem, built and solved for every batch by cvxpy."""

    forwards = 3 * K + 5
    differs = ("class margins are of the update's logits, times the rows of the class",)
    tolerance = 1e-3  # the solver's
    radius = 0.5

    def __init__(self, *args, **more):
        import cvxpy

        super().__init__(*args, **more)
        self.cp = cvxpy

    def train_batch(self, x: Tensor, y: Tensor) -> None:
        x_adv = self.attack(x, y)
        with torch.no_grad():
            self.model(x_adv)
        self.model.train()
        self.model(x)
        self.learn(lambda: self.loss_of(self.model(x_adv), y))

    def loss_of(self, z: Tensor, y: Tensor) -> Tensor:
        p = F.softmax((self.seen if self.like_ours else z).detach(), 1)
        true = p.gather(1, y[:, None]).squeeze(1)
        margin = p.scatter(1, y[:, None], 0).amax(1) - true
        by_class, counts = sums_by_class(margin, y), torch.bincount(y, minlength=CLASSES)
        if self.like_ours:
            by_class = torch.where(counts > 0, by_class / counts.clamp_min(1), margin.mean())
        weights = CLASSES * self.solved(by_class)
        return (weights[y] * F.cross_entropy(z, y, reduction="none")).mean()

    def solved(self, gain: Tensor) -> Tensor:
        """Probabilities of classes that gain most within a KL ball around the uniform ones."""
        cp = self.cp
        p = cp.Variable(CLASSES, nonneg=True)
        uniform = torch.full((CLASSES,), 1 / CLASSES).numpy()
        near = [cp.sum(p) == 1, cp.sum(cp.kl_div(uniform, p)) <= self.radius]
        cp.Problem(cp.Maximize(p @ gain.cpu().numpy()), near).solve()
        return torch.tensor(p.value, dtype=torch.float32, device=gain.device)
