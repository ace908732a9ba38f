"""`moeify doctor`: what is installed, which kernels will run, and why."""

from __future__ import annotations


def doctor() -> None:
    """Say what is installed, which kernels will run on this machine, and why."""
    from moeify.cli.machine import describe_machine

    describe_machine()
