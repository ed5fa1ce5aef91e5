"""Changed structures for everything that reads a file: nothing but this project's own errors.

A few inputs a reader here, 10,000 where marked slow; ``SPMCONVERT_FUZZ=1000000`` for another number.
"""

import os

import pytest

from tests.robustness import fuzz
from tests.robustness.readers import READERS, Reader, make_readers

FEW, MANY = 60, 10_000


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPMCONVERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return make_readers(tmp_path_factory.mktemp("readers"))


@pytest.mark.parametrize("name", READERS)
def test_some_inputs(readers, name):
    found = fuzz.fuzz(readers[name], FEW)
    assert found["crashes"] == {}, found["examples"]
    assert found["inputs"] > 0


@pytest.mark.slow
@pytest.mark.timeout(36_000)
@pytest.mark.parametrize("name", READERS)
def test_many_inputs(readers, name):
    found = fuzz.fuzz(readers[name], int(os.environ.get("SPMCONVERT_FUZZ", MANY)))
    assert found["crashes"] == {}, found["examples"]


@pytest.mark.parametrize("name", READERS)
def test_what_is_good_is_read(readers, name):
    assert fuzz.attempt(readers[name], readers[name].good) is None


def test_another_error_is_found():
    def read():
        raise KeyError("x")

    found = fuzz.fuzz(Reader("broken", {"a": [1]}, lambda _: None, read), 20)
    assert found["crashes"] == {"KeyError at outside": 20}
