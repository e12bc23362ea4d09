"""The seam: what a training method is told, and what it may change. Imports no torch, so that help does not wait.

A method is one file of this package: a frozen dataclass below `Method` that has a `name`. Its fields are its flags,
its keys in TOML, their bounds and their words in titles; the functions that it overrides are what it does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from ..common import field_types
from ..common.field_types import Words

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..attack.pgd import PGD
    from .awp import Gradients
    from .mining import Examples
    from .objective import EpochEnd, Objective

_registry: dict[str, type[Method]] = {}

# settings that methods have other defaults of
CrossEntropy = Annotated[
    Literal["ce", "boosted_ce"], Words(by_value=(("boosted_ce", "boosted CE"), ("ce", "plain CE")))
]
ClassRule = Annotated[
    Literal["none", "hard_share", "kl_ball", "chi2", "exponentiated", "hedge", "dafa"],
    Words(
        by_value=(
            ("none", "no class weights"),
            ("hard_share", "classes by hard share"),
            ("kl_ball", "classes in a KL ball"),
            ("chi2", "classes in a χ² ball"),
            ("exponentiated", "classes exponentiated"),
            ("hedge", "classes hedged"),
            ("dafa", "classes by DAFA's rule"),
        ),
        off="none",
    ),
]


@dataclass(frozen=True)
class Method:
    """Method."""

    name: ClassVar[str]  # on the command line, in TOML, in folders
    title: ClassVar[str]  # in tables and figures
    counts_right: ClassVar[bool] = False  # the attack counts at how many of its points a row is right
    keeps_last_right: ClassVar[bool] = False  # the attack keeps the last point before a row is wrong, for the loss
    scales_weights: ClassVar[bool] = True  # weights have mean 1 over the rows in the loss; else they are used as made
    # `attack_on` needs its memory for the first batch too; else the first attack tells how many classes there are
    remembers_first: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False  # learns from another classifier, whose forward `cost` does not count
    treats_classes: ClassVar[bool] = False  # apart, by a rule of its own, from class_from on
    tunes_only: ClassVar[bool] = False  # moves little of a trained model, and trains none from the start
    remembers_rows: ClassVar[bool] = False  # a memory of places in a batch, which several processes cannot share
    knows_images: ClassVar[bool] = False  # remembers each by its number, which not every loader tells
    writes_rows_of: ClassVar[tuple[str, ...]] = ()  # large buffers of its memory, written through `rows_written` alone
    replays: ClassVar[int] = 1  # updates of each batch, one behind the other
    target_forwards: ClassVar[float] = 0  # of the full batch, before the attack
    update_forwards: ClassVar[float] = 3  # cost of an update, in forwards of its rows
    course: ClassVar[int] = 120  # epochs of the training that its defaults are from
    # trains on one step: watched for catastrophic overfitting, and replaced by PGD-AT where that is found
    one_step: ClassVar[bool] = False

    start_epoch: Annotated[int, Ge(1), Words("from epoch {}", scales=True)] = 1
    """First epoch (1-based) of the method; the warm-up before."""
    early_drop: Annotated[bool, Words(by_value=((True, "early drop"), (False, "no early drop")))] = False
    """Screen: examples that resist the first M attack steps are not attacked further."""
    easy: Annotated[
        Literal["drop", "stop", "jump"],
        Words(by_value=(("stop", "easy rows stop"), ("jump", "easy rows jump")), needs="early_drop"),
    ] = "drop"
    """Examples that leave the attack: also leave the loss; or stay in it as they are; or jump on along their step."""
    screen_steps: Annotated[int, Ge(1), Words("M={}", needs="early_drop")] = 3
    """M, attack steps before easy examples leave."""
    screen: Annotated[
        Literal["steps", "one_step"], Words(by_value=(("one_step", "screened by one step"),), needs="early_drop")
    ] = "steps"
    """Screen by M steps, or by one of their length."""
    rows: Annotated[Literal["hard", "random"], Words(by_value=(("random", "random rows"),), needs="early_drop")] = (
        "hard"
    )
    """Keep the hard rows, or as many random ones (the control experiment)."""
    round_to: Annotated[int, Ge(1), Words("rounded to {}", off=1, needs="early_drop")] = 1
    """Keep a multiple of so many rows; the easy ones of the least margin fill up."""
    bn_rows: Annotated[Literal["hard", "all"], Words(by_value=(("all", "BN of all rows"),), needs="early_drop")] = (
        "hard"
    )
    """BatchNorm's statistics are of the rows that are kept, or of the whole batch."""
    freeze_bn: Annotated[bool, Words(by_value=((True, "frozen BN"),))] = False
    """BatchNorm keeps its warm-up statistics."""
    reweight: Annotated[bool, Words(by_value=((True, "reweighting"), (False, "no reweighting")))] = False
    """Weigh examples by how far a step of the attack moved their logits."""
    lam: Annotated[float, Ge(0), Words("λ={}", needs="reweight")] = 1.0
    """Lambda of the weights sigmoid(lambda * s), s the largest change of logits in a step; higher is more uniform."""
    trust: Annotated[float, Ge(0), Words("trust {}", off=0.0)] = 0.0
    """Weigh rows by their label's probability under attack to this power, against their class: lost rows move less."""
    loss: CrossEntropy = "ce"
    """Cross entropy, or that and -log(1.0001 - the largest probability of another class), the first term of MART."""
    label_smoothing: Annotated[float, Ge(0), Lt(1), Words("smoothing {}", off=0.0)] = 0.0
    """Share of the label's probability that all classes share in the cross entropy of the loss."""
    class_weights: ClassRule = "none"
    """Weigh classes by what the attack sees of them: see docs/methods.md."""
    class_strength: Annotated[float | None, Ge(0), Words("strength {}", needs="class_weights")] = None
    """Of the class weights; 0: all alike. None (TOML: false): the rule's own."""
    class_memory: Annotated[float, Ge(0), Lt(1), Words("memory {}", needs="class_weights")] = 0.9
    """Share of the class statistics that stays from batch to batch; with hedge from epoch to epoch."""
    class_from: Annotated[int, Ge(1), Words("classes from epoch {}", off=1, scales=True)] = 1
    """First epoch (1-based) in which classes are treated apart; statistics are taken before it too."""
    awp: Annotated[float, Ge(0), Words("AWP {}", off=0.0)] = 0.0
    """Gamma of adversarial weight perturbation around the update, such as 0.005 to 0.01; 0: off."""
    gate: Annotated[float, Ge(0), Le(1), Words("gate {}", off=0.0)] = 0.0
    """The weight average takes the next epoch's updates where the worst class of the validation images reaches this."""
    step_sizes: Annotated[tuple[float, ...], Gt(0), Words("steps of {} ε", off=())] = ()
    """Sizes of the attack's steps in units of eps, one each, such as 1 0.5 0.25; in place of steps and step_size."""
    eps_factor: Annotated[float, Gt(0), Words("trained at {} ε", off=1.0)] = 1.0
    """Train on attacks within so many times eps, their steps as many times as long; whoever judges keeps to eps."""
    group: Annotated[int, Ge(1), Words("groups of {}", off=1)] = 1
    """Attack so many batches together."""
    group_updates: Annotated[
        Literal["each", "one"], Words(by_value=(("one", "one update a group"),), needs="group")
    ] = "each"
    """A group then makes one update for each of its batches, or one in all."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if callable(cls.__dict__.get("loss")):
            raise TypeError(
                f"loss: {cls.__qualname__} defines a function of this name, which is a setting; name it loss_of"
            )
        name = cls.__dict__.get("name")
        if name is not None:
            other = _registry.setdefault(name, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"name: {name!r} of {cls.__qualname__} is that of {other.__qualname__} already")
            _registry[name] = cls

    def __post_init__(self):
        for field, hint in field_types.hints(type(self)).items():  # 1 for 1.0, a list for a tuple
            value = field_types.convert(f"method.{field}", getattr(self, field), hint)
            object.__setattr__(self, field, value)
        field_types.check(self, "method.")
        self.check()

    # ------------------------------------------------------------ what it is told
    @property
    def address(self) -> str:
        """By what `registry.class_of` finds it in another process: its name, or MODULE:CLASS of one's own."""
        kind = type(self)
        found_by_name = kind.__module__.startswith(f"{__package__}.")
        unreachable = kind.__module__ == "__main__" or "." in kind.__qualname__
        return self.name if found_by_name or unreachable else f"{kind.__module__}:{kind.__qualname__}"

    def check(self) -> None:
        """What no single field shows. Raises: ValueError naming the field."""
        if self.freeze_bn and self.bn_rows == "all":
            raise ValueError("bn_rows: got 'all' with freeze_bn; frozen statistics come from no rows of the batch")
        if self.round_to > 1 and self.group > 1 and self.group_updates == "each":
            raise ValueError(
                f"round_to: got {self.round_to} with group={self.group}; rows are rounded for one update of a group"
            )
        if self.one_step and self.early_drop:
            raise ValueError(f"early_drop: got True; {self.title} has one step, which leaves nothing to screen")
        if self.one_step and self.step_sizes:
            raise ValueError(f"step_sizes: got {self.step_sizes}; {self.title} has one step, of its own size")

    def attack_steps(self, steps: int) -> int:
        """K, where the attack has so many steps. Raises: ValueError where none are left behind the screening."""
        steps = 1 if self.one_step else len(self.schedule) or steps
        if (self.mines or self.looks_at_classes or self.counts_right) and steps < 1:
            raise ValueError(f"steps: got {steps}; it must be >= 1")
        if self.early_drop and self.screen_steps >= steps:
            raise ValueError(
                f"screen_steps: got {self.screen_steps} with steps={steps}; it must be less than steps, or no attack "
                "is left for the hard examples"
            )
        return steps

    @property
    def schedule(self) -> tuple[float, ...]:
        """The attack's steps in units of eps; none: as many of step_size as the training was told."""
        return self.step_sizes

    def cost(self, steps: int, h: float = 1.0) -> float:
        """Forwards of a full batch that a training step takes: a backward to the images is 1, that of an update 2.

        Args: steps: K, as the training was told.  h: share of the rows that is attacked to the end, where it screens.
        """
        k, m = self.attack_steps(steps), self.screen_steps
        update = self.update_forwards * (2 if self.awp else 1)
        if not self.early_drop:
            return self.target_forwards + 2 * k + self.replays * update
        screening = 2 * (m if self.screen == "steps" else 1) + 1 + 2 * h * (k - m)
        kept = h if self.easy == "drop" and self.bn_rows == "hard" else 1
        return self.target_forwards + screening + self.replays * update * kept

    @property
    def mines(self) -> bool:
        """Whether rows are screened or weighed: what HAM adds to a method."""
        return self.early_drop or self.reweight

    def in_effect(self) -> dict[str, Any]:
        """The method's name, and the fields that have an effect beside the others."""
        idle = self.idle()
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in idle}
        return {"name": self.name, **fields}

    def idle(self) -> set[str]:
        """Fields that have no effect beside the others."""
        words = field_types.words(type(self))
        needs = {name: of.needs for name, of in words.items() if of.needs}
        idle = {name for name, other in needs.items() if getattr(self, other) in (False, words[other].off)}
        return idle if self.treats_classes or self.class_weights != "none" else idle | {"class_from"}

    def describe(self, warm_up: str = "pgd_at") -> str:
        """The method in one line, with what is not the default, M, λ, and where it starts behind a warm-up."""
        from .registry import warm_up_of

        default, told = type(self)(), []
        effective = self.in_effect()
        if warm_up_of(self, warm_up) == self:
            del effective["start_epoch"]
        for name, words in field_types.words(type(self)).items():
            if name not in effective:
                continue
            value = effective[name]
            new = value != getattr(default, name)
            always = name in ("screen_steps", "lam") or (name == "start_epoch" and value > 1)
            if words.by_value:
                told += [text for of, text in words.by_value if of == value and new]
            elif (value != words.off or value is None) and (new or always):
                told.append(words.text.format(field_types.shown(value)))
        return f"{self.title} ({', '.join(told)})" if told else self.title

    # ------------------------------------------------------------ what it does
    # `memory` is the Objective that the method made: what it remembers is there, as buffers.
    def attack(self, pgd: PGD) -> PGD:
        """The attack that it trains with, from the one that the training was told."""
        return pgd

    def attack_on(self, pgd: PGD, y: Tensor, memory: Objective) -> PGD:
        """The same for one batch: eps and step_size may be tensors, one value per row."""
        return pgd

    def teacher_target(self, z: Tensor, y: Tensor, memory: Objective) -> Tensor | None:
        """(n, classes) what the attack on the divergence goes away from, of a teacher's logits at the clean images.

        None where it attacks by the label.
        """
        return None

    def in_course(self, epochs: int) -> Method:
        """Epochs that it names, start_epoch apart, from its published course to one of so many epochs."""
        named = [n for n, w in field_types.words(type(self)).items() if w.scales and n != "start_epoch"]

        def moved(epoch: int) -> int:
            return max(2, 1 + round((epoch - 1) * epochs / self.course)) if epoch > 1 else epoch

        now = {n: field_types.of_each(moved, getattr(self, n)) for n in named}
        return dataclasses.replace(self, **now) if now else self

    def begins(self) -> tuple[tuple[str, int, str], ...]:
        """(field, epoch in which what it names begins, what is treated alike before)."""
        return () if "class_from" in self.idle() else (("class_from", self.class_from, "classes"),)

    @property
    def looks_at_classes(self) -> bool:
        """Whether `observe` or `weights` read the look of a batch."""
        return self.class_weights != "none" or self.trust > 0

    def observe(self, examples: Examples, memory: Objective) -> None:
        """Takes note of a batch, before its weights are made. Here: what `class_weights` need."""
        if self.class_weights != "none":
            from .class_weights import observe

            observe(memory, examples.look, self.class_weights, self.class_memory)

    def weights(self, examples: Examples, memory: Objective) -> Tensor | None:
        """(n_kept,) weight of each row in the loss; None for ones. Here: by `reweight`, `trust` and `class_weights`."""
        factors = []
        if self.reweight:
            from .class_weights import weights_by_step

            factors.append(weights_by_step(examples, self.lam))
        if self.trust:
            from .trust import weights_by_trust

            factors.append(weights_by_trust(examples, self.trust))
        if self.class_weights != "none" and memory.epoch >= self.class_from:
            from .class_weights import for_rows, weights_of

            factors.append(for_rows(weights_of(memory, self.class_weights, self.class_strength), examples.y))
        if len(factors) == 1 and self.reweight:
            return factors[0]  # of mean 1 already
        return self.scaled(math.prod(factors), examples) if factors else None

    def weights_with(self, of_classes: Tensor, examples: Examples, memory: Objective) -> Tensor:
        """(n_kept,): weights of its own by label, (classes,), as they are, times those of the switches, of mean 1."""
        from .class_weights import for_rows

        own, others = for_rows(of_classes, examples.y), Method.weights(self, examples, memory)
        return own if others is None else own * examples.of_mean_one(others)

    def scaled(self, weights: Tensor, examples: Examples) -> Tensor:
        """Mean 1, where the method has it so; rows that all weigh nothing stay so."""
        return examples.of_mean_one(weights) if self.scales_weights else weights

    def loss_of(self, model: nn.Module, examples: Examples, memory: Objective) -> Tensor:
        """0-dim: a mean over the rows, each of all its terms times its weight (`losses.weighted_mean`); where several
        processes train, it is divided by the mean of the weights only then. Here: of the cross entropies at x_adv.
        """
        from .losses import adversarial_ce

        return adversarial_ce(self, model, examples)

    def loss_form(self, memory: Objective) -> Hashable:
        """What tells forms of `loss_of` apart that buffers do not, such as an epoch that it asks for: an update that
        was captured in one form is not replayed in another."""
        return None

    def around(
        self, model: nn.Module, examples: Examples, memory: Objective, gradients: Gradients
    ) -> AbstractContextManager[None]:
        """Entered before the forward of an update, left after the optimiser's step, also where that failed.

        `gradients(parameters)` are those of the loss of these examples; no buffer moves.
        """
        if not self.awp:
            return nullcontext()
        from .awp import perturbed

        return perturbed(model, gradients, self.awp)

    def remembers(self, classes: int) -> dict[str, Tensor]:
        """What `memory` starts with: buffers by name, for a model of so many classes. Saved with every checkpoint."""
        if self.class_weights == "none":
            return {}
        from .class_weights import empty_state

        return empty_state(self.class_weights, classes)

    @property
    def keeps_over_batches(self) -> bool:
        """Whether what it remembers of one batch bears on later ones."""
        own = type(self).remembers is not Method.remembers
        if own or self.class_weights == "none":
            return own
        from .class_weights import RULES

        return self.class_memory > 0 or RULES[self.class_weights].by_epoch

    def end_epoch(self, end: EpochEnd, memory: Objective) -> None:
        """After an epoch that it has trained, validation included. Here: what `class_weights` need."""
        if self.class_weights != "none":
            from .class_weights import end_epoch

            end_epoch(memory, self.class_weights, self.class_memory)

    def keeps_average(self, end: EpochEnd, memory: Objective) -> bool:
        """Whether the updates of the next epoch enter the weight average. Here: what `gate` says."""
        if not self.gate or not end.val:
            return True
        return strongest(end.val).worst_class >= self.gate


def strongest(val: Mapping[str, Any]) -> Any:
    """What an epoch's validation says under the attack that left least."""
    return min(val.values(), key=lambda accuracy: accuracy.accuracy)
