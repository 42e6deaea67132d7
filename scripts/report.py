"""One self-contained HTML page about training runs, samples, sweeps and exposure-bias measurements.

    python scripts/report.py runs/demo runs/demo_ip --out report.html
    python scripts/report.py runs/sweep --plots figures    also writes figures/NAME.svg and .png

RUN is a folder; what it is, its files tell, and folders inside it are shown too. The page needs no
network and no server.
"""

import argparse
import os

from guided_diffusion_ip.settings.config import command
from guided_diffusion_ip.studies.report import write_report


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def main() -> None:
    parser = _Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a training run, samples, a sweep or a measurement; or a lambda schedule",
    )
    parser.add_argument(
        "--out", default="", metavar="FILE", help="the page; default: report.html in the first RUN"
    )
    parser.add_argument(
        "--plots", default="", metavar="DIR", help="also write the plots there, as SVG and PNG"
    )
    parser.add_argument("--title", default="", help="heading of the page")
    args = parser.parse_args()
    first = args.runs[0] if os.path.isdir(args.runs[0]) else os.path.dirname(args.runs[0])
    written = write_report(
        args.runs, args.out or os.path.join(first, "report.html"), args.plots, args.title
    )
    print(f"report: {os.path.abspath(written[0])}")
    if args.plots:
        print(f"plots: {len(written) - 1} files in {args.plots}")


if __name__ == "__main__":
    command(main)
