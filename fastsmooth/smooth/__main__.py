"""Explicit smoothing and explicit graduated optimization of known functions: python -m
fastsmooth.smooth [flags]

Smoothing: f_delta(x) = E_u[f(x - delta u)] of Rastrigin's function and of the drop-wave, for noise
u with light and with heavy tails. Curves come from closed forms and from quadrature over
frequencies, each with its error; the published demo drew fresh noise at every x, and shifted the
Levy distribution by mistake.

Graduated: gradient descent on f_delta while delta falls, in many dimensions, beside the same
descent without noise (arXiv 2412.11501). Writes figures and smooth.json.
"""

from __future__ import annotations

import shlex
import sys
from argparse import SUPPRESS
from pathlib import Path

from fastsmooth.cli import flags as flag_types
from fastsmooth.cli.flags import ConfigError, flag
from fastsmooth.messages import DONE, command, end_with, exit_code, show
from fastsmooth.runfolder.write import RunFolderError, refusing
from fastsmooth.smooth.noises import NOISES
from fastsmooth.smooth.objectives import OBJECTIVES, SCHEDULES
from fastsmooth.smooth.request import Request, check, check_unused


def parser() -> flag_types.Parser:
    p = flag_types.Parser(
        prog=command("smooth"),
        usage="%(prog)s [flags]",
        description="Smoothed functions and explicit graduated optimization, as figures and "
        "smooth.json.",
        argument_default=SUPPRESS,
        add_help=False,
    )
    d, whole, positive = Request(), flag_types.whole, flag_types.real(0, open_low=True)
    # fmt: off
    add = p.add_argument
    add("--out", type=flag_types.text, metavar="DIR", help="folder of the figures and of smooth.json (smooth)")
    add("--parts", nargs="+", choices=d.parts, metavar="PART", help="smoothing graduated (both)")
    add("--seed", type=whole(0, 2**31), metavar="N", help="of draws, starts and perturbations (0)")
    add("-h", "--help", action="store_true", help="this page")
    add = p.add_argument_group("smoothing").add_argument
    add("--noise", nargs="+", choices=NOISES, metavar="NAME", help=f"{'; '.join(f'{name}: {n.law}' for name, n in NOISES.items())} (all)")
    add("--delta", nargs="+", type=flag_types.real(0, 100), metavar="X", help="degrees of smoothing; 0 is f itself (0.05 0.2 0.5)")
    add("--centred", action="store_true", help="noise without its mean, so that minima do not shift; noise without a mean is skipped")
    add("--dim", type=whole(1, 2), metavar="N", help="1, or 2: Rastrigin summed over coordinates, the drop-wave of the radius (1)")
    add("--points", type=whole(2, 10_000), metavar="N", help="values of x in [-5, 5], in every coordinate (1001; 61 with --dim 2)")
    add("--samples", type=whole(2, 10**6), metavar="N", help="draws of u for the drop-wave with --dim 2 (4096)")
    add = p.add_argument_group("graduated").add_argument
    add("--functions", nargs="+", choices=OBJECTIVES, metavar="NAME", help=f"{' '.join(OBJECTIVES)} (all)")
    add("--schedules", nargs="+", choices=SCHEDULES, metavar="NAME", help="of delta: nice geo (both)")
    add("--dim-ego", type=whole(1, 1000), metavar="D", help=f"coordinates ({d.dim_ego})")
    add("--rounds", type=whole(1, 10**6), metavar="M", help=f"values of delta ({d.rounds})")
    add("--steps", type=whole(1, 10**6), metavar="N", help=f"of descent at every delta ({d.steps})")
    add("--draws", type=whole(1, 1000), metavar="N", help=f"perturbations a step ({d.draws})")
    add("--delta-first", type=positive, metavar="X", help=f"of the first round ({d.delta_first:g})")
    add("--delta-last", type=positive, metavar="X", help=f"of the last round ({d.delta_last:g})")
    add("--seeds", type=whole(1, 10_000), metavar="N", help=f"starts, with perturbations of their own ({d.seeds})")
    # fmt: on
    return p


def parse(argv: list[str]) -> Request | None:
    """The request of a command line; None where it asks for help. Raises ConfigError."""
    given = vars(parser().parse_args([flag_types.plain(word) for word in argv]))
    if given.pop("help", False):
        return None
    for name, value in given.items():
        if isinstance(value, list):
            if len(set(value)) < len(value):
                raise ConfigError(
                    f"{flag(name)} names a value more than once: give every value once"
                )
            given[name] = tuple(value)
    if given.get("dim") == 2:
        given.setdefault("points", 61)
    if "out" in given:
        given["out"] = Path(given["out"])
    request = Request(**given)
    check(request, given)
    return request


def main(argv: list[str] | None = None) -> int:
    """Compute, print and draw what a command line asks for; the exit code."""
    return exit_code(
        lambda: carry_out(sys.argv[1:] if argv is None else argv), (ConfigError, RunFolderError)
    )


def carry_out(argv: list[str]) -> int:
    request = parse(argv)
    if request is None:
        show(*parser().format_help().splitlines())
        return DONE
    with refusing(request.out):  # a folder that cannot be written fails now
        request.out.mkdir(parents=True, exist_ok=True)
    check_unused(request.out)
    from fastsmooth.smooth import study  # with torch, after the flags are right: it takes seconds

    study.run(request, shlex.join(["python", "-m", "fastsmooth.smooth", *argv]))
    return DONE


if __name__ == "__main__":
    end_with(main)
