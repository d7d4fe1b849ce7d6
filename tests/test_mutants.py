"""That ``make mutants`` still finds what it breaks: it takes an hour, and sources move."""

import pytest
from mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_line_is_there_once(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
