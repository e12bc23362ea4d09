"""Faults of models, data and machines that a training or a judgement would hide: what is said, why, what to do.

docs/troubleshooting.md is made from this table (benchmarks/update_readme.py). A text is "argument: what was seen; what
to do"; words in braces are the facts of a case.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TypeVar

Error = TypeVar("Error", bound=Exception)


class HamWarning(UserWarning):
    """Something that makes a result worth less than it looks."""


@dataclass(frozen=True)
class Trouble:
    says: str
    cause: str
    remedy: str


TROUBLES: dict[str, Trouble] = {
    # ------------------------------------------------------------ models
    "probabilities": Trouble(
        "model: returns probabilities (rows of {n} images are >= 0 and sum to 1), not logits",
        "A softmax at the model's end saturates: its gradient vanishes where the model is sure, and attacks go blind.",
        "leave the softmax out",
    ),
    "between_0_and_1": Trouble(
        "model: all outputs for {n} images lie between 0 and 1, as those of a sigmoid do",
        "Losses and attacks here take logits. A sigmoid at the model's end saturates, and attacks go blind.",
        "return what goes into the sigmoid",
    ),
    "random_output": Trouble(
        "model: one image, given twice, has two outputs in eval mode ({rows} of {n} images)",
        "Noise, or dropout that stays on. An attack by one gradient is weak against it, and accuracies change from "
        "call to call; robustness by randomness has a history of not lasting (Athalye et al., arXiv 1802.00420).",
        "make it deterministic in eval mode, or read its accuracies as upper bounds",
    ),
    "output_depends_on_batch": Trouble(
        "model: in eval mode the output of an image depends on its batch, or changes with each call ({rows} of {n} "
        "images)",
        "Statistics of the batch (BatchNorm without running statistics), or one draw of noise for a whole batch. "
        "Accuracies then depend on the batch size, and an attack on one image moves the others.",
        "give BatchNorm running statistics (track_running_stats=True)",
    ),
    "no_way_to_the_images": Trouble(
        "model: no gradient reaches the images",
        "Part of the forward runs under torch.no_grad, detaches, or is not differentiable (rounding, decoding, numpy).",
        "let gradients pass from the logits to the input",
    ),
    "gradient_not_finite": Trouble(
        "model: the gradient to the images is NaN or infinite for {rows} of {n} images",
        "Such as the square root of 0, or 0 * inf in a layer's backward. An attack cannot move these images, which "
        "look robust.",
        "find the layer (torch.autograd.detect_anomaly)",
    ),
    "gradient_zero": Trouble(
        "model: the gradient to the images is exactly zero for {rows} of {n} images that it classifies correctly",
        "Saturated outputs, rounded inputs, dead units. An attack cannot move these images, which look robust.",
        "make the model differentiable, or attack it without gradients (autoattack includes Square)",
    ),
    "attack_without_gradient": Trouble(
        "model: {attack} had no gradient to follow (NaN, infinite, or zero everywhere) for {rows} of {n} images",
        "Gradient masking: these images stay at their start, and count as robust without having been attacked.",
        "do not take their accuracy for robustness",
    ),
    "one_answer": Trouble(
        "model: answers class {answer} for (nearly) all of {n} images of several classes",
        "The model has not learned, its weights are random, or the images are not normalised as in its training.",
        "do not rank it",
    ),
    "dtype": Trouble(
        "model: its weights are {weights} and the images {images}, and it does not convert",
        "Convolutions and linear layers take one dtype.",
        "convert the model (model.float()) or the images; precision='bf16' computes in bf16 with weights in fp32",
    ),
    "inference_weights": Trouble(
        "model: its weights were made inside torch.inference_mode, where no gradient can pass them",
        "Tensors made inside torch.inference_mode never take part in a backward.",
        "build or load the model outside of it",
    ),
    # ------------------------------------------------------------ training
    "logits_not_finite": Trouble(
        "model: returned NaN or infinite logits in eval mode; nothing was updated",
        "The training has diverged, or the model's running statistics are not finite.",
        "go back to an earlier checkpoint and lower the learning rate, or find the layer",
    ),
    "loss_not_finite": Trouble(
        "model: the training loss is {loss:g}; nothing was updated",
        "The training has diverged, or a layer overflows in this precision.",
        "lower the learning rate, or find the layer (torch.autograd.detect_anomaly)",
    ),
    "overfitted": Trouble(
        "{method}: epoch {epoch} has overfitted to its attack ({reading})",
        "Catastrophic overfitting: the model resists one step and falls to several (Wong et al., arXiv 2001.03994).",
        "PGD-AT takes its place",
    ),
    "large_eps": Trouble(
        "eps: got {eps:g}, but images are in [0, 1], where an L-inf eps of 1 allows anything",
        "Papers write 8 for 8/255.",
        "is it in units of 1/255?",
    ),
    "other_threads": Trouble(
        "threads: the run has used {before} CPU threads and goes on with {now}",
        "Sums over several threads are rounded in another order.",
        "its last bits will differ (OMP_NUM_THREADS={before} keeps them)",
    ),
    "inference_mode": Trouble(
        "torch.inference_mode: is on, and nothing can be trained inside it",
        "The caller, such as a validation hook, runs under torch.inference_mode.",
        "leave it, or put torch.inference_mode(False) around the call",
    ),
    "nothing_to_train": Trouble(
        "optimizer: none of its parameters got a gradient",
        "All are frozen (requires_grad=False), the forward runs under torch.no_grad, or the optimizer holds parameters "
        "that the loss does not reach.",
        "give it parameters that are to be trained",
    ),
    "weight_gradient_not_finite": Trouble(
        "model: the gradient of the training loss ({loss:g}) is NaN or infinite; nothing was updated",
        "Such as the square root of 0, or 0 * inf in a layer's backward.",
        "find the layer (torch.autograd.detect_anomaly)",
    ),
    "loss_scale_gone": Trouble(
        "precision: fp16 gradients overflow at every loss scale (now {scale:g}); nothing was updated",
        "A gradient is infinite or NaN whatever the scale, so that every update is skipped.",
        "train in bf16 or fp32",
    ),
    "memory_lost": Trouble(
        "method: {method} goes by earlier batches or by epochs, and a method that is given to loss() anew each time "
        "remembers nothing of them",
        "What a method remembers lies in its Objective, and loss() makes a new one for each call.",
        "make one: objective = ham_kernels.methods.Objective(ham_kernels.methods.{kind}(), "
        "ham_kernels.attack.pgd.PGD(eps, step_size, steps)), give that to loss(), and after each epoch call "
        "objective.end_epoch(ham_kernels.methods.EpochEnd(epoch, model))",
    ),
    "never_begins": Trouble(
        "{field}: is {first}, and {method} ends with epoch {epochs}; it treats all {until} alike until then",
        "The method's published course is longer than this training, and it names an epoch of that course.",
        "give a lower {field}",
    ),
    "same_epoch_again": Trouble(
        "epoch: a second pass over this loader gives the order and augmentation of the first, those of epoch {epoch}",
        "A loader's batches depend on its seed and its epoch alone, so that a training can go on where it was; `fit` "
        "tells it the epoch.",
        "call loader.set_epoch(e) before each pass in a loop of your own",
    ),
    "starts_later": Trouble(
        "start_epoch: is {first}; this call of fit trains one epoch, by the warm-up, and {method} begins in epoch "
        "{first}",
        "A loop of one `fit` per epoch reaches it; one call for a short training does not.",
        "give a lower start_epoch where the training is short",
    ),
    "gate_without_validation": Trouble(
        "gate: is {gate:g}, and there are no validation images to judge by; the weight average takes all updates",
        "A gated average needs the worst class of validation images after each epoch.",
        "give val_loader, or gate=0",
    ),
    "gate_never_opened": Trouble(
        "gate: is {gate:g}, which the worst class of the validation images did not reach in {epochs} epochs (at most "
        "{best:g}); the weight average is the last weights",
        "With many classes, each has few validation images, and the worst of them is often at 0.",
        "lower the gate (0: off), or set more validation images aside",
    ),
    "short_for_its_average": Trouble(
        "ema_decay: {decay:g} averages over about {span} updates, and the whole training has {updates}",
        "An average with this decay would hardly leave the random start. Its decay grows with the updates t, as "
        "(1 + t) / (10 + t), so that it stays well below the one asked for here.",
        "train longer, or take a lower decay",
    ),
    # ------------------------------------------------------------ data
    "small_files": Trouble(
        "path: the images of {path} are of about {pixels} pixels, but not all of one size, or some are larger than 64; "
        "they are enlarged to {size} x {size}",
        "Images of one size of at most 64 pixels are kept in memory as they are; others are read file by file, and "
        "cropped to the size of large images.",
        "give --size {pixels}, or mend the odd ones",
    ),
    "files_left_out": Trouble(
        "path: {path} has files that are left out: {kinds}",
        "Only files that end as images do are read, and no hidden ones.",
        "convert or rename what should be trained on",
    ),
    "empty_folders": Trouble(
        "path: {path} has folders without an image: {folders}",
        "A class whose folder is empty, or holds files of another kind only, is no class of the task.",
        "fill them, or remove them",
    ),
    "class_without_images": Trouble(
        "path: {path} has no image of class {classes} in its {part} part",
        "Its accuracy cannot be measured there.",
        "what is said of classes leaves it out; give it images",
    ),
    "class_of_one_image": Trouble(
        "path: {path} has one training image of class {classes}",
        "Nothing can be learned of a class from a single image, nor can one of it be set aside for validation.",
        "add images, or leave the class out",
    ),
    "class_untrained": Trouble(
        "data: there is no training image of {count} classes: {classes}",
        "The training part was cut to few images, or all images of a class were set aside to validate.",
        "the model cannot learn them; take more training images (train_images) or fewer to validate (val_images)",
    ),
    "normalisation_left_out": Trouble(
        "{source}: normalises images by mean {mean}, std {std}, and the model does not",
        "The weights were trained behind that normalisation; without it the model is worth less than it was.",
        "give --mean and --std, or a model that normalises",
    ),
    "one_of_several_weights": Trouble(
        "checkpoint: {file} holds {held}; {taken} is taken",
        "The others, such as an average of the weights, may be worth more or less.",
        "give --checkpoint-key to choose",
    ),
    "flag_without_effect": Trouble(
        "{flag}: has no effect {why}",
        "Another flag, or the method, leaves it without a use: what it asks for is not done.",
        "leave it out, or give what it needs",
    ),
    "few_batches": Trouble(
        "batch_size: an epoch has fewer than 10 batches ({batches}: {images} images, {size} a batch)",
        "Epochs and learning rates of the presets are meant for hundreds of updates an epoch.",
        "give a smaller --batch-size with a smaller --lr, or more --epochs",
    ),
    "no_workers": Trouble(
        "workers: {workers} processes cannot be started ({error})",
        "Their locks lie in shared memory (/dev/shm), which is full, or too many files are open.",
        "free or enlarge the shared memory (docker run --shm-size), or decode in this process by --workers 0",
    ),
    "cache_not_written": Trouble(
        "cache: {file} could not be written ({error})",
        "The folder of decoded images is read-only, or its disk is full.",
        "the next start decodes again; give another --root to avoid it",
    ),
    "cache_damaged": Trouble(
        "cache: {file} is damaged ({error})",
        "Decoded images on disk were changed or cut short; the source is there all the same.",
        "writing it anew, there is nothing to do",
    ),
    "folder_twice": Trouble(
        "path: {path}: {one} and {other} are the same folder",
        "Links lead to one folder in two ways, or in a circle; its images would count twice, perhaps as two classes.",
        "remove one of the links",
    ),
    # ------------------------------------------------------------ ops
    # ------------------------------------------------------------ runs and reports
    "flags_contradict": Trouble(
        "runs: {file}: what it states under {attack} does not follow from its flags, one per image ({why}); left out",
        "The file was altered or cut short: accuracies, flags and labels are written together.",
        "`ham evaluate` judges the run anew",
    ),
    "log_altered": Trouble(
        "runs: {file} {why}",
        "The log was altered or cut short. Its lines have checksums, each of all lines before it.",
        "`ham train --resume` writes the log anew from the newest checkpoint",
    ),
    # ------------------------------------------------------------ machines
    "damaged_note": Trouble(
        "{error}; the run goes on without it",
        "A disk or a copy has cut the file. It holds when and where the run was worked on, or how far it was, and no "
        "part of the training.",
        "copy it again from where the run was made, if its times matter",
    ),
    "damaged_best": Trouble(
        "weights: {error}",
        "The file of the best weights is truncated or was altered (a full disk, a copy that was cut).",
        "it is removed, and written again by a better epoch",
    ),
    "damaged_checkpoint": Trouble(
        "resume: {error}",
        "A checkpoint is truncated or was altered (a full disk, a copy that was cut).",
        "the one before it is used, if that is intact",
    ),
    "damaged_store": Trouble(
        "store: {path} was altered or is damaged ({reason})",
        "The flags of a judgement under way carry a checksum, which does not match.",
        "its flags are made anew",
    ),
    "option_not_served": Trouble(
        "{option}: {reason}",
        "An option of the engine (precision, compile, cuda_graphs, channels_last, winograd) that this model or device "
        "cannot serve.",
        "going on without it",
    ),
    "other_backend": Trouble(
        "ham_kernels.{op} runs on {backend}: {why}",
        "The extension was not built, or Triton is missing.",
        "results are the same; `ham doctor` tells more",
    ),
    "no_locks": Trouble(
        "out: {folder} is on a file system without locks ({reason})",
        "Some network file systems serve no flock. Two processes on one run would overwrite each other's files.",
        "do not work on it by two commands at once",
    ),
    "log_failed": Trouble(
        "log: {log} has failed ({error}), and gets no more from this process",
        "Its package, its server or its disk refused. metrics.jsonl has every epoch all the same.",
        "see to it, then go on with `ham train --resume`: the log gets the epochs that it lacks",
    ),
    "no_hard_links": Trouble(
        "out: {folder} is on a file system without hard links ({reason})",
        "Cloud drives and exFAT have none, so that two processes that begin a run here at once do not notice.",
        "do not begin two runs in it at once",
    ),
    "several_processes": Trouble(
        "WORLD_SIZE: is {world}, and the processes are not joined",
        "torchrun, or another launcher, started several processes. Each would train the same model by itself.",
        "call ham_kernels.distributed.start() first, or give group=None where each is to work alone; a command that "
        "knows no other processes is started without a launcher",
    ),
}


def text(name: str, **facts) -> str:
    """The words of a trouble."""
    trouble = TROUBLES[name]
    return f"{trouble.says}; {trouble.remedy}".format(**facts)


def told(name: str, **facts) -> dict[str, str]:
    """A trouble with all that is known of it, JSON-ready."""
    parts = vars(TROUBLES[name])
    return {"name": name} | {part: words.format(**facts) for part, words in parts.items()}


def error(name: str, kind: type[Error] = ValueError, **facts) -> Error:
    """An exception with the words of a trouble; `trouble` of it is (name, facts)."""
    made = kind(text(name, **facts))
    made.trouble = (name, facts)
    return made


def warn(name: str, *, category: type[Warning] = HamWarning, **facts) -> None:
    """Tells a trouble; Python shows the same words once per place."""
    warnings.warn(text(name, **facts), category, stacklevel=3)
