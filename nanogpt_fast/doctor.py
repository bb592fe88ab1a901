"""What this machine offers, and whether a model trains on it: `python -m nanogpt_fast.doctor [--json]`.

`torchrun ... -m nanogpt_fast.doctor --ranks` measures the network between ranks instead (network/check.py).
For bug reports: user name, host name and home folder are never printed. Exit code 0, or 5 when something is broken.
"""

import json

from nanogpt_fast.command import importing, run_command
from nanogpt_fast.errors import DeviceError, printable
from nanogpt_fast.privacy import private
from nanogpt_fast.settings import cli
from nanogpt_fast.settings.examining import DoctorConfig


def main(argv: list[str]) -> int:
    """Print the report; 5 when a problem was found."""
    description = "What this machine offers, and whether a model trains on it."
    epilog = "Fit for a bug report: it names no user, host or home folder. Exit code 0, or 5\nwhen something is broken."
    config = cli.parse(DoctorConfig, argv, prog="python -m nanogpt_fast.doctor", description=description, epilog=epilog)
    with importing():  # torch, a second that --help and a wrong flag do without
        from nanogpt_fast.examination import as_text, examine
        from nanogpt_fast.network.check import check

    if config.ranks:
        limits = {"seconds": config.seconds, "slow": config.slow, "timeout": config.timeout, "expect": config.expect}
        return check(config.device, **limits, as_json=config.json)
    report = private(examine(config))
    print(json.dumps(report, indent=1) if config.json else printable(as_text(report)))
    return DeviceError.exit_code if report["problems"] else 0


if __name__ == "__main__":
    run_command(main, again="nothing was changed")
