"""What wrong input is answered with."""

from contextlib import contextmanager

import pytest

from magus_anharmonic.errors import InputError


@contextmanager
def refused(*words):
    """An `InputError` whose message holds all ``words``."""
    with pytest.raises(InputError) as error:
        yield
    assert all(word in str(error.value) for word in words), str(error.value)
