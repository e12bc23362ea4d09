"""What the simulation of a step takes as given. Nothing of it was measured on several GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field


def _told(default, words: str):
    return field(default=default, metadata={"help": words})


@dataclass(frozen=True)
class Net:
    title: str
    row_us: float  # of one forward, for each row
    side: int  # of its images, in three channels
    parameters: int
    convolutions: int
    bn_layers: int
    bn_channels: int  # of all its layers together

    @property
    def image_bytes(self) -> int:
        return 4 * 3 * self.side**2  # fp32

    @property
    def gradient_bytes(self) -> int:
        return 4 * self.parameters


# 1/3 of the time of a natural training step: 15,000, 2,200 and 2,600 images/s. The last is what timm's author saw on an
# A100 (its issue #1491), the others are guesses.
NETS = {
    "preact_resnet18": Net("PreActResNet-18, 32²", 22, 32, 11_172_170, 20, 17, 3904),
    "wrn_28_10": Net("WRN-28-10, 32²", 150, 32, 36_479_194, 28, 25, 8976),
    "resnet50": Net("ResNet-50, 224²", 128, 224, 25_557_032, 53, 53, 26_560),
}


@dataclass(frozen=True)
class Links:
    """GPUs and what connects them."""

    node: int = _told(8, "GPUs of a node")
    node_gb_s: float = _told(200.0, "GB/s of a GPU within a node")
    net_gb_s: float = _told(40.0, "GB/s of a GPU between nodes")
    latency_us: float = _told(40.0, "µs of any collective, at the least")
    doubling_us: float = _told(20.0, "µs more for an all-reduce with each doubling of the nodes (a tree)")
    hop_us: float = _told(1.0, "µs more for an all-gather with each further GPU (a ring)")
    exchange_us: float = _told(12.5, "µs of an all-to-all between nodes, times GPUs^(2/3)")
    wait_us: float = _told(30.0, "µs for which the host waits in each SyncBN layer")
    launch_us: float = _told(3.0, "µs of a kernel: a forward takes at least that of 3 kernels a convolution")

    def seconds(self, n: float, ranks: int) -> float:
        """Of n bytes to or from one GPU."""
        return n / (1e9 * (self.node_gb_s if ranks <= self.node else self.net_gb_s))

    def all_reduce(self, n: float, ranks: int) -> float:
        """Seconds for n bytes on each rank."""
        doublings = max(0, (-(-ranks // self.node) - 1).bit_length())
        latency = self.latency_us + self.doubling_us * doublings
        return 1e-6 * latency + self.seconds(2 * n * (ranks - 1) / ranks, ranks)

    def all_gather(self, n: float, ranks: int) -> float:
        """Seconds for n bytes from each rank."""
        return 1e-6 * (self.latency_us + self.hop_us * (ranks - 1)) + self.seconds(n * (ranks - 1), ranks)

    def all_to_all(self, n: float, ranks: int) -> float:
        """Seconds for n bytes on the busiest rank."""
        latency = self.latency_us if ranks <= self.node else self.exchange_us * ranks ** (2 / 3)
        return 1e-6 * latency + self.seconds(n, ranks)


@dataclass(frozen=True)
class Training:
    steps: int = _told(10, "K, steps of the attack")
    screen_steps: int = _told(3, "M, those of them that screen")
    hard: float = _told(0.3, "h, the share of hard rows")
    easy: str = _told("drop", "what becomes of easy rows: drop; or stop, which trains on them as they are")
    messages: int = _told(1, "all-to-alls of a move: rows travel whole")
    sync_bn: bool = _told(True, "BatchNorm over all ranks")
    overlap: bool = _told(False, "hide the gradients' all-reduce behind the backward, as far as it goes")
