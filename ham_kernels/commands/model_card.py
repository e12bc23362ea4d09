"""What an exported model is worth, in words and numbers: MODEL_CARD.md, and an entry of RobustBench."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..attack.pgd import PGD
from ..common.field_types import shown, words
from ..methods.registry import warm_up_of
from ..report.text_format import attack_title, markdown
from ..runs.folder import RunFolder
from ..runs.settings import DataSettings, TrainSettings
from .evaluation_text import interval, limits, percent
from .train import attack_in_words

_NORMS = {
    "linf": "each pixel value by at most {eps:g} (L∞)",
    "l2": "the image by at most {eps:g} in Euclidean length (L2)",
}


def model_card(about: dict[str, Any], judged: dict[str, Any], run: RunFolder) -> str:
    """Markdown; every number from what `ham evaluate` wrote."""
    facts, threat = run.data_facts(), about["threat_model"]
    counts = ", ".join(f"{n} {part}" for part, n in facts["counts"].items())
    size = about["input"]
    change = _NORMS.get(threat["norm"], threat["norm"]).format(eps=threat["eps"])
    lines = [
        f"# {about['label'] or about['dataset'] + ', ' + (about['method'] or about['model'])}",
        "",
        f"{about['model']}: images {size['channels']} × {size['height']} × {size['width']} with values in [0, 1] -> "
        f"logits of {len(about['classes'])} classes. {_normalisation(about)}",
        "",
        "## Data",
        "",
        f"{about['dataset']}, images: {counts}. Classes: {', '.join(map(markdown, about['classes']))}.",
        *_generated(run, facts),
        "",
        "## Threat model",
        "",
        f"Somebody who knows the model changes {change} of values in [0, 1], so that the image is taken for another "
        "class. Other changes (rotations, blur, patches, larger ones) are not covered.",
        "",
        "## Training",
        "",
        f"{about['method']}." if about["method"] else f"Trained elsewhere ({about['origin']}); how is not known here.",
        *_settings(about, run),
        "",
        "## What it is worth",
        "",
        *(_worth(about, judged) if judged.get("attacks") else ["Not judged: `ham evaluate` before `ham export`."]),
        "",
        "## Limits",
        "",
        *_limits(judged),
        "",
        f"Versions: {', '.join(f'{k} {v}' for k, v in about['versions'].items())}. Weights: {about['weights']['kind']}"
        f"{_epoch(about)}, SHA-256 of the checkpoint {about['weights']['checkpoint_sha256']}.",
        "",
    ]
    return "\n".join(lines)


def _settings(about: dict[str, Any], run: RunFolder) -> list[str]:
    if about["method"] is None:
        return []
    s = run.settings()
    o, d = s.optim, s.data
    by = (
        f"learning rate {o.lr:g} ({o.schedule}), "
        f"{'AdamW' if o.optimizer == 'adamw' else f'momentum {o.momentum:g}'}, weight decay {o.weight_decay:g}"
    )
    if s.method.tunes_only:
        by = "steps of the method's own in place of an optimiser's"
    if o.grad_clip:
        by += f", gradients clipped at {o.grad_clip:g}"
    balance = dict(words(DataSettings)["balance"].by_value).get(d.balance)
    return [
        f"{o.epochs} epochs, batch {d.batch_size}, {by}, augmentation {d.augment}{f', {balance}' if balance else ''}.",
        *_warm_up(s),
        f"{_attack(s)}. {s.run.precision}, seed {s.run.seed}.",
        *([f"It learned from a teacher ({about['teacher']})."] if about["teacher"] else []),
        *_first_weights(about),
    ]


def _attack(s: TrainSettings) -> str:
    """The one that the method trains with, whatever the training was told."""
    if s.method.attack_steps(s.attack.steps):
        return f"Attack: {attack_in_words(s)}"
    eps = s.method.attack(PGD(**asdict(s.attack))).eps
    return f"Attack: eps {eps:g}, by the gradients of the updates, {s.attack.norm}" if eps else "Attack: none"


def _warm_up(s: TrainSettings) -> list[str]:
    start, natural = s.method.start_epoch, s.warm_up.natural_epochs
    warm = warm_up_of(s.method, s.warm_up.name)
    before = [f"the first {natural} by clean images"] if natural else []
    if warm != s.method and natural < start - 1:
        before.append(warm.describe())
    return [f"Epochs before {start}: {', then '.join(before)}."] if start > 1 and before else []


def _normalisation(about: dict[str, Any]) -> str:
    if about["mean"] is None:
        return f"Normalisation is {about['normalisation']}."
    return f"Normalisation (mean {shown(about['mean'])}, std {shown(about['std'])}) is {about['normalisation']}."


def _first_weights(about: dict[str, Any]) -> list[str]:
    """What it began with, where that was not random."""
    begun = about["begun_with"]
    if begun is None:
        return []
    if begun["run"] is None:
        return [f"It began with other weights ({begun['weights']}); how they were trained is not known here."]
    return [f"It began with the weights of another training: {begun['run']}, {begun['epochs']} epochs in all before."]


def _generated(run: RunFolder, facts: dict[str, Any]) -> list[str]:
    if facts.get("generated") is None:
        return []
    share, images = run.settings().data.generated_share, facts["generated"]["images"]
    return [f"Of each training batch a share of {share:g} was drawn from {images} generated images."]


def _epoch(about: dict[str, Any]) -> str:
    epoch = about["weights"]["epoch"]
    return f" of epoch {epoch}" if epoch else ""


def _worth(about: dict[str, Any], judged: dict[str, Any]) -> list[str]:
    """All attacks, then each class under them, with exact 95 % intervals over images."""
    attacks, classes = judged["attacks"], [markdown(name) for name in about["classes"]]
    lines = [
        f"On {judged['part']} images, in %; 95 % intervals (Clopper-Pearson) over images.",
        "",
        "| attack | images | accuracy | worst class | std over classes |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, a in attacks.items():
        values = [2 if c["value"] is None else c["value"] for c in a["per_class"]]
        worst = classes[values.index(min(values))]
        lines.append(
            f"| {attack_title(name)} | {a['n']} | {interval(a['accuracy'])} | {worst}: "
            f"{interval(a['worst_class'])} | {percent(a['std']['value'])} |"
        )
    counts = _counts(attacks, len(classes))
    head = ["class", "images", *map(attack_title, attacks)]
    lines += ["", f"| {' | '.join(head)} |", "|---|---:" + "|---:" * len(attacks) + "|"]
    for i, label in enumerate(classes):
        cells = [interval(a["per_class"][i]) for a in attacks.values()]
        lines.append(f"| {label} | {counts[i]} | {' | '.join(cells)} |")
    how = [f"{attack_title(name)}: {_attack_settings(a['settings'])}" for name, a in attacks.items() if name != "clean"]
    return [*lines, "", "Attacks: " + "; ".join(how) + "."] if how else lines


def _counts(attacks: dict[str, Any], classes: int) -> list[str]:
    labels = [a["labels"].split() for a in attacks.values() if a.get("labels")]
    if not labels:
        return ["–"] * classes
    most = max(labels, key=len)
    return [str(most.count(str(i))) for i in range(classes)]


def _attack_settings(settings: dict[str, Any]) -> str:
    left_out = ("attack", "device", "norm", "search")
    told = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items() if k not in left_out]
    if "search" in settings:
        told.append("examples looked for on a rounded, compiled form of the model, each judged by the model itself")
    return ", ".join(told).replace("[", "").replace("]", "").replace("'", "")


def _limits(judged: dict[str, Any]) -> list[str]:
    attacks = judged.get("attacks", {})
    found = [f"- {text}." for text in limits(judged)]
    if "autoattack" not in attacks:
        found.append("- Not judged by AutoAttack: weaker attacks flatter.")
    elif attacks["autoattack"]["n"] < judged["images"]:
        found.append(f"- AutoAttack saw {attacks['autoattack']['n']} of {judged['images']} images.")
    masking = judged.get("masking")
    if masking is None:
        found.append("- Not checked for gradient masking.")
    else:
        bad = [f"{c['title']}: {c['why']}" for c in masking["checks"] if c["suspicious"]]
        run = sum(bool(c["values"]) for c in masking["checks"])
        found += [f"- Gradient masking: {text}." for text in bad] or [f"- No sign of gradient masking in {run} checks."]
    return [*found, "- Accuracy differs from class to class: look at the worst one before you rely on the average."]


def _additional_data(about: dict[str, Any]) -> bool | str:
    others = (about["begun_with"], about["teacher"])  # of what they were trained on it is not told
    known = about["method"] is not None and others == (None, None)
    return True if about["generated"] else (False if known else "")


def robustbench_entry(about: dict[str, Any], judged: dict[str, Any]) -> dict[str, Any]:
    """The fields of RobustBench's model_info; what is not known here, of some of the images alone, or found by a fast
    search, is empty."""

    def of(attack: str) -> str:
        found = judged.get("attacks", {}).get(attack)
        of_all = found is not None and found["n"] >= judged["images"] and "search" not in found["settings"]
        return f"{100 * found['accuracy']['value']:.2f}" if of_all else ""

    eps = about["threat_model"]["eps"]
    per_255 = round(eps * 255, 6)
    return {
        "link": "", "name": about["label"] or about["method"] or "", "authors": "",
        "additional_data": _additional_data(about),
        "number_forward_passes": 1, "dataset": about["dataset"], "venue": "", "architecture": about["model"],
        "eps": f"{per_255:g}/255" if about["threat_model"]["norm"] == "linf" else f"{eps:g}",
        "clean_acc": of("clean"), "reported": of("autoattack"), "autoattack_acc": of("autoattack"),
    }  # fmt: skip
