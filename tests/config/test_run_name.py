"""A run's directory is its own."""

import pytest

from fp8slurm.config import RunConfig


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../", "/"])
def test_a_name_that_names_no_folder_of_its_own_is_refused(name):
    with pytest.raises(ValueError, match="--run.name .* names no folder of its own"):
        RunConfig.model_validate({"run": {"name": name}})
