"""Break runs at random moments and resume them: `python -m tests.reliability --rounds 200`.

Every round starts a program, does something to it at a random moment (a signal, a full disk, a
read-only folder, a vanished image), repairs that, and runs the same command again. It passes if the
run ends with the weights of an unbroken run to the bit. A program that cannot continue must say so
in one sentence, without a traceback, and the last checkpoint must load. The folder of a round that
fails is kept.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.reliability.faults import FileSizeLimit, faults
from tests.reliability.forked import preload


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m tests.reliability", description=__doc__)
    p.add_argument("--rounds", type=int, default=200)
    p.add_argument("--seed", type=int, default=0, help="of the first round; the next has seed + 1")
    p.add_argument("--only", nargs="+", metavar="TARGET", help="beginnings of the targets' names")
    p.add_argument("--faults", nargs="+", metavar="FAULT", help="beginnings of the faults' names")
    return p


def main(argv: list[str] | None = None) -> int:
    """Play the rounds; return the number that failed."""
    args = parser().parse_args(argv)
    no_detectron2 = preload()
    from tests.reliability.rounds import Failure, new_folder, play, unbroken
    from tests.reliability.targets import TARGETS, Detectron2

    targets = [t for t in TARGETS if not args.only or t.name.startswith(tuple(args.only))]
    skipped = {}
    if no_detectron2 and Detectron2 in targets:
        targets.remove(Detectron2)
        skipped[Detectron2.name] = no_detectron2
    base = Path(tempfile.mkdtemp(prefix="reliability-"))
    base.chmod(0o755)
    (base / "disk").mkdir()
    kinds = [
        kind
        for kind in faults(base / "disk")
        if not args.faults or kind.name.startswith(tuple(args.faults))
    ]
    straight = {}
    for target in targets:
        data = base / f"data of {target.name}"
        data.mkdir()
        target.make_data(data)
        whole = new_folder(target, data, base / f"unbroken {target.name}")
        straight[target] = (data, *reversed(unbroken(whole)))
        say(f"{target.name}: an unbroken run takes {straight[target][1]:.1f} s")
        shutil.rmtree(whole.folder)

    counts: Counter = Counter()
    outcomes: Counter = Counter()
    failures = []
    began = time.monotonic()
    for number in range(args.rounds):
        seed = args.seed + number
        rng = random.Random(seed)
        target, kind = targets[seed % len(targets)], rng.choice(kinds)
        data, seconds, expected = straight[target]
        one = new_folder(target, data, base / f"round {seed}", rng.choice((0, 0, 1, 2)))
        fault = kind(rng, one.data, one.out)
        try:
            how = play(one, fault, rng, seconds, expected)
        except Failure as failure:
            how = "FAILED"
            failures.append(f"seed {seed}, {target.name}, {fault.name}: {failure}; {one.folder}")
            say(failures[-1])
        else:
            shutil.rmtree(one.folder)
        counts[target.name, kind.name, how != "FAILED"] += 1
        outcomes[how] += 1
        left = (time.monotonic() - began) / (number + 1) * (args.rounds - number - 1) / 60
        say(f"[{number + 1}/{args.rounds}] seed {seed}: {target.name}, {fault.name}, "
            f"{one.workers} data workers: {how}; about {left:.0f} min left")  # fmt: skip
    if not failures:
        shutil.rmtree(base)
    print(summary(targets, kinds, counts, outcomes, skipped, failures, vars(args)))
    return len(failures)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def summary(targets, kinds, counts, outcomes, skipped, failures, args) -> str:
    """Return the counts in Markdown: rounds that passed, of those played."""
    names = [kind.name for kind in kinds]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for target in targets:
        cells = []
        for name in names:
            passed, failed = (counts[target.name, name, ok] for ok in (True, False))
            cells.append(f"{passed} of {passed + failed}")
        lines.append(f"| {target.name} | {' | '.join(cells)} |")
    ways = ", ".join(f"{n} {how}" for how, n in sorted(outcomes.items()))
    lines += ["", f"Rounds that passed, of {args['rounds']} from seed {args['seed']}: {ways}."]
    if "detectron2" in {target.name for target in targets}:
        lines.append("Detectron2 itself resumes with other batches: its weights are not compared.")
    if FileSizeLimit in kinds:
        lines.append("Nothing can be mounted here: a limit of file sizes stands in for a full disk")
    lines += [f"Skipped: {name} ({why})." for name, why in skipped.items()]
    return "\n".join(lines + failures)


if __name__ == "__main__":
    sys.exit(main() > 0)
