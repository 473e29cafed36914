"""Errors of others become one line, and what is not installed names its package and extra."""

from __future__ import annotations

import pytest

from vitedge.errors import MissingPackageError, first_line, import_package


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one"), "one"),
        (ValueError("\n  one\ntwo"), "one"),
        (ValueError(""), "ValueError"),
        (ValueError(" \n "), "ValueError"),
        (KeyError(), "KeyError"),
    ],
)
def test_the_first_line_of_an_error_is_never_empty(error: Exception, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.parametrize(("package", "named"), [(None, "no_such_module"), ("no-such-package", "no-such-package")])
def test_what_cannot_be_imported_names_its_package_and_extra(package: str | None, named: str) -> None:
    with pytest.raises(MissingPackageError, match=f"the package '{named}' is not installed") as caught:
        import_package("no_such_module", "camera", package)
    hint = f"pip install {named}; or, in a clone of vitedge, all that goes with it: pip install '.[camera]'"
    assert caught.value.hint == hint, "nothing is asked of an index by the name of vitedge, which is not there"


def test_what_is_installed_is_given() -> None:
    assert import_package("json", "camera").loads("1") == 1
