"""Which laws of `moeify.testing` a part breaks."""

from moeify.testing import BrokenLaw


def broken(check, laws, *args, **options) -> set[str]:
    """The laws that a part breaks."""
    names = {law.__name__ for law in laws}
    found = set()
    for name in names:
        try:
            check(*args, without=names - {name}, **options)
        except BrokenLaw as error:
            found.add(error.law)
    return found
