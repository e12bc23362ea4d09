"""Hard adversarial example mining, and the methods of the field beside it, in plain, slow, obvious PyTorch.

Written to be read beside arXiv 2308.01823, and beside the papers that the other files name. It shares no code with
ham_kernels, which tests and benchmarks compare against it; public names, signatures and random numbers are the same.
"""

from .atta import ATTA
from .base import PGDAT
from .bat import BAT
from .cfa import CFA
from .cfol import CFOL
from .dafa import DAFA
from .distillation import ABSLD, RSLAD, FairARD
from .faal import FAAL
from .fair import FAIR
from .fair_tat import FAIRTAT
from .fat import FAT
from .free_at import FreeAT
from .frl import FRL
from .fsr import FSR
from .gairat import GAIRAT
from .ham import HAM
from .mail import MAIL
from .mart import MART
from .method import ham_loss, hard_examples, pgd_attack, step_size_weights
from .offsets import Offsets
from .trades import TRADES, trades_loss
from .trainer import HAMTrainer
from .wat import WAT

METHODS = {
    "pgd_at": PGDAT, "ham": HAM, "trades": TRADES, "mart": MART, "gairat": GAIRAT, "faal": FAAL, "dafa": DAFA,
    "cfa": CFA, "wat": WAT, "fair": FAIR, "fsr": FSR, "frl": FRL, "cfol": CFOL, "fair_tat": FAIRTAT,
    "rslad": RSLAD, "fair_ard": FairARD, "absld": ABSLD, "mail": MAIL, "bat": BAT, "fat": FAT,
}  # fmt: skip
"""Training methods by name: made with the number of classes and the attack, they have `step` and `end_epoch`.

Those that distil have a `teacher` besides."""

__all__ = [
    "ATTA",
    "METHODS",
    "FreeAT",
    "HAMTrainer",
    "Offsets",
    "ham_loss",
    "hard_examples",
    "pgd_attack",
    "step_size_weights",
    "trades_loss",
]
