"""Training beside other busy processes: how much of its speed on a quiet machine is left.

A child process trains a small StyleGAN2 at 32x32. `before` has OpenMP's default way of waiting, in which threads spin;
`after` is what the command line does (stylegan_pg/processors.py): it looks whether processors are idle before PyTorch
is imported, and tells threads to sleep where they are not. Competitors are processes that compute without a pause. The
ratio is the time of a step on the quiet machine, with the default way of waiting, over the time of a step beside the
competitors: with C competitors and N processors, an even share would be about N / (N + C).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

CASES = [(0, "before"), (0, "after"), (2, "before"), (2, "after"), (4, "before"), (4, "after")]


def child(seconds: float) -> None:
    """Print the seconds of a training step."""
    from stylegan_pg import processors

    begin = processors.snapshot()
    time.sleep(0.2)  # the command line has this time while it imports what does not need PyTorch
    if os.environ.get("WAITING") == "after":
        processors.choose_waiting(begin)
    import numpy as np
    import torch

    from stylegan_pg.config.loading import load_config
    from stylegan_pg.config.schedule import phases
    from stylegan_pg.data.datasets.points import load_points
    from stylegan_pg.data.loader.loader import Batch
    from stylegan_pg.systems.gan import GAN
    from stylegan_pg.training.devices import Devices
    from stylegan_pg.training.engine import Engine
    from stylegan_pg.training.train_state import TrainState

    given = "run=none data.url=none resolution=32 train.batch=8 train.total_kimg=1000 train.device=cpu"
    config = load_config(None, [*given.split(), "model.channel_base=2048", "model.channel_max=64"])

    class Pictures:
        """As much of a dataset as a training state asks for."""

        path, count, channels, base, label_names, fields, others = "none", 1, 3, (4, 4), (), {}, {}

        def table(self, resolution: int):
            return load_points("points:ring").table(4)

    state = TrainState(config, Pictures(), Devices(config), GAN(config))  # type: ignore[arg-type]  # see Pictures
    state.enter(phases(config)[0])
    engine = Engine(state)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, [8, 3, 32, 32], dtype=np.uint8))
    for _ in range(3):
        engine.step(Batch({"image": image}))
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        engine.step(Batch({"image": image}))
        times.append(time.perf_counter() - start)
    print(statistics.fmean(times))  # the mean, as lazy terms make some steps longer


def step_time(competitors: int, waiting: str, seconds: float) -> float:
    """The seconds of a step beside so many competitors."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(competitors)]
    settings = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in settings} | {"WAITING": waiting}
    try:
        command = [sys.executable, __file__, "--child", "--seconds", str(seconds)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return float(done.stdout.split()[-1])
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of all cases, one after the other")
    parser.add_argument("--seconds", type=float, default=6.0, help="of training in each measurement")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.seconds)
        return
    times: dict[tuple[int, str], list[float]] = {case: [] for case in CASES}
    for _ in range(options.rounds):
        for case in CASES:
            times[case].append(step_time(*case, options.seconds))
    quiet = statistics.median(times[0, "before"])
    print(f"{'competitors':>11} {'threads wait as':>15} {'ms a step':>10} {'of quiet speed':>15}")
    medians = {case: statistics.median(some) for case, some in times.items()}
    for (competitors, waiting), seconds in medians.items():
        print(f"{competitors:>11} {waiting:>15} {1000 * seconds:>10.1f} {quiet / seconds:>15.2f}")
    for (competitors, waiting), seconds in medians.items():
        print(
            json.dumps({"case": f"competitors {competitors} {waiting}", "ratio": quiet / seconds, "seconds": seconds})
        )


if __name__ == "__main__":
    main()
